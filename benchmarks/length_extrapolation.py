"""Kinds of position trained on short texts and tested on long ones, over several seeds.

    python benchmarks/length_extrapolation.py [RESULT.json] [--seeds 3] [--steps 120] [--file TEXT]

Two tasks: the next letter of documentation (or of a text of yours), and a planted one in which the token at each place repeats
the one twelve places before, with fresh tokens now and then, so that only a model that sees distances can do it.
Every kind has the same shape, weights at the start (up to its own), texts and steps. The spread is over seeds.
"""

import argparse
import json
from pathlib import Path
from typing import get_args

import torch

from llmbook.core import Table
from llmbook.environment import list_distributions, read_environment
from llmbook.positions import PositionKind, PositionSettings, compare_positions


def read_text() -> str:
    """Documentation of numpy."""
    packages = [d for d in list_distributions() if d.name == "numpy"]
    pages = read_environment(distributions=packages)
    return "\n\n".join(page.body for page in pages if page.kind != "module")[:1_500_000]


def plant_copies(length: int = 100_000, distance: int = 12, tokens: int = 16) -> torch.Tensor:
    """Token ids that repeat those twelve places before; one block of five starts afresh."""
    ids = torch.randint(0, tokens, (length,), generator=torch.Generator().manual_seed(0))
    for start in range(distance, length, distance):
        if start // distance % 5:
            ids[start : start + distance] = ids[start - distance : start][: len(ids[start : start + distance])]
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--file")
    arguments = parser.parse_args()
    text = Path(arguments.file).read_text(encoding="utf-8") if arguments.file else read_text()
    rows = []
    for task, content in (("next letter", text), ("copy of twelve back", plant_copies())):
        runs = []
        for seed in range(1, arguments.seeds + 1):
            own = PositionSettings(steps=arguments.steps, seed=seed)
            runs.append(compare_positions(content, get_args(PositionKind), own))
        for kind in runs[0]:
            part = lambda first, last: torch.stack([run[kind][first:last].mean() for run in runs])  # noqa: B023
            lost = part(256, 512) - part(32, 64)
            rows.append({
                "task": task, "position": kind, "loss at 32 to 64": part(32, 64).mean().item(),
                "64 to 128": part(64, 128).mean().item(), "256 to 512": part(256, 512).mean().item(),
                "lost": lost.mean().item(), "range of lost": f"{lost.min():.2f} to {lost.max():.2f}",
            })
    print(Table(rows, f"Nats per token, trained on 64, {arguments.steps} steps, {arguments.seeds} seeds"))
    if arguments.result:
        Path(arguments.result).write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
