"""Near-duplicate removal: ours against datasketch's usual loop and its batch generator, interleaved.

    python benchmarks/near_duplicates.py [RESULT.json] [--documents 3000] [--rounds 3]

All three take the same texts, words in threes, 128 permutations and threshold 0.8, and give a cluster label per text.
F1 compares the removed texts with those that comparing all pairs of a sample exactly removes.
"""

import argparse
import json
import re
import statistics
import time

import datasketch
import numpy

from llmbook.core import Table
from llmbook.duplicates import _join, find_near_duplicates, hash_shingles, jaccard
from llmbook.environment import list_distributions, read_environment


def shingles(text: str, width: int = 3) -> set[bytes]:
    """The runs of words of a text, as bytes."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + width]).encode() for i in range(max(1, len(words) - width + 1))}


def cluster(signs: list, threshold: float) -> numpy.ndarray:
    """Cluster labels by datasketch's search."""
    search, pairs = datasketch.MinHashLSH(threshold=threshold, num_perm=128), []
    for i, sign in enumerate(signs):
        pairs += [(i, int(j)) for j in search.query(sign)]
        search.insert(str(i), sign, check_duplication=False)
    return _join(pairs, len(signs))


def by_loop(texts: list[str]) -> numpy.ndarray:
    """datasketch as its documentation shows it: one update per shingle."""
    signs = []
    for text in texts:
        sign = datasketch.MinHash(num_perm=128)
        for shingle in shingles(text):
            sign.update(shingle)
        signs.append(sign)
    return cluster(signs, 0.8)


def by_generator(texts: list[str]) -> numpy.ndarray:
    """datasketch's batch form."""
    return cluster(list(datasketch.MinHash.generator(map(shingles, texts), num_perm=128)), 0.8)


def all_pairs(texts: list[str], threshold: float = 0.8) -> numpy.ndarray:
    """The exact answer."""
    hashes, offsets = hash_shingles(texts)
    sets = [hashes[offsets[i] : offsets[i + 1]] for i in range(len(texts))]
    sizes = numpy.diff(offsets)
    pairs = []
    for a in range(len(texts)):
        near = (sizes[:a] >= threshold * sizes[a]) & (sizes[a] >= threshold * sizes[:a]) & (sizes[:a] > 0)
        pairs += [(a, b) for b in numpy.flatnonzero(near).tolist() if jaccard(sets[a], sets[b]) >= threshold]
    return _join(pairs, len(texts))


def f1(truth: numpy.ndarray, labels: numpy.ndarray) -> float:
    """F1 of the removed texts."""
    wanted, found = (set(numpy.flatnonzero(x != numpy.arange(len(x))).tolist()) for x in (truth, labels))
    return 2 * len(wanted & found) / (len(wanted) + len(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    packages = [d for d in list_distributions() if d.name in ("numpy", "pandas", "transformers")]
    texts = [d.body for d in read_environment(distributions=packages) if len(d.body) > 40]
    texts = texts[:: max(1, len(texts) // arguments.documents)][: arguments.documents]
    sides = {"ours": find_near_duplicates, "datasketch, loop": by_loop, "datasketch, generator": by_generator}
    seconds, labels = {name: [] for name in sides}, {}
    for _ in range(arguments.rounds):
        for name, function in sides.items():
            start = time.process_time(), time.perf_counter()
            labels[name] = function(texts)
            seconds[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    truth, rows = all_pairs(texts), []
    ours = statistics.median(cpu for cpu, _ in seconds["ours"])
    for name, taken in seconds.items():
        cpu, wall = (statistics.median(column) for column in zip(*taken, strict=True))
        ratios = sorted(other[0] / mine[0] for other, mine in zip(taken, seconds["ours"], strict=True))
        rows.append({
            "side": name, "documents per CPU second": len(texts) / cpu, "CPU seconds": cpu, "wall seconds": wall,
            "times ours": cpu / ours, "range": f"{ratios[0]:.1f}–{ratios[-1]:.1f}", "F1": f1(truth, labels[name]),
        })
    print(Table(rows, f"Near-duplicates among {len(texts)} documents, {arguments.rounds} rounds, medians"))
    if arguments.result:
        with open(arguments.result, "w", encoding="utf-8") as stream:
            json.dump({"documents": len(texts), "rows": rows}, stream, indent=1)


if __name__ == "__main__":
    main()
