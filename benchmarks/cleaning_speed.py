"""Cleaning: all steps of ours against ftfy alone, interleaved, on clean documentation; and what each step costs and changes.

    python benchmarks/cleaning_speed.py [RESULT.json] [--rounds 5] [--megabytes 10]
"""

import argparse
import json
import statistics
import time

import ftfy

from llmbook.cleaning import CLEANERS, clean_text
from llmbook.core import Table
from llmbook.environment import list_distributions, read_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=10)
    arguments = parser.parse_args()
    texts, size = [], 0
    for document in read_environment(distributions=[None, *list_distributions()]):
        texts.append(document.text)
        size += len(document.text.encode("utf-8", "replace"))
        if size > 1e6 * arguments.megabytes:
            break
    sides = {"all steps": clean_text, "ftfy alone": ftfy.fix_text, **{f"only: {name}": step for name, step in CLEANERS.items()}}
    seconds, changed = {name: [] for name in sides}, {}
    for _ in range(arguments.rounds):
        for name, function in sides.items():
            start = time.process_time()
            after = [function(text) for text in texts]
            seconds[name].append(time.process_time() - start)
            changed[name] = sum(a != b for a, b in zip(texts, after, strict=True))
    rows = []
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        ratios = sorted(a / b for a, b in zip(taken, seconds["all steps"], strict=True))
        rows.append({
            "side": name, "MB per CPU second": size / 1e6 / middle, "times the time of all steps": statistics.median(ratios),
            "range": f"{ratios[0]:.2f}–{ratios[-1]:.2f}", "texts changed": changed[name],
        })
    print(Table(rows, f"{len(texts)} texts, {size / 1e6:.1f} MB, {arguments.rounds} rounds"))
    if arguments.result:
        with open(arguments.result, "w", encoding="utf-8") as stream:
            json.dump({"texts": len(texts), "megabytes": size / 1e6, "rows": rows}, stream, indent=1)


if __name__ == "__main__":
    main()
