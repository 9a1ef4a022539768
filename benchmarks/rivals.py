"""Rivals of attention on the same text and budget, and the time per token of each against the length.

    python benchmarks/rivals.py [RESULT.json] [--file TEXT] [--steps 400] [--seeds 2] [--context 128] [--lengths 64 256 1024 4096]

First table: a decoder, an RNN, an LSTM, a GRU and a causal CNN of equal size (within 5 %) read the same windows of numpy's
documentation (or of a text of yours), letter by letter; each is trained at every rate and shown at its best, the mean over
seeds. Second table: microseconds per token of one forward and backward pass of one layer, ours in a loop, torch's kernels,
convolution and attention, taking turns; medians.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path

import torch

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.core import Table, set_seed, set_threads
from llmbook.environment import list_distributions, read_environment
from llmbook.recurrence import (
    AttentionLayer,
    GatedConvolution,
    LayeredModel,
    Recurrent,
    draw_windows,
    held_out_loss,
    match_width,
    train_briefly,
)


def read_text() -> str:
    """Documentation of numpy."""
    packages = [d for d in list_distributions() if d.name == "numpy"]
    return "\n\n".join(page.body for page in read_environment(distributions=packages) if page.kind != "module")


def encode(text: str) -> tuple[torch.Tensor, int]:
    """Letters as ids, and how many there are."""
    letters = {letter: i for i, (letter, _) in enumerate(Counter(text).most_common(127), 1)}
    return torch.tensor([letters.get(letter, 0) for letter in text]), len(letters) + 1


def rivals(v: int, context: int) -> dict:
    """Name -> a function that builds the model."""
    shape = DecoderSettings(v, 2, 64, 4, 4, 176, context)
    wanted = sum(p.numel() for p in Decoder(shape).parameters())
    builds = {
        "RNN": lambda d: LayeredModel(v, d, [Recurrent("rnn", d) for _ in range(2)]),
        "LSTM": lambda d: LayeredModel(v, d, [Recurrent("lstm", d) for _ in range(2)]),
        "GRU": lambda d: LayeredModel(v, d, [Recurrent("gru", d) for _ in range(2)]),
        "causal CNN": lambda d: LayeredModel(v, d, [GatedConvolution(d, 3, 3**i) for i in range(4)]),
    }
    widths = {name: match_width(build, wanted) for name, build in builds.items()}
    found = {name: (lambda build=build, d=widths[name]: build(d)) for name, build in builds.items()}
    return {"decoder": lambda: Decoder(shape), **found}


def compare_losses(text: str, steps: int, seeds: int, context: int, rates: list[float]) -> list[dict]:
    """Held-out loss of every rival at its best rate."""
    ids, v = encode(text)
    cut, rows = len(ids) * 9 // 10, []
    for name, build in rivals(v, context).items():
        found, used = {}, []
        for rate in rates:
            losses = []
            for seed in range(1, seeds + 1):
                set_seed(seed)
                model, start = build(), time.process_time()
                train_briefly(model, draw_windows(ids[:cut], context, seed=seed), steps, rate)
                used.append(time.process_time() - start)
                losses.append(held_out_loss(model, ids[cut:], context, 400))
            found[rate] = losses
        best = min(found, key=lambda rate: statistics.mean(found[rate]))
        rows.append({
            "model": name, "parameters": sum(p.numel() for p in model.parameters()), "tokens": steps * 16 * context,
            "best rate": best, "held-out nats": statistics.mean(found[best]), "all seeds": found[best],
            "CPU seconds": statistics.median(used),
        })
        print(rows[-1], flush=True)
    return rows


def compare_times(lengths: list[int], rounds: int, width: int = 64) -> list[dict]:
    """Microseconds per token, forward and backward, all sides taking turns."""
    layers = {
        "LSTM, our loop": Recurrent("lstm", width, fused=False), "LSTM, torch's kernel": Recurrent("lstm", width),
        "GRU, torch's kernel": Recurrent("gru", width), "RNN, torch's kernel": Recurrent("rnn", width),
        "causal CNN": GatedConvolution(width), "attention": AttentionLayer(width, 4),
    }
    rows = []
    for t in lengths:
        x, spent = torch.randn(1, t, width), {name: [] for name in layers}
        for turn in range(rounds + 1):
            for name, layer in layers.items():
                start = time.perf_counter()
                layer(x)[0].sum().backward()
                if turn:
                    spent[name].append((time.perf_counter() - start) / t * 1e6)
        rows.append({"tokens": t, **{name: statistics.median(times) for name, times in spent.items()}})
    return rows


def main() -> None:
    """Run both comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--file")
    for name, value in (("steps", 400), ("seeds", 2), ("context", 128), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 1e-2])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024, 4096])
    own = parser.parse_args()
    set_threads(own.threads)
    text = Path(own.file).read_text(encoding="utf-8") if own.file else read_text()
    times = compare_times(own.lengths, own.rounds)
    print(Table(times, "Microseconds per token, forward and backward, one text, one layer of width 64"))
    losses = compare_losses(text, own.steps, own.seeds, own.context, own.rates)
    shown = [{name: value for name, value in row.items() if name != "all seeds"} for row in losses]
    print(Table(shown, f"Equal parameters, windows of {own.context} letters, {own.seeds} seeds, each at its best rate"))
    if own.result:
        Path(own.result).write_text(json.dumps({"losses": losses, "times": times}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
