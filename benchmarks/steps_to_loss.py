"""Steps to equal held-out loss: Muon against AdamW, architecture, data, batch and first weights fixed.

Both sides get the same budget of tuning: coordinate by coordinate over the same grid (rate of the
matrices, rate of the tables, warm-up, start, averaging, weight decay, fall, and the rates once more,
finer), on a seed of its own. AdamW too
may have two rates, one for the matrices and one for embeddings and norms: that is its largest gain.
Then both train whole runs, each with its own schedule, at several lengths and on fresh seeds. The
steps a side needs to the target, AdamW's mean loss at its third length, are read off its curve for
each seed (straight lines over the logarithm of the steps); the ratio is paired by seed.
    python benchmarks/steps_to_loss.py [TEXT] [--result RESULT.json] [--seeds 5] [--threads 1]
Without a text it takes documentation of the standard library. A result file that exists is gone on with.
"""

import argparse
import json
import math
import os
import random
import statistics
import time

import numpy as np
import torch

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.core import Table, set_seed, set_threads, write_json
from llmbook.environment import read_environment
from llmbook.objectives import Autoregressive, heldout_bits_per_byte
from llmbook.optimisation import Muon, keep_memory, matrix_parts, training_dtype
from llmbook.architecture import initialise_weights
from llmbook.tokenization import BytePairs, train_bpe

SHAPE = {"depth": 2, "width": 128, "heads": 2, "hidden": 384, "context": 64}
VOCABULARY, ROWS, SWEEP_SEED = 1024, 16, 100
SIDES, LENGTHS = ("AdamW", "Muon"), (0.7, 0.95, 1.25, 1.7)  # of the final runs, in lengths of the sweep
FALLS = ("linear", "cosine", "stable, then linear")
GRID = {  # the same for both sides: a step of Muon is scaled to the size of AdamW's
    "matrix_rate": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "table_rate": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
    "warmup": (0.02, 0.1, 0.3),
    "start": ("zeroed outputs", "as GPT-2"),
    "averaging": (0, 1, 2, 3),
    "weight_decay": (0.0, 0.1, 0.5),
    "fall": FALLS,
}
REFINE = (1 / math.sqrt(2), 1.0, math.sqrt(2))  # a second look at the two rates
AVERAGING = {  # the past's share: AdamW's two betas; Muon's momentum and the betas of the tables
    "AdamW": ((0.9, 0.95), (0.9, 0.99), (0.8, 0.95), (0.6, 0.95)),
    "Muon": ((0.95, 0.9, 0.95), (0.9, 0.8, 0.95), (0.95, 0.8, 0.95), (0.85, 0.6, 0.95)),
}
START = {
    "matrix_rate": 4e-3, "table_rate": 1e-2, "warmup": 0.1, "start": "zeroed outputs",
    "averaging": 0, "weight_decay": 0.0, "fall": "linear",
}


class Corpus:
    "A text as byte pairs learnt on its first nine tenths; the last tenth is held out."

    def __init__(self, text: str, vocabulary: int = VOCABULARY):
        cut = len(text) * 9 // 10
        tokenizer = BytePairs(train_bpe([text[:cut]], vocabulary) if vocabulary else [])
        self.vocabulary, self.tokenizer = len(tokenizer.tokens), tokenizer
        self.learn = np.array(tokenizer.encode(text[:cut]), np.uint16)
        self.tokens = np.array(tokenizer.encode(text[cut:]), np.uint16)
        self.bytes = len(text[cut:].encode())


def read_text(path: str | None, size: int = 1_100_000) -> str:
    "A file, or documentation of the standard library in a shuffled order."
    if path:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    texts = [one.text for one in read_environment(distributions=[None])]
    random.Random(0).shuffle(texts)
    return "\n\n".join(texts)[:size]


def factor(step: int, steps: int, warmup: float, fall: str) -> float:
    "Share of the peak rate."
    left = (steps - step) / steps
    if fall == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    if fall == "stable, then linear":
        left = min(1.0, left / 0.5)
    return min((step + 1) / max(1.0, warmup * steps), left, 1.0)


def share_out(model: torch.nn.Module) -> tuple[dict, list]:
    "The matrices inside the blocks with their parts, and the tables: everything else."
    matrices = {}
    for module in model.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            matrices[module.weight] = None
        if parts := matrix_parts(module):
            matrices.update(parts)
    return matrices, [p for p in model.parameters() if p not in matrices]


