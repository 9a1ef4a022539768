"""Repeated spans, semantic duplicates and contamination: ours against plain Python and NumPy, interleaved.

    python benchmarks/redundancy.py [RESULT.json] [--megabytes 4] [--rounds 3]

Repeated spans: a dictionary of windows of 50 words, which marks the same words (checked).
Contamination: sets of 13-grams of every document against an index of those of 500 items, of which 20 are planted;
the same matches (checked).
Semantic duplicates: all pairs by one matrix product; recall is the share of the pairs above the threshold of which
at least one text is dropped by comparing within clusters.
"""

import argparse
import json
import re
import statistics
import time
from collections import defaultdict

import numpy

from llmbook.core import Table
from llmbook.environment import read_environment
from llmbook.redundancy import find_contamination, find_repeats, find_semantic_duplicates, hash_vectors


def by_dictionary(texts: list[str], length: int = 50) -> int:
    """How many words lie in a window that stands further up."""
    first, total = {}, 0
    for number, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        marks = bytearray(len(words))
        for i in range(len(words) - length + 1):
            place = first.setdefault(tuple(words[i : i + length]), (number, i))
            if place[0] < number or place[1] + length <= i:
                marks[i : i + length] = b"\1" * length
        total += sum(marks)
    return total


def by_windows(texts: list[str]) -> int:
    """The same number, by ours."""
    found = find_repeats(texts, 50)
    return sum(len(re.findall(r"\w+", texts[span.text][span.start : span.end])) for span in found)


def by_sets(texts: list[str], items: list[str], n: int = 13) -> set[tuple[int, str]]:
    """Documents and items that share n words in a row."""
    runs = lambda words: {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    index = defaultdict(list)
    for name, item in enumerate(items):
        for gram in runs(re.findall(r"\w+", item.lower())):
            index[gram].append(str(name))
    grams = ((number, runs(re.findall(r"\w+", text.lower()))) for number, text in enumerate(texts))
    return {(number, name) for number, held in grams for gram in held for name in index.get(gram, ())}


def race(sides: dict, rounds: int) -> tuple[dict, dict]:
    """Results and median CPU seconds of functions that take turns."""
    seconds, results = {name: [] for name in sides}, {}
    for _ in range(rounds):
        for name, function in sides.items():
            start = time.process_time()
            results[name] = function()
            seconds[name].append(time.process_time() - start)
    return results, {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--megabytes", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    texts, items, size = [], [], 0
    for document in read_environment(share=2e6):
        if size > arguments.megabytes * 1e6 and len(items) == 500:
            break
        if len(document.body) < 100 or not document.body.isascii():
            continue
        if size <= arguments.megabytes * 1e6:
            texts.append(document.body)
            size += len(document.body)
        elif len(words := document.body.split()) > 60:
            items.append(" ".join(words[10:60]))
    for i, item in enumerate(items[::25]):
        texts[i] += f" {item}"  # leaks
    rows = []

    def tell(work: str, taken: dict[str, float], note: str) -> None:
        ours = taken["ours"]
        for name, cpu in taken.items():
            rows.append({"work": work, "side": name, "CPU seconds": cpu, "MB per CPU second": size / 1e6 / cpu,
                         "times ours": cpu / ours, "result": note if name == "ours" else ""})  # fmt: skip

    found, taken = race({"ours": lambda: by_windows(texts), "dictionary": lambda: by_dictionary(texts)}, arguments.rounds)
    assert found["ours"] == found["dictionary"], found
    tell("repeated spans of 50 words", taken, f"{found['ours']:,} words, equal")

    search = lambda: {(match.document, match.item) for match in find_contamination(texts, items)}
    sides = {"ours": search, "sets": lambda: by_sets(texts, items)}
    found, taken = race(sides, arguments.rounds)
    assert found["ours"] == found["sets"]
    tell(f"{len(items)} test items, 13 words", taken, f"{len(found['ours']):,} matches, equal")

    vectors = hash_vectors(texts)

    def all_pairs() -> list[numpy.ndarray]:
        blocks = range(0, len(vectors), 1000)
        return [numpy.argwhere(numpy.triu(vectors[i : i + 1000] @ vectors.T, i + 1) > 0.95) + [i, 0] for i in blocks]

    sides = {"ours": lambda: find_semantic_duplicates(vectors, 0.05), "all pairs": all_pairs}
    found, taken = race(sides, arguments.rounds)
    pairs = numpy.concatenate(found["all pairs"])
    recall = found["ours"][pairs].any(1).mean()
    tell(f"{len(texts):,} vectors of {vectors.shape[1]}", taken, f"recall of the pairs {recall:.3f}")

    letter = time.process_time()
    find_repeats(["a" * 1_000_000], 50, "bytes")
    one = time.process_time() - letter
    rows.append({"work": "a megabyte of one letter, bytes", "side": "ours", "CPU seconds": one, "MB per CPU second": 1 / one})
    print(Table(rows, f"{len(texts):,} texts, {size / 1e6:.1f} MB, {arguments.rounds} rounds, medians"))
    if arguments.result:
        with open(arguments.result, "w", encoding="utf-8") as stream:
            json.dump(rows, stream, indent=1)


if __name__ == "__main__":
    main()
