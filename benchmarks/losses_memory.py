"""Peak memory of the loss: chunked cross-entropy against torch's, at growing vocabularies.

Each side runs one step (loss and both gradients) in a process of its own; what is shown is how far the process grew
beyond states, matrix and labels, and how much of that are the gradients themselves, which nobody can avoid.

    python benchmarks/losses_memory.py [RESULT.json] [--rows 2048] [--width 64]
"""

import argparse
import json
import multiprocessing

import torch
import torch.nn.functional as F

from llmbook.core import Meter, Table, set_seed
from llmbook.losses import causal_cross_entropy


def grow(side: str, vocabulary: int, rows: int, width: int, result: multiprocessing.Queue) -> None:
    "One step in this process; its growth in bytes goes to the queue."
    set_seed(0)
    torch.set_num_threads(1)
    sides = {"torch": lambda s, w, y: F.cross_entropy(F.linear(s, w), y), "llmbook": causal_cross_entropy}
    states = torch.randn(rows, width, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, width)).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,))
    sides[side](states[:8], weight[:64], labels[:8] % 64).backward()  # libraries load here
    states.grad = weight.grad = None
    with Meter() as before:
        pass
    with Meter() as during:
        sides[side](states, weight, labels).backward()
    result.put(during.peak_memory - before.peak_memory)


def measure(vocabulary: int, rows: int, width: int) -> dict:
    "One row of the table."
    context, grown = multiprocessing.get_context("spawn"), {}
    for side in ("torch", "llmbook"):
        queue = context.Queue()
        process = context.Process(target=grow, args=(side, vocabulary, rows, width, queue))
        process.start()
        grown[side] = queue.get(timeout=300) / 1e6
        process.join()
    return {
        "vocabulary": vocabulary, "torch [MB]": grown["torch"], "llmbook [MB]": grown["llmbook"],
        "of which gradients [MB]": 4 * width * (vocabulary + rows) / 1e6, "less by": grown["torch"] / grown["llmbook"],
    }


def main() -> None:
    "Run the comparison and print it."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", help="write the rows as JSON to this file")
    for name, value in (("rows", 2048), ("width", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    rows = [measure(v, options.rows, options.width) for v in (4096, 32768, 131072)]
    print(Table(rows, f"Growth of the process in one step, {options.rows:,} rows of width {options.width}"))
    if options.output:
        with open(options.output, "w", encoding="utf-8") as stream:
            json.dump(rows, stream, indent=1)


if __name__ == "__main__":
    main()