def make_optimisers(model: torch.nn.Module, side: str, choice: dict) -> list:
    "AdamW with two rates, or Muon for the matrices and AdamW for the tables."
    matrices, tables = share_out(model)
    decay, averaging = choice["weight_decay"], AVERAGING[side][choice["averaging"]]
    momentum, betas = averaging[0], averaging[-2:]
    groups = [{"params": tables, "lr": choice["table_rate"], "weight_decay": 0.0}]
    if side == "AdamW":
        rate = choice["matrix_rate"]
        groups.append({"params": list(matrices), "lr": rate, "weight_decay": decay})
        return [torch.optim.AdamW(groups, betas=betas, fused=True)]
    pieces = [{"params": [p], "parts": parts} for p, parts in matrices.items()]
    dtype = training_dtype(torch.device("cpu"))
    muon = Muon(pieces, choice["matrix_rate"], momentum, weight_decay=decay, dtype=dtype)
    return [torch.optim.AdamW(groups, betas=betas, fused=True), muon]


def learn(model, objective, optimisers: list, steps: int, rate, batch=None) -> dict:
    "Train in the fixed setting; `rate` gives the share of the peak at a step."
    peaks = [[group["lr"] for group in one.param_groups] for one in optimisers]
    narrow = training_dtype(torch.device("cpu")) == torch.bfloat16
    cpu = time.process_time()
    for step in range(steps):
        rows = (batch or objective.batch)(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = objective.loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one, rates in zip(optimisers, peaks, strict=True):
            for group, peak in zip(one.param_groups, rates, strict=True):
                group["lr"] = peak * rate(step)
            one.step()
            one.zero_grad(set_to_none=True)
    return {"cpu": time.process_time() - cpu}


def run(corpus: Corpus, side: str, choice: dict, steps: int, seed: int) -> dict:
    "One whole training; its held-out bits per byte."
    set_seed(seed)
    model = Decoder(DecoderSettings(
        corpus.vocabulary, SHAPE["depth"], SHAPE["width"], SHAPE["heads"], SHAPE["heads"],
        SHAPE["hidden"], SHAPE["context"],
    ))
    if choice["start"] == "zeroed outputs":
        initialise_weights(model)
    objective = Autoregressive(corpus.learn, SHAPE["context"], ROWS, seed)
    rate = lambda step: factor(step, steps, choice["warmup"], choice["fall"])
    spent = learn(model, objective, make_optimisers(model, side, choice), steps, rate)
    loss = heldout_bits_per_byte(model, corpus, rows=64)
    return spent | {"loss": loss if math.isfinite(loss) else 99.0}


class Memory:
    "Results by name, kept in a file after each run."

    def __init__(self, path: str | None, identity: dict):
        self.path, self.found = path, {"identity": identity, "runs": {}}
        if path and os.path.exists(path):
            with open(path) as stream:
                kept = json.load(stream)
            if kept.get("identity") != identity:
                raise SystemExit(f"{path} belongs to another text or setting: take another file")
            self.found = kept

    def ask(self, name: str, work) -> dict:
        "The result of this name, from the file or made now."
        if name not in self.found["runs"]:
            self.found["runs"][name] = work()
            self.save()
        return self.found["runs"][name]

    def save(self) -> None:
        "Write everything."
        if self.path:
            write_json(self.path, self.found)


def sweep(memory: Memory, corpus: Corpus, side: str, steps: int) -> tuple[dict, int]:
    "Tune coordinate by coordinate, the two rates twice; the best choice and the number of runs."
    choice, tried = dict(START), {}

    def score(candidate: dict) -> float:
        key = f"{side} " + " ".join(f"{k}={v}" for k, v in candidate.items())
        work = lambda: run(corpus, side, candidate, steps, SWEEP_SEED)
        tried[key] = memory.ask(f"sweep {key}", work)["loss"]
        return tried[key]

    for place, axis in enumerate((*GRID, "matrix_rate", "table_rate")):
        values = GRID[axis]
        if place >= len(GRID):
            values = [float(f"{choice[axis] * share:.2g}") for share in REFINE]
        losses = {value: score(choice | {axis: value}) for value in values}
        choice[axis] = min(losses, key=losses.get)
        names = {value: AVERAGING[side][value] for value in GRID[axis]} if axis == "averaging" else {}
        shown = "  ".join(f"{names.get(value, value)}: {loss:.4f}" for value, loss in losses.items())
        print(f"{side:6} {axis:13} {shown}", flush=True)
    return choice, len(tried)


def steps_needed(curve: dict[int, float], target: float) -> float:
    "Steps at which a curve reaches the target, by straight lines over log steps."
    lengths = sorted(curve)
    place = next((i for i, n in enumerate(lengths) if curve[n] <= target), len(lengths) - 1)
    low, high = lengths[max(0, place - 1)], lengths[max(1, place)]
    slope = (curve[high] - curve[low]) / math.log(high / low)
    return low * math.exp((target - curve[low]) / slope) if slope < 0 else math.inf


def interval(ratios: list[float]) -> tuple[float, float, float]:
    "Geometric mean and its 95 % interval by a t distribution of the paired logarithms."
    from scipy.stats import t

    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(middle), math.nan, math.nan
    half = t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return tuple(math.exp(value) for value in (middle, middle - half, middle + half))


def main() -> None:
    "Sweep both, then compare on fresh seeds."
    parser = argparse.ArgumentParser()
    parser.add_argument("text", nargs="?")
    parser.add_argument("--result")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="small matrices gain little from two")
    parser.add_argument("--steps", type=int, default=160, help="of each run of the sweep")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="tokens; 0: bytes")
    options = parser.parse_args()
    set_threads(options.threads)
    keep_memory()
    text = read_text(options.text)
    corpus = Corpus(text, options.vocabulary)
    lengths = [round(share * options.steps) for share in LENGTHS]
    identity = {"characters": len(text), "shape": SHAPE, "rows": ROWS, "steps": options.steps}
    if options.vocabulary != VOCABULARY:
        identity["vocabulary"] = options.vocabulary
    memory = Memory(options.result, identity)
    print(f"{SHAPE}, vocabulary {corpus.vocabulary}, {ROWS} rows a step, "
          f"{training_dtype(torch.device('cpu'))}; sweep of {options.steps} steps")
    chosen, curves = {}, {}
    for side in SIDES:
        chosen[side], count = sweep(memory, corpus, side, options.steps)
        print(f"{side}: {chosen[side]} of {count} runs", flush=True)
    for seed in range(options.seeds):
        for side in SIDES:
            for steps in lengths:
                work = lambda: run(corpus, side, chosen[side], steps, seed)  # noqa: B023
                name = f"final {side} {chosen[side]} {steps} {seed}"
                curves.setdefault((side, seed), {})[steps] = memory.ask(name, work)["loss"]
    report(memory, chosen, curves, options.seeds, lengths)


