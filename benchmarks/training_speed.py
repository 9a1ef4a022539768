"""Training tokens per second: our loop against nanoGPT's and transformers' Trainer.

Equal depth, width, heads, vocabulary and rows; every side in its own process with both cores, as its users start it,
one after another and again (A B C A B C …). The first steps do not count. nanoGPT's loop is stated here in our own words:
a model of GPT-2's shape, AdamW fused, batches cut from a memory map at random places, the gradient clipped, the loss read
each step. Each peer runs in float32, its default on a processor; where the processor is fast in bfloat16, also in that,
which its users have to ask for. Ours chooses by itself, and is forced to float32 beside it. On a machine that others use,
two threads wait for each other most of the time: `--threads 1` and the processor's seconds say more there.
    python benchmarks/training_speed.py [RESULT.json] [--rounds 3] [--steps 16] [--threads 2] [--sides …]
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

V, DEPTH, WIDTH, HEADS, CONTEXT, ROWS = 4096, 4, 192, 3, 256, 8
SIDES = {  # name: program, precision, environment, the side it is compared with
    "llmbook": ("ours", "auto", {}, ""),
    "llmbook, memory given back": ("ours", "auto", {"LLMBOOK_KEEP_MEMORY": "0"}, ""),
    "llmbook, AdamW": ("ours adamw", "auto", {}, ""),
    "llmbook float32": ("ours", "float32", {}, ""),
    "llmbook float32, memory given back": ("ours", "float32", {"LLMBOOK_KEEP_MEMORY": "0"}, ""),
    "llmbook float32, AdamW": ("ours adamw", "float32", {}, ""),
    "nanoGPT float32": ("nanogpt", "float32", {}, ""),
    "nanoGPT bfloat16": ("nanogpt", "bfloat16", {}, ""),
    "Trainer float32": ("trainer", "float32", {}, ""),
    "Trainer bfloat16": ("trainer", "bfloat16", {}, ""),
}
SKIP = 3  # steps that do not count


class Clock:
    "Wall and processor time between the beginnings of two steps."

    def __init__(self, steps: int):
        self.steps, self.marks = steps, {}

    def tick(self, step: int) -> None:
        "A step begins."
        self.marks.setdefault(step, (time.perf_counter(), time.process_time()))

    def read(self) -> dict:
        "Tokens per second, and processor seconds per thousand tokens."
        (wall, cpu), (end, spent) = self.marks[SKIP], self.marks[self.steps - 1]
        tokens = (self.steps - 1 - SKIP) * ROWS * CONTEXT
        return {"tokens_per_second": tokens / (end - wall), "cpu_per_thousand": 1000 * (spent - cpu) / tokens}


def make_tokens(count: int):
    "The same random tokens for every side."
    import numpy as np

    return np.random.default_rng(0).integers(0, V, count, np.uint16)


def run_ours(steps: int, precision: str, clock: Clock, optimiser: str) -> None:
    "`llmbook.training.train`."
    from llmbook.architecture import Decoder, DecoderSettings
    from llmbook.objectives import Autoregressive
    from llmbook.optimisation import TrainSettings
    from llmbook.training import train

    class Timed(Autoregressive):
        def batch(self, step: int) -> dict:
            clock.tick(step)
            return super().batch(step)

    model = Decoder(DecoderSettings(V, DEPTH, WIDTH, HEADS, HEADS, 512, CONTEXT))
    settings = TrainSettings(steps=steps, precision=precision, optimiser=optimiser, checkpoint_every=10**6, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        objective = Timed(make_tokens((steps + 2) * ROWS * (CONTEXT + 1)), CONTEXT, ROWS)
        objective.batch(0)
        clock.marks.clear()
        train(model, objective, settings, folder, watch_every=10**6)


def make_gpt():
    "A model of GPT-2's shape, as small as it can be written."
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
            self.heads, self.join = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x):
            b, t, d = x.shape
            parts = self.heads(self.before(x)).split(d, 2)
            q, k, v = (part.view(b, t, HEADS, d // HEADS).transpose(1, 2) for part in parts)
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.join(seen.transpose(1, 2).contiguous().view(b, t, d))
            return x + self.down(F.gelu(self.up(self.after(x))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(V, WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.layers, self.last = nn.ModuleList(Layer() for _ in range(DEPTH)), nn.LayerNorm(WIDTH, bias=False)
            self.head = nn.Linear(WIDTH, V, bias=False)
            self.words.weight = self.head.weight
            self.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Linear | nn.Embedding) else None)

        def forward(self, ids, targets):
            x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
            for layer in self.layers:
                x = layer(x)
            return F.cross_entropy(self.head(self.last(x)).view(-1, V), targets.view(-1), ignore_index=-1)

    return Model()


def run_nanogpt(steps: int, precision: str, clock: Clock) -> None:
    "nanoGPT's loop on a processor."
    import math

    import numpy as np
    import torch

    model = make_gpt().train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    cast = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder:
        make_tokens(steps * ROWS * CONTEXT * 4).tofile(Path(folder) / "train.bin")

        def fetch():
            data = np.memmap(Path(folder) / "train.bin", np.uint16, "r")
            places = torch.randint(len(data) - CONTEXT, (ROWS,))
            cut = lambda shift: torch.stack([
                torch.from_numpy(data[i + shift : i + shift + CONTEXT].astype(np.int64)) for i in places
            ])
            return cut(0), cut(1)

        batch = fetch()
        for step in range(steps):
            clock.tick(step)
            for group in optimiser.param_groups:
                group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
            with cast:
                loss = model(*batch)
            batch = fetch()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            loss.item()


def run_trainer(steps: int, precision: str, clock: Clock) -> None:
    "transformers' Trainer with its defaults, on its Llama of the same shape."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, num_hidden_layers=DEPTH, hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=512,
        tie_word_embeddings=True, max_position_embeddings=CONTEXT,
    ))
    rows = torch.from_numpy(make_tokens(steps * ROWS * CONTEXT).astype("int64")).view(-1, CONTEXT)

    class Timer(TrainerCallback):
        def on_step_begin(self, arguments, state, control, **rest):
            clock.tick(state.global_step)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=ROWS, report_to=[], use_cpu=True, bf16=precision == "bfloat16",
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model, arguments, train_dataset=data, callbacks=[Timer()]).train()


def measure(side: str, steps: int, threads: int) -> dict:
    "One side, in this process."
    from llmbook.core import set_threads

    program, precision, *_ = SIDES[side]
    threads, clock = set_threads(threads or None), Clock(steps)
    if program == "nanogpt":
        run_nanogpt(steps, precision, clock)
    elif program == "trainer":
        run_trainer(steps, precision, clock)
    else:
        run_ours(steps, precision, clock, "adamw" if "adamw" in program else "muon")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return clock.read() | {"threads": threads, "peak_gigabytes": usage.ru_maxrss / 1e6, "faults": usage.ru_minflt}


def main() -> None:
    "Interleave the sides; print medians, spread and ratios."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--sides", nargs="+", choices=sorted(SIDES), help="default: all that this processor is fast at")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.steps, options.threads)))
        return
    import torch

    from llmbook.core import Table, choose_dtype, write_json

    fast = choose_dtype(torch.device("cpu")) == torch.bfloat16
    sides = options.sides or [name for name, (_, kind, *_) in SIDES.items() if fast or kind != "bfloat16"]
    found = {side: [] for side in sides}
    for turn in range(options.rounds):
        for side in sides:
            command = [sys.executable, __file__, "--side", side, "--steps", str(options.steps)]
            command += ["--threads", str(options.threads)]
            threads = str(options.threads or os.cpu_count())
            env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads} | SIDES[side][2]
            text = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
            found[side].append(json.loads(text.splitlines()[-1]))
        print(f"round {turn + 1} of {options.rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    middle = lambda side, key: statistics.median(run[key] for run in found[side])
    rows = [
        {"side": side, "tokens/s": round(middle(side, "tokens_per_second")),
         "from": round(min(run["tokens_per_second"] for run in found[side])),
         "to": round(max(run["tokens_per_second"] for run in found[side])),
         "CPU-s per 1,000": round(middle(side, "cpu_per_thousand"), 3),
         "peak [GB]": round(middle(side, "peak_gigabytes"), 2), "page faults": round(middle(side, "faults"))}
        for side in sides
    ]
    print(Table(rows))
    ratios = [
        {"ours": ours, "peer": peer,
         "tokens/s": round(middle(ours, "tokens_per_second") / middle(peer, "tokens_per_second"), 2),
         "CPU": round(middle(peer, "cpu_per_thousand") / middle(ours, "cpu_per_thousand"), 2),
         "in single rounds": " ".join(f"{a['tokens_per_second'] / b['tokens_per_second']:.2f}"
                                      for a, b in zip(found[ours], found[peer], strict=True)),
         "goal": {"nanoGPT": "1.15", "Trainer": "1.25"}.get(peer.split()[0], "")}
        for ours in ("llmbook", "llmbook float32") if ours in sides
        for peer in sides if not peer.startswith("llmbook") or peer.startswith(f"{ours}, ")
    ]
    print(Table(ratios))
    if options.result:
        write_json(Path(options.result), {"runs": found, "rows": rows, "ratios": ratios})


if __name__ == "__main__":
    main()
