"""What each lever of the field gives in a small fixed setting, one at a time.

The base is the recipe of chapter 06c at a small shape: Muon for the matrices, AdamW for embeddings and
norms, zeroed residual outputs, tied tables, a linear fall. A lever changes one thing. Its gain is
paired by seed with the base: bits per byte of held-out text at equal steps, with a 95 % interval, and
at equal time, where the change of the processor time per step is turned into steps along the base's
own curve. `exports` names the family of transformers that can hold the model; the claim is checked by
loading the trained weights there and comparing logits. Levers the base has are measured by removal.
    python benchmarks/levers.py [TEXT] [--result RESULT.json] [--seeds 3] [--only "NAME;NAME"]
Without a text it takes documentation of the standard library. A result file that exists is gone on with.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from steps_to_loss import ROWS, SHAPE, Corpus, Memory, factor, learn, read_text, share_out
from torch import nn

from llmbook.architecture import Decoder, DecoderSettings, RMSNorm
from llmbook.core import Table, set_seed, set_threads
from llmbook.objectives import Autoregressive, heldout_bits_per_byte
from llmbook.optimisation import NEWTON_SCHULZ, Muon, keep_memory, training_dtype
from llmbook.positions import apply_rotary
from llmbook.pretraining import start_from_pairs
from llmbook.architecture import initialise_weights

STEPS, LONGER = 150, 180
BASE = {"matrix_rate": 8e-3, "table_rate": 2e-2, "warmup": 0.02, "fall": "linear"}


# ── architecture ──────────────────────────────────────────────────────────────────────────────────


def normalise_queries(model: Decoder, corpus: Corpus) -> None:
    "QK-norm: an RMSNorm over each head's queries and keys before they are turned (Dehghani, 2023)."
    for block in model.blocks:
        layer = block.attention
        layer.query_norm, layer.key_norm = RMSNorm(layer.head_width), RMSNorm(layer.head_width)
        layer._split = lambda x, memory, rotary, layer=layer: _split_normed(layer, x, rotary)


def _split_normed(layer, x, rotary):
    h, kv, e = layer.heads, layer.key_value_heads, layer.head_width
    fused = layer.project(x).unflatten(-1, (h + 2 * kv, e)).transpose(1, 2)
    queries, keys, values = fused.split((h, kv, kv), 1)
    queries, keys = layer.query_norm(queries), layer.key_norm(keys)
    return apply_rotary(queries, *rotary), apply_rotary(keys, *rotary), values


class SquaredGate(nn.Module):
    "SwiGLU with the square of ReLU for SiLU."

    def __init__(self, old: nn.Module):
        super().__init__()
        self.gate_up, self.down = old.gate_up, old.down

    def forward(self, x):
        "The gate is positive and sparse."
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.relu(gate).square() * up)


class Squared(nn.Module):
    "Two matrices and the square of ReLU between, as many weights as SwiGLU (So and others, 2021)."

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden * 3 // 2, bias=False)
        self.down = nn.Linear(hidden * 3 // 2, width, bias=False)
        nn.init.normal_(self.up.weight, std=0.6 / math.sqrt(width))
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        "No gate."
        return self.down(F.relu(self.up(x)).square())


def square_the_gate(model: Decoder, corpus: Corpus) -> None:
    "ReLU² in the gate."
    for block in model.blocks:
        block.feed_forward = SquaredGate(block.feed_forward)


def square_without_gate(model: Decoder, corpus: Corpus) -> None:
    "ReLU² without a gate."
    for block in model.blocks:
        block.feed_forward = Squared(SHAPE["width"], SHAPE["hidden"])


def keep_the_usual_start(model: Decoder, corpus: Corpus) -> None:
    "GPT-2's start: deviation 0.02, residual outputs divided by the root of twice the depth."
    for block in model.blocks:
        for layer in (block.attention.project, block.feed_forward.gate_up):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (block.attention.output, block.feed_forward.down):
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * SHAPE["depth"]))


def add_value_tables(model: Decoder, corpus: Corpus) -> None:
    "Value embeddings: each layer adds a row of its own table to the values (Zhou, 2024)."
    held = {}
    model.embedding.register_forward_pre_hook(lambda module, args: held.update(ids=args[0]))
    for block in model.blocks:
        layer = block.attention
        table = layer.value_table = nn.Embedding(corpus.vocabulary, layer.heads * layer.head_width)
        nn.init.zeros_(table.weight)
        plain = type(layer)._split

        def split(x, memory, rotary, layer=layer, table=table, plain=plain):
            queries, keys, values = plain(layer, x, memory, rotary)
            more = table(held["ids"]).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            return queries, keys, values + more

        layer._split = split


def add_pair_table(model: Decoder, corpus: Corpus) -> None:
    "Bigram embeddings: a hashed row for each pair of neighbours, added to the input."
    rows = 8 * corpus.vocabulary
    table = model.pair_table = nn.Embedding(rows, SHAPE["width"])
    nn.init.zeros_(table.weight)

    def add(module, args, states):
        ids = args[0]
        before = F.pad(ids, (1, 0))[:, :-1]
        return states + table((before * 36_313 + ids * 27_191) % rows)

    model.embedding.register_forward_hook(add)


def cap_logits(model: Decoder, corpus: Corpus) -> None:
    "Soft cap: logits between -15 and 15 by a hyperbolic tangent (Gemma 2)."
    model.cap = 15.0


# ── optimisers ────────────────────────────────────────────────────────────────────────────────────

POLAR = (  # a polynomial for each turn (Amsel and others, 2025)
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def polish(matrix, dtype, table=(NEWTON_SCHULZ,) * 5):
    "Orthogonal factor by one polynomial a turn."
    x = matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm() * 1.02).clamp(min=1e-7)
    for a, b, c in table:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).float()


class Kin(Muon):
    "Muon with one thing changed."

    change = ""

    def _update(self, weight, group):
        state, beta = self.state[weight], group["momentum"]
        if not state:
            state["momentum"], state["step"] = torch.zeros_like(weight), 0
            state["rows"] = torch.zeros(len(weight), 1)
        state["step"] += 1
        if self.change == "momentum warm-up":
            beta = min(1.0, state["step"] / 50) * (beta - 0.85) + 0.85
        state["momentum"].lerp_(weight.grad, 1 - beta)
        ahead = state["momentum"]
        if self.change != "no look-ahead":
            ahead = weight.grad.lerp(ahead, beta)
        table = POLAR if self.change == "Polar Express" else (NEWTON_SCHULZ,) * group["turns"]
        parts = None if self.change == "stacked maps as one" else group["parts"]
        steps = []
        for part in ahead.split(parts or [len(weight)]):
            scale = 0.2 * math.sqrt(max(part.shape))
            if self.change == "steps scaled by fan":
                n, m = part.shape
                scale = 0.2 * math.sqrt(SHAPE["width"]) * math.sqrt(max(1.0, n / m))
            steps.append(polish(part, group["dtype"], table) * scale)
        step = torch.cat(steps)
        if self.change == "NorMuon":
            state["rows"].lerp_(step.square().mean(1, keepdim=True), 0.05)
            even = step / (state["rows"] / (1 - 0.95 ** state["step"])).sqrt().clamp(min=1e-8)
            step = even * (step.norm() / even.norm().clamp(min=1e-8))
        decay = group["lr"] * group["weight_decay"]
        if self.change == "cautious weight decay":
            weight.sub_(decay * weight * (weight * step > 0))
        else:
            weight.mul_(1 - decay)
        weight.add_(step, alpha=-group["lr"])


def optimise(model, change="", matrix=1.0, table=1.0, betas=(0.9, 0.95), **options) -> list:
    "Muon or a kin for the matrices, AdamW for the tables."
    matrices, tables = share_out(model)
    kind = type("Kin", (Kin,), {"change": change}) if change else Muon
    groups = [{"params": [p], "parts": parts} for p, parts in matrices.items()]
    options = {"dtype": training_dtype(torch.device("cpu"))} | options
    muon = kind(groups, BASE["matrix_rate"] * matrix, **options)
    adam = torch.optim.AdamW(
        tables, lr=BASE["table_rate"] * table, betas=betas, weight_decay=0.0, fused=True
    )
    return [adam, muon]


def optimise_by_adamw(model) -> list:
    "AdamW for all, two rates."
    matrices, tables = share_out(model)
    groups = [{"params": tables, "lr": BASE["table_rate"]},
              {"params": list(matrices), "lr": BASE["matrix_rate"] / 2}]
    return [torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


# ── schedules and batches ─────────────────────────────────────────────────────────────────────────


def rate_of(fall="linear", warmup=0.02) -> Callable[[int, int], float]:
    "A schedule of its own."
    return lambda step, steps: factor(step, steps, warmup, fall)


def fall_by_root(step: int, steps: int) -> float:
    "Stable, then one minus the root (Hägele and others, 2024)."
    done = max(0.0, (step / steps - 0.5) / 0.5)
    return min((step + 1) / max(1.0, 0.02 * steps), 1 - math.sqrt(done))


def high_early(step: int, steps: int) -> float:
    "Twice the rate at first, falling to the usual line by the middle."
    return factor(step, steps, 0.05, "linear") * (1 + max(0.0, 1 - 2 * step / steps))


def grow_batch(corpus: Corpus, seed: int, steps: int) -> Callable:
    "Half the rows in the first third of the steps, then a quarter more: as many tokens in all."
    third, half = steps // 3, ROWS // 2
    many = round((ROWS * steps - half * third) / (steps - third))
    few = Autoregressive(corpus.learn, SHAPE["context"], half, seed)
    rest = Autoregressive(corpus.learn, SHAPE["context"], many, seed + 1)
    return lambda step: few.batch(step) if step < third else rest.batch(step)


def grow_context(corpus: Corpus, seed: int, steps: int) -> Callable:
    "Rows half as long and twice as many in the first half."
    short = Autoregressive(corpus.learn, SHAPE["context"] // 2, ROWS * 2, seed)
    long = Autoregressive(corpus.learn, SHAPE["context"], ROWS, seed + 1)
    return lambda step: (short if step < steps // 2 else long).batch(step)


def start_at_documents(corpus: Corpus, seed: int, steps: int) -> Callable:
    "Rows begin where a paragraph begins."
    breaks = {i for i, token in enumerate(corpus.tokenizer.tokens) if token.endswith(b"\n\n")}
    places = np.flatnonzero(np.isin(corpus.learn, list(breaks))) + 1
    places = places[places < len(corpus.learn) - SHAPE["context"] - 1]
    if not len(places):
        raise SystemExit("the text has no paragraphs: leave out `rows from paragraph starts`")

    def batch(step: int) -> dict:
        chance = np.random.default_rng([seed, step])
        starts = chance.choice(places, ROWS)
        rows = np.stack([corpus.learn[s : s + SHAPE["context"] + 1] for s in starts])
        rows = torch.from_numpy(rows.astype(np.int64))
        return {"ids": rows[:, :-1].clone(), "labels": rows[:, 1:].clone()}

    return batch


# ── the table ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Lever:
    "One change to the base."

    name: str
    exports: str = "Llama"  # family of transformers that holds the model; "" none
    build: Callable | None = None  # changes the fresh model
    optimise: Callable = optimise
    rate: Callable = rate_of()
    batch: Callable | None = None
    tied: bool = True


def kin(change: str, **options) -> Callable:
    "Optimisers with one thing changed."
    return lambda model: optimise(model, change, **options)


LEVERS = [
    Lever("base"),
    Lever("QK-norm", "Qwen3", normalise_queries),
    Lever("ReLU² in the gate", "Llama", square_the_gate),
    Lever("ReLU² without gate", "Arcee", square_without_gate),
    Lever("value embeddings", "", add_value_tables),
    Lever("bigram embeddings", "", add_pair_table),
    Lever("logit soft cap", "", cap_logits),
    Lever("untied tables", tied=False),
    Lever("untied, start at counted pairs", build=lambda model, corpus: start_from_pairs(model, corpus.learn), tied=False),
    Lever("removed: zeroed outputs", build=keep_the_usual_start),
    Lever("removed: Muon (AdamW, half rate)", optimise=optimise_by_adamw),
    Lever("removed: look-ahead", optimise=kin("no look-ahead")),
    Lever("removed: a step per stacked map", optimise=kin("stacked maps as one")),
    Lever("Polar Express", optimise=kin("Polar Express")),
    Lever("NorMuon", optimise=kin("NorMuon")),
    Lever("steps scaled by fan", optimise=kin("steps scaled by fan")),
    Lever("momentum warm-up", optimise=kin("momentum warm-up")),
    Lever("weight decay 0.3", optimise=kin("", weight_decay=0.3)),
    Lever("cautious weight decay 0.3", optimise=kin("cautious weight decay", weight_decay=0.3)),
    Lever("three turns", optimise=kin("", turns=3)),
    Lever("momentum 0.9", optimise=kin("", momentum=0.9)),
    Lever("momentum 0.9, table betas 0.8, 0.95", optimise=kin("", momentum=0.9, betas=(0.8, 0.95))),
    Lever("table betas 0.8, 0.95", optimise=kin("", betas=(0.8, 0.95))),
    Lever("table betas 0.9, 0.99", optimise=kin("", betas=(0.9, 0.99))),
    Lever("matrix rate × 1.5", optimise=kin("", matrix=1.5)),
    Lever("table rate × 2", optimise=kin("", table=2.0)),
    Lever("cosine fall", rate=rate_of("cosine")),
    Lever("stable, then linear", rate=rate_of("stable, then linear")),
    Lever("stable, then root", rate=fall_by_root),
    Lever("warm-up of a tenth", rate=rate_of("linear", 0.1)),
    Lever("twice the rate early", rate=high_early),
    Lever("batch grows", batch=grow_batch),
    Lever("context grows", batch=grow_context),
    Lever("rows from paragraph starts", batch=start_at_documents),
]


class Capped(Autoregressive):
    "The same loss with capped logits."

    def loss(self, model, part):
        "Mean of -log P."
        logits = F.linear(model.states(part["ids"]), model.output_weight)
        logits = model.cap * torch.tanh(logits.float() / model.cap)
        return F.cross_entropy(logits.flatten(0, 1), part["labels"].flatten())


class Cap(nn.Module):
    "Capped logits for the scorer."

    def __init__(self, model: Decoder):
        super().__init__()
        self.inner, self.settings = model, model.settings

    def forward(self, ids):
        "Logits."
        return self.inner.cap * torch.tanh(self.inner(ids) / self.inner.cap)


def train_steps(corpus: Corpus, lever: Lever, steps: int, seed: int) -> tuple[dict, Decoder]:
    "A whole training with one lever, not scored."
    set_seed(seed)
    settings = DecoderSettings(
        corpus.vocabulary, SHAPE["depth"], SHAPE["width"], SHAPE["heads"], SHAPE["heads"],
        SHAPE["hidden"], SHAPE["context"], tied=lever.tied,
    )
    model = Decoder(settings)
    initialise_weights(model)
    if lever.build:
        lever.build(model, corpus)
    kind = Capped if hasattr(model, "cap") else Autoregressive
    objective = kind(corpus.learn, SHAPE["context"], ROWS, seed)
    batch = lever.batch(corpus, seed, steps) if lever.batch else None
    rate = lambda step: lever.rate(step, steps)
    return learn(model, objective, lever.optimise(model), steps, rate, batch), model


def train_one(corpus: Corpus, lever: Lever, steps: int, seed: int) -> tuple[dict, Decoder]:
    "A whole training with one lever, and its held-out bits per byte."
    spent, model = train_steps(corpus, lever, steps, seed)
    scored = Cap(model) if hasattr(model, "cap") else model
    return spent | {"loss": heldout_bits_per_byte(scored, corpus, rows=64)}, model


def measure_cost(corpus: Corpus, lever: Lever, rounds: int = 4, steps: int = 6) -> float:
    "Processor time of a step against the base's, both interleaved; the least of the rounds."
    spent = {}
    for _ in range(rounds):
        for one in (LEVERS[0], lever):
            spent.setdefault(one.name, []).append(train_steps(corpus, one, steps, 0)[0]["cpu"])
    return min(spent[lever.name]) / min(spent["base"])


def export(model: Decoder, family: str) -> nn.Module:
    "The same model in transformers."
    import transformers

    s = model.settings
    squared = family == "Arcee" or isinstance(model.blocks[0].feed_forward, SquaredGate)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=s.vocabulary, hidden_size=s.width, num_hidden_layers=s.depth,
        num_attention_heads=s.heads, num_key_value_heads=s.key_value_heads, head_dim=s.channels,
        intermediate_size=model.blocks[0].feed_forward.down.weight.shape[1],
        max_position_embeddings=s.context, rms_norm_eps=s.norm_epsilon, rope_theta=s.rope_base,
        tie_word_embeddings=s.tied, hidden_act="relu2" if squared else "silu",
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    own, state = model.state_dict(), {}
    state["model.embed_tokens.weight"], state["model.norm.weight"] = own["embedding.weight"], own["norm.weight"]
    state["lm_head.weight"] = model.output_weight.detach()
    wide = s.heads * s.channels
    for i in range(s.depth):
        ours, to = f"blocks.{i}.", f"model.layers.{i}."
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        for name, part in zip(names, own[ours + "attention.project.weight"].split(wide), strict=True):
            state[f"{to}{name}.weight"] = part
        pairs = {"attention.output": "self_attn.o_proj", "feed_forward.down": "mlp.down_proj",
                 "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
                 "feed_forward.up": "mlp.up_proj", "attention.query_norm": "self_attn.q_norm",
                 "attention.key_norm": "self_attn.k_norm"}
        for old, new in pairs.items():
            if f"{ours}{old}.weight" in own:
                state[f"{to}{new}.weight"] = own[f"{ours}{old}.weight"]
        if f"{ours}feed_forward.gate_up.weight" in own:
            gate, up = own[f"{ours}feed_forward.gate_up.weight"].chunk(2)
            state[f"{to}mlp.gate_proj.weight"], state[f"{to}mlp.up_proj.weight"] = gate, up
    theirs.load_state_dict(state)
    return theirs


@torch.no_grad()
def check_export(model: Decoder, family: str, corpus: Corpus) -> bool:
    "Whether transformers gives the same logits with the same weights."
    ids = torch.from_numpy(corpus.tokens[: 2 * SHAPE["context"]].astype(np.int64)).view(2, -1)
    return torch.allclose(export(model, family)(ids).logits, model(ids), atol=1e-3, rtol=1e-3)


def main() -> None:
    "All levers, all seeds, one table."
    parser = argparse.ArgumentParser()
    parser.add_argument("text", nargs="?")
    parser.add_argument("--result")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="names of levers, separated by semicolons")
    parser.add_argument("--stack", default="", help="names, separated by semicolons: their changes together, too")
    options = parser.parse_args()
    set_threads(options.threads)
    keep_memory()
    text = read_text(options.text)
    corpus = Corpus(text)
    identity = {"characters": len(text), "shape": SHAPE, "rows": ROWS, "steps": STEPS, "base": BASE}
    memory = Memory(options.result, identity)
    names = {name for name in options.only.split(";") if name}
    if unknown := names - {lever.name for lever in LEVERS}:
        raise SystemExit(f"no lever {unknown}; there are {[lever.name for lever in LEVERS]}")
    wanted = [one for one in LEVERS if not names or one.name in names or one.name == "base"]
    if options.stack:
        wanted.append(stack(options.stack.split(";")))

    def ask(lever: Lever, steps: int, seed: int) -> dict:
        def work() -> dict:
            numbers, model = train_one(corpus, lever, steps, seed)
            if lever.exports and seed == 0:
                numbers["exports"] = check_export(model, lever.exports, corpus)
            return numbers

        return memory.ask(f"{lever.name} {steps} {seed}", work)

    for seed in range(options.seeds):
        ask(LEVERS[0], LONGER, seed)
        for lever in wanted:
            found = ask(lever, STEPS, seed)
            print(f"seed {seed}  {lever.name:36} {found['loss']:.4f}  {found['cpu']:.1f} s", flush=True)
    cost = lambda lever: memory.ask(
        f"cost {lever.name}", lambda: {"cost": measure_cost(corpus, lever)}
    )["cost"]
    rows = tabulate(wanted, ask, cost, options.seeds)
    print(Table(rows, f"bits per byte after {STEPS} steps; below zero is better"))
    memory.found["table"] = rows
    memory.save()


def stack(names: list[str]) -> Lever:
    "Several levers at once: the last to set a thing wins, builds follow each other."
    chosen = [next(lever for lever in LEVERS if lever.name == name) for name in names]
    result = replace(chosen[0], name=" + ".join(names))
    for lever in chosen[1:]:
        first, second = result.build, lever.build
        build = second if not first else first
        if first and second:
            build = lambda m, c, first=first, second=second: (first(m, c), second(m, c))
        plain = LEVERS[0]
        result = replace(
            result, build=build, tied=result.tied and lever.tied,
            optimise=lever.optimise if lever.optimise is not plain.optimise else result.optimise,
            rate=lever.rate if lever.rate is not plain.rate else result.rate,
            batch=lever.batch or result.batch,
            exports=lever.exports if lever.exports != "Llama" else result.exports,
        )
    return result


def tabulate(wanted: list[Lever], ask: Callable, measure: Callable, seeds: int) -> list[dict]:
    "Paired differences with the base, at equal steps and at equal time."
    from scipy.stats import t

    base = [ask(LEVERS[0], STEPS, seed) for seed in range(seeds)]
    longer = [ask(LEVERS[0], LONGER, seed) for seed in range(seeds)]
    gains = [(b["loss"] - a["loss"]) / math.log(LONGER / STEPS) for a, b in zip(base, longer, strict=True)]
    slope = statistics.fmean(gains)  # bits per byte for e times the steps, below zero
    rows = []
    for lever in wanted:
        runs = [ask(lever, STEPS, seed) for seed in range(seeds)]
        changes = [r["loss"] - b["loss"] for r, b in zip(runs, base, strict=True)]
        mean = statistics.fmean(changes)
        half = math.nan
        if seeds > 1:
            half = t.ppf(0.975, seeds - 1) * statistics.stdev(changes) / math.sqrt(seeds)
        first = lever.name == "base"
        cost = 1.0 if first else measure(lever)
        timed = mean - slope * math.log(cost)
        rows.append({
            "lever": lever.name, "bits per byte": f"{statistics.fmean(r['loss'] for r in runs):.4f}",
            "equal steps": "" if first else f"{mean:+.4f}", "± 95 %": "" if first else f"{half:.4f}",
            "time a step": f"{cost:.2f} x", "equal time": "" if first else f"{timed:+.4f}",
            "exports": f"{lever.exports} {'checked' if runs[0].get('exports') else 'FAILED'}"
            if lever.exports else "no",
        })
    return rows


if __name__ == "__main__":
    main()