def report(memory: Memory, chosen: dict, curves: dict, seeds: int, lengths: list[int]) -> None:
    "Mean curves, the steps to the target, the ratio and its interval."
    rows = []
    for side in SIDES:
        for steps in lengths:
            losses = [curves[side, seed][steps] for seed in range(seeds)]
            spread = statistics.stdev(losses) if seeds > 1 else math.nan
            mean = statistics.fmean(losses)
            rows.append({"side": side, "steps": steps, "bits per byte": f"{mean:.4f}", "± seed": f"{spread:.4f}"})
    print(Table(rows))
    middle = lengths[2]
    target = statistics.fmean(curves["AdamW", seed][middle] for seed in range(seeds))
    needs = {side: [steps_needed(curves[side, s], target) for s in range(seeds)] for side in SIDES}
    ratios = [a / m for a, m in zip(needs["AdamW"], needs["Muon"], strict=True)]
    mean, low, high = interval(ratios)
    for side in SIDES:
        print(f"{side:6} steps to {target:.4f} by seed: {[round(n) for n in needs[side]]}")
    print(f"AdamW needs {mean:.2f} x the steps of Muon (95 % interval {low:.2f} to {high:.2f}, "
          f"{seeds} seeds; each seed: {[round(r, 2) for r in ratios]})")
    memory.found["chosen"] = chosen
    memory.found["ratio"] = {"mean": mean, "low": low, "high": high, "by seed": ratios}
    memory.save()


if __name__ == "__main__":
    main()
