"""Time to equal held-out loss: nanoGPT's documented CPU recipe against ours, same bytes, same cores.

The peer, in our own words: characters, 4 layers, 4 heads, width 128, context 64, batch 12, 2,000 steps,
AdamW 1e-3 to 1e-4 by cosine after 100 steps of warm-up, betas 0.9 and 0.99, decay 0.1, clip 1, weights
shared out to decay by their dimensions; on tiny Shakespeare its documented loss is about 1.88 nats per
character. Its model is a plain GPT-2 written here, which takes two thirds of the time of transformers'
(`--peer transformers` runs that one): the leaner is the harder rival.

Ours is the recipe of the profile `laptop` at a size for this text: byte pairs learnt on the training
part, `Decoder` whose two tables start from counted pairs of tokens, Muon, `train` with its checkpoint.
Then the gain falls apart into its parts: ours with one table that starts at random; the same on the peer's
characters, without the byte pairs; and the peer's loop with our byte pairs.
Time is that of everything from the text to the trained weights: tokenizer, encoding, model, optimiser,
loop; imports and scoring stay outside on both sides.

The held-out tenth is scored whole, in nats per byte, in rows that do not overlap and hold 64 bytes for
every side (for byte pairs as many tokens as hold 64 bytes on average), so no side sees more context.
The number of steps of ours is found on a seed of its own: whole trainings of rising length until one is
better than the peer's first by a margin of 0.01. Then all sides run on the same seeds, interleaved.
    python benchmarks/time_to_loss.py TEXT [RESULT.json] [--seeds 5] [--precision auto|float32]
A result file that exists is gone on with.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.core import Table, set_seed, set_threads, write_json
from llmbook.objectives import Autoregressive, heldout_bits_per_byte
from llmbook.optimisation import TrainSettings, keep_memory, training_dtype
from llmbook.architecture import initialise_weights
from llmbook.pretraining import PretrainSettings, start_from_pairs
from llmbook.tokenization import BytePairs, train_bpe
from llmbook.training import train

CONTEXT, PILOT_SEED, MARGIN = 64, 100, 0.01
PEER, OURS, OURS_RANDOM = "peer", "ours", "ours, start at random"
OURS_CHARACTERS, PEER_PIECES = "ours, random, characters", "peer's loop, byte pairs"
LADDER = (5, 10, 20, 30, 40, 50, 65, 85, 110, 150, 200, 260, 350, 450, 600, 800, 1100, 1500)
CHOICES = {  # found by short runs of this text; the rates are those of `laptop`
    OURS: {"vocabulary": 2048, "depth": 2, "width": 128, "rows": 16, "pairs": True},
    OURS_RANDOM: {"vocabulary": 2048, "depth": 2, "width": 128, "rows": 16, "pairs": False},
    OURS_CHARACTERS: {"vocabulary": 0, "depth": 2, "width": 128, "rows": 12, "pairs": False},
}
RATES = {name: getattr(PretrainSettings(), name) for name in ("learning_rate", "matrix_rate", "momentum", "table_momentum")}
RATES["decay"] = 0.6


class Characters:
    "A text as character ids."

    def __init__(self, text: str):
        self.table = {c: i for i, c in enumerate(sorted(set(text)))}
        self.size = len(self.table)

    def encode(self, text: str) -> np.ndarray:
        "One id a character."
        return np.array([self.table[c] for c in text], np.uint16)


class Pieces:
    "A text as byte pairs learnt on it."

    def __init__(self, text: str, vocabulary: int):
        self.pairs = BytePairs(train_bpe([text], vocabulary))
        self.size = len(self.pairs.tokens)

    def encode(self, text: str) -> np.ndarray:
        "Fewer ids than characters."
        return np.array(self.pairs.encode(text), np.uint16)


class HeldOut:
    "What the scorer wants to know of the held-out part."

    def __init__(self, text: str, tokenizer):
        self.tokens, self.bytes = tokenizer.encode(text), len(text.encode())
        self.row = max(1, round(CONTEXT * len(self.tokens) / self.bytes))


class PlainBlock(nn.Module):
    "A block of GPT-2 without biases."

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.heads = heads

    def forward(self, x):
        "Attention, then feed-forward."
        parts = self.project(self.first(x)).chunk(3, -1)
        queries, keys, values = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class PlainGPT(nn.Module):
    "GPT-2 of the peer's shape: learnt positions, tied tables, deviation 0.02."

    def __init__(self, vocabulary: int, width: int = 128, depth: int = 4, heads: int = 4):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                last = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * depth) if last else 0.02)

    def forward(self, ids):
        "Logits."
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


class TransformersGPT(nn.Module):
    "The same from transformers."

    def __init__(self, vocabulary: int):
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        self.inner = GPT2LMHeadModel(GPT2Config(
            vocab_size=vocabulary, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, use_cache=False,
        ))

    def forward(self, ids):
        "Logits."
        return self.inner(ids).logits


def learn_as_peer(text: str, tokenizer, options, seed: int, steps: int = 2000) -> nn.Module:
    "nanoGPT's recipe."
    model = {"plain": PlainGPT, "transformers": TransformersGPT}[options.peer](tokenizer.size)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    ids = torch.from_numpy(tokenizer.encode(text).astype(np.int64))
    chance = torch.Generator().manual_seed(seed)
    narrow = options.peer_precision == "bfloat16"
    warmup = min(100, steps // 20)
    for step in range(steps):
        fall = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        rate = 1e-3 * (step + 1) / (warmup + 1) if step < warmup else 1e-4 + 9e-4 * fall
        for group in optimiser.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - CONTEXT, (12,), generator=chance)
        rows = torch.stack([ids[s : s + CONTEXT + 1] for s in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            logits = model(rows[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return model.eval()


def learn_as_ours(text: str, tokenizer, choice: dict, options, seed: int, steps: int) -> nn.Module:
    "Our decoder and loop."
    heads, hidden = choice["width"] // 64, 64 * math.ceil(choice["width"] / 24)
    model = Decoder(DecoderSettings(
        tokenizer.size, choice["depth"], choice["width"], heads, heads, hidden, CONTEXT, tied=not choice["pairs"],
    ))
    initialise_weights(model)
    tokens = tokenizer.encode(text)
    if choice["pairs"]:
        start_from_pairs(model, tokens)
    objective = Autoregressive(tokens, CONTEXT, choice["rows"], seed)
    settings = TrainSettings(
        steps=steps, precision=options.precision, checkpoint_every=10**6, seed=seed, device="cpu", **RATES
    )
    with tempfile.TemporaryDirectory() as folder:
        train(model, objective, settings, folder, watch_every=10**6)
    return model.eval()


def run(side: str, text: str, options, seed: int, steps: int) -> dict:
    "One whole training, timed, and its held-out loss."
    cut = len(text) * 9 // 10
    learnt, rest = text[:cut], text[cut:]
    set_seed(seed)
    wall, cpu = time.perf_counter(), time.process_time()
    vocabulary = CHOICES[OURS if side == PEER_PIECES else side]["vocabulary"] if side != PEER else 0
    tokenizer = Pieces(learnt, vocabulary) if vocabulary else Characters(text)
    if side in CHOICES:
        model = learn_as_ours(learnt, tokenizer, CHOICES[side], options, seed, steps)
    else:
        model = learn_as_peer(learnt, tokenizer, options, seed, steps)
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    held = HeldOut(rest, tokenizer)
    nats = heldout_bits_per_byte(model, held, held.row, rows=64) * math.log(2)
    return spent | {"loss": nats, "steps": steps, "side": side, "seed": seed}


def pick_peer_precision(options, text: str) -> str:
    "The number format in which the peer is faster here: bfloat16 helps it only on some processors."
    if options.precision == "float32" or training_dtype(torch.device("cpu")) == torch.float32:
        return "float32"
    spent = {}
    for precision in ("float32", "bfloat16") * 2:
        options.peer_precision = precision
        learn_as_peer(text[:50_000], Characters(text), options, 0, 10)
        start = time.process_time()
        learn_as_peer(text[:50_000], Characters(text), options, 0, 30)
        spent.setdefault(precision, []).append(time.process_time() - start)
    return min(spent, key=lambda name: min(spent[name]))


class Memory:
    "Runs by name, written after each."

    def __init__(self, path: str | None, identity: dict):
        self.path, self.found = path, {"identity": identity, "runs": {}}
        if path and os.path.exists(path):
            with open(path) as stream:
                kept = json.load(stream)
            if kept["identity"] != identity:
                raise SystemExit(f"{path} belongs to other settings: take another file")
            self.found = kept

    def ask(self, side: str, text: str, options, seed: int, steps: int) -> dict:
        "This run, from the file or made now."
        name = f"{side} {steps} {seed}"
        if name not in self.found["runs"]:
            self.found["runs"][name] = row = run(side, text, options, seed, steps)
            if self.path:
                write_json(self.path, self.found)
            print(f"{side:24} seed {seed:3} {steps:5} steps  {row['loss']:.3f} nats per byte  "
                  f"{row['wall']:6.1f} s  {row['cpu']:6.1f} s of processor", flush=True)
        return self.found["runs"][name]


def main() -> None:
    "The peer once, the lengths of ours, then all sides on all seeds."
    parser = argparse.ArgumentParser()
    parser.add_argument("text")
    parser.add_argument("result", nargs="?")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--precision", choices=("auto", "float32"), default="auto")
    parser.add_argument("--peer", choices=("plain", "transformers"), default="plain")
    parser.add_argument("--peer-steps", type=int, default=2000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", action="store_true", help="peer and ours, without the parts of the gain")
    options = parser.parse_args()
    threads = set_threads(options.threads)
    keep_memory()
    with open(options.text, encoding="utf-8") as stream:
        text = stream.read()
    for side in (PEER, *CHOICES, PEER_PIECES):  # first calls load libraries: outside the clock on both sides
        options.peer_precision = "float32"
        run(side, text[:60_000], options, 0, 3)
    ours = "float32" if options.precision == "float32" else str(training_dtype(torch.device("cpu")))
    identity = {"characters": len(text), "threads": threads, "peer": options.peer, "ours": ours,
                "choices": CHOICES, "rates": RATES}
    memory = Memory(options.result, identity)
    if "peer_precision" not in memory.found:
        memory.found["peer_precision"] = pick_peer_precision(options, text)
    options.peer_precision = memory.found["peer_precision"]
    print(f"{threads} threads; ours in {ours.split('.')[-1]}, peer in {options.peer_precision} "
          f"(the faster for it), {options.peer} model; {len(text):,} characters", flush=True)
    target = memory.ask(PEER, text, options, 0, options.peer_steps)["loss"]
    lengths = {PEER: options.peer_steps}
    for side in [OURS] if options.only else [*CHOICES, PEER_PIECES]:
        for steps in LADDER:
            lengths[side] = steps
            if memory.ask(side, text, options, PILOT_SEED, steps)["loss"] <= target - MARGIN:
                break
    rows = {side: [] for side in lengths}
    for seed in range(options.seeds):
        for side, steps in lengths.items():
            rows[side].append(memory.ask(side, text, options, seed, steps))
    report(rows)


def report(rows: dict[str, list[dict]]) -> None:
    "Medians, spread, and the ratios paired by seed."
    lines, peers = [], rows[PEER]
    for side, runs in rows.items():
        middle = lambda key, runs=runs: statistics.median(run[key] for run in runs)
        wide = lambda key, form, runs=runs: "{} ({} to {})".format(
            *(format(f(r[key] for r in runs), form) for f in (statistics.median, min, max))
        )
        pairs = list(zip(runs, peers, strict=False))
        lines.append({
            "side": side, "seeds": len(runs), "steps": int(middle("steps")),
            "nats per byte": wide("loss", ".3f"), "wall s": wide("wall", ".1f"),
            "processor s": wide("cpu", ".1f"),
            "of the peer's wall": f"1/{statistics.median(p['wall'] / r['wall'] for r, p in pairs):.1f}",
            "of its processor": f"1/{statistics.median(p['cpu'] / r['cpu'] for r, p in pairs):.1f}",
            "as good": f"{sum(r['loss'] <= p['loss'] for r, p in pairs)} of {len(pairs)}",
        })
    print(Table(lines, "whole trainings; medians and range over the seeds"))


if __name__ == "__main__":
    main()
