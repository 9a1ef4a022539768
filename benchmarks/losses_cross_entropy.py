"""Cross-entropy in chunks against torch's over all the logits: one step, both gradients, several vocabularies.

The sides take turns; medians of wall and processor seconds are shown.

    python benchmarks/losses_cross_entropy.py [--rows 2048] [--width 256] [--rounds 9] [--output FILE]
"""

import argparse
import json
import os
import statistics
import time

import torch
import torch.nn.functional as F

from llmbook.core import Table, set_seed, set_threads
from llmbook.losses import causal_cross_entropy


def whole(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    "Torch's loss over all the logits."
    return F.cross_entropy(F.linear(states, weight), labels)


def measure(vocabulary: int, rows: int, width: int, rounds: int) -> dict:
    "One row of the table."
    states = torch.randn(rows, width, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, width)).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,))
    sides = {"torch": whole, "llmbook": causal_cross_entropy}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(rounds + 2):
        for name, loss in sides.items():
            states.grad = weight.grad = None
            start, used = time.perf_counter(), time.process_time()
            loss(states, weight, labels).backward()
            if step >= 2:  # the first two warm up
                wall[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - used)
    ratios = [a / b for a, b in zip(processor["torch"], processor["llmbook"], strict=True)]
    return {
        "vocabulary": vocabulary,
        "torch [ms]": 1e3 * statistics.median(wall["torch"]),
        "llmbook [ms]": 1e3 * statistics.median(wall["llmbook"]),
        "faster by (wall)": statistics.median(wall["torch"]) / statistics.median(wall["llmbook"]),
        "faster by (CPU)": statistics.median(ratios),
        "spread (CPU)": f"{min(ratios):.2f}–{max(ratios):.2f}",
    }


def main() -> None:
    "Run the comparison and print it."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("rows", 2048), ("width", 256), ("rounds", 9), ("threads", os.cpu_count())):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", help="write the rows as JSON to this file")
    options = parser.parse_args()
    set_seed(0)
    set_threads(options.threads)
    rows = [measure(v, options.rows, options.width, options.rounds) for v in (512, 4096, 32000)]
    print(Table(rows, f"Loss and both gradients, {options.rows:,} rows of width {options.width}"))
    if options.output:
        with open(options.output, "w", encoding="utf-8") as stream:
            json.dump(rows, stream, indent=1)


if __name__ == "__main__":
    main()
