"""Near-duplicate removal: ours against datasketch's usual loop and its batch generator.

    python benchmarks/near_duplicates.py [RESULT.json] [--documents 3000] [--rounds 3] [--stream 30000]

Ours is what `find_near_duplicates(texts)` does by itself, weighted containment; all three tables hold for it.

Speed: all sides take the same texts, interleaved, and give a cluster label per text. datasketch takes words in threes, 128
permutations and threshold 0.8. Ours runs once more in that setting, and F1 compares the removed texts with those that
comparing all pairs exactly removes at 0.8.

Memory: every side in a process of its own takes the same stream of texts, ours in batches; what counts is the peak above
what the process needed before the first text.

Planted copies: each of some real texts gets one copy, of four kinds in three strengths. The truth is that each copy
belongs to its original and that nothing else belongs together; forms filled in for different functions and different
texts in one frame are there to mislead. F1 of a kind counts its copies as wanted and, as wrong, every misleading or
original text that was joined to another; macro-F1 is the mean over the kinds.
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasketch
import numpy
from handbook import HANDBOOK, read_paragraphs

from llmbook.core import Table, _peak_memory
from llmbook.duplicates import LIKENESSES, DuplicateFinder, _join, find_near_duplicates, hash_shingles, jaccard
from llmbook.environment import list_distributions, read_environment


def shingles(text: str, width: int = 3) -> set[bytes]:
    """The runs of words of a text, as bytes."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + width]).encode() for i in range(max(1, len(words) - width + 1))}


def cluster(signs, threshold: float) -> numpy.ndarray:
    """Cluster labels by datasketch's search."""
    search, pairs, count = datasketch.MinHashLSH(threshold=threshold, num_perm=128), [], 0
    for i, sign in enumerate(signs):
        pairs += [(i, int(j)) for j in search.query(sign)]
        search.insert(str(i), sign, check_duplication=False)
        count = i + 1
    return _join(pairs, count)


def update(texts):
    """A signature per text, one update per shingle, as datasketch's documentation shows it."""
    for text in texts:
        sign = datasketch.MinHash(num_perm=128)
        for shingle in shingles(text):
            sign.update(shingle)
        yield sign


def by_loop(texts, threshold: float = 0.8) -> numpy.ndarray:
    """datasketch, one update per shingle."""
    return cluster(update(texts), threshold)


def by_generator(texts, threshold: float = 0.8) -> numpy.ndarray:
    """datasketch's batch form."""
    return cluster(datasketch.MinHash.generator(map(shingles, texts), num_perm=128), threshold)


def by_batches(texts) -> numpy.ndarray:
    """Ours as it comes, of a stream in batches of 200 texts."""
    threshold, width = LIKENESSES["containment"]
    finder, texts = DuplicateFinder(width=width), iter(texts)
    while batch := list(itertools.islice(texts, 200)):
        finder.add(batch)
    return finder.clusters(threshold, "containment")


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


def measure_speed(texts: list[str], rounds: int) -> list[dict]:
    """All sides, interleaved."""
    sides = {
        "ours": find_near_duplicates, "ours, Jaccard 0.8": lambda texts: find_near_duplicates(texts, 0.8),
        "datasketch, loop": by_loop, "datasketch, generator": by_generator,
    }
    seconds, labels = {name: [] for name in sides}, {}
    for _ in range(rounds):
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
            "times ours": cpu / ours, "range": f"{ratios[0]:.1f}–{ratios[-1]:.1f}",
            "F1 against all pairs": "" if name == "ours" else f"{f1(truth, labels[name]):.3f}",
        })
    return rows


# memory

MEASURED = {"ours": by_batches, "datasketch, loop": by_loop, "datasketch, generator": by_generator}


def peak(name: str, path: str) -> int:
    """Peak bytes of one side above its start, in this process, with the texts as a stream from a file."""
    by_batches(["one two three", "one two three"])  # what is loaded at first use is no cost of the texts
    by_generator(["one two three"])

    def stream():
        with open(path, encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    _peak_memory(reset=True)
    before = _peak_memory()
    MEASURED[name](stream())
    return _peak_memory() - before


def varied(texts: list[str], count: int):
    """As many texts as wanted: the same, with every third word drawn anew."""
    draw = random.Random(0)
    words = " ".join(texts).split()
    for i in range(count):
        yield " ".join(draw.choice(words) if draw.random() < 0.33 else word for word in texts[i % len(texts)].split())


def measure_memory(texts: list[str]) -> list[dict]:
    """Each side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
        rows = []
        for name in MEASURED:
            command = [sys.executable, __file__, "--peak", name, str(path)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
            rows.append({"side": name, "texts": len(texts), "peak megabytes": int(done.stdout) / 1e6})
    for row in rows:
        row["times ours"] = row["peak megabytes"] / rows[0]["peak megabytes"]
    return rows


# planted copies


class Planter:
    """Copies of texts, and texts that only look like copies."""

    def __init__(self, pool: list[str], seed: int = 0):
        self.draw, self.pool = random.Random(seed), list(pool)
        self.draw.shuffle(self.pool)
        self.frames = [" ".join(self.pool.pop() for _ in range(8)).split() for _ in range(2)]
        self.words = " ".join(self.pool[-200:]).split()

    def edits(self, text: str, share: float) -> str:
        """Words replaced, left out and put in, a third each."""
        found = []
        for word in text.split():
            kind, other = self.draw.random() / share * 3, self.draw.choice(self.words)
            found += [word] if kind >= 3 else [[other], [], [word, other]][int(kind)]
        return " ".join(found)

    def reordering(self, text: str, share: float) -> str:
        """A share of the sentences moved to other places."""
        parts = [part for part in re.split(r"(?<=[.!?:;])\s+|\n\s*\n", text) if part.strip()]
        if len(parts) < 3:
            words = text.split()
            parts = [" ".join(words[i : i + 12]) for i in range(0, len(words), 12)]
        moved = self.draw.sample(range(len(parts)), max(2, round(share * len(parts))))
        for place, part in zip(moved, self.draw.sample([parts[i] for i in moved], len(moved)), strict=True):
            parts[place] = part
        return " ".join(parts)

    def boilerplate(self, text: str, share: float) -> str:
        """The text between a header and a footer that many share."""
        frame, size = self.draw.choice(self.frames), int(len(text.split()) * share / 2)
        return " ".join([*frame[:size], text, *frame[len(frame) // 2 :][:size]])

    def truncation(self, text: str, share: float) -> str:
        """The beginning of the text, less a share."""
        words = text.split()
        return " ".join(words[: round(len(words) * (1 - share))])

    def forms(self, share: float, count: int) -> list[str]:
        """One form, filled with different content; a share of the words is the form's."""
        frame, found = self.pool.pop().split()[: int(100 * share)], []
        for _ in range(count):
            body = self.pool.pop().split()[: max(4, round(len(frame) * (1 - share) / share))]
            cut = lambda words, i: words[i * len(words) // 6 : (i + 1) * len(words) // 6]
            found.append(" ".join(word for i in range(6) for word in cut(frame, i) + cut(body, i)))
        return found

    def framed(self, share: float, count: int) -> list[str]:
        """Different bodies between the same header and footer."""
        return [self.boilerplate(self.pool.pop(), share) for _ in range(count)]


STRENGTHS = {
    "edits": (0.02, 0.05, 0.1), "reordering": (0.2, 0.5, 1.0), "boilerplate": (0.3, 0.6, 1.0), "truncation": (0.2, 0.4, 0.6),
}  # fmt: skip


def real_texts() -> list[str]:
    """Documentation in English, and paragraphs in Portuguese and Spanish where the handbook is installed."""
    english = [d.body for d in read_environment(share=1e6) if d.kind != "module" and 60 < len(d.body.split()) < 400]
    pages = [page for name in ("pt-BR", "es-ES") for page in sorted((HANDBOOK / name).glob("*.html"))]
    others = [text for page in pages for text in read_paragraphs(page) if 60 < len(text.split()) < 400]
    if not others:
        print(f"(no Portuguese and Spanish: `{HANDBOOK}` is missing; the Debian package debian-handbook has it)")
    return english + others


def planted(documents: int, pool: list[str], seed: int = 0) -> tuple[list[str], list[tuple[str, float]], list[int]]:
    """(texts, kind and strength of each, number of each text's original)."""
    pool = random.Random(seed).sample(pool, min(7 * documents, len(pool)))
    labels = find_near_duplicates(pool, 0.2)  # the originals must be no copies of each other
    planter = Planter([text for i, text in enumerate(pool) if labels[i] == i], seed)
    misleading = [("forms", share, text) for share in (0.5, 0.7) for n in (3, 10, 40) for text in planter.forms(share, n)]
    misleading += [("framed", share, text) for share in (0.5, 1.0) for text in planter.framed(share, 40)]
    originals = [planter.pool.pop() for _ in range(min(documents, len(planter.pool)))]
    texts, about, origin = list(originals), [("original", 0.0)] * len(originals), list(range(len(originals)))
    plans = [(kind, strength) for kind, strengths in STRENGTHS.items() for strength in strengths]
    for i, text in enumerate(originals):
        kind, strength = plans[i % len(plans)]
        texts.append(getattr(planter, kind)(text, strength))
        about.append((kind, strength))
        origin.append(i)
    for kind, strength, text in misleading:
        origin.append(len(texts))
        texts.append(text)
        about.append((kind, strength))
    return texts, about, origin


def measure_planted(documents: int, pool: list[str], seed: int = 0) -> list[dict]:
    """F1 per kind, for each side."""
    texts, about, origin = planted(documents, pool, seed)
    kinds, rows = numpy.array([kind for kind, _ in about]), []
    copy = numpy.isin(kinds, list(STRENGTHS))
    sides = {
        "ours": find_near_duplicates, "ours, Jaccard 0.8": lambda texts: find_near_duplicates(texts, 0.8),
        "ours, Jaccard 0.5": lambda texts: find_near_duplicates(texts, 0.5),
        "datasketch 0.8": by_generator, "datasketch 0.5": lambda texts: by_generator(texts, 0.5),
    }
    for name, function in sides.items():
        labels = function(texts)
        right = copy & (labels == labels[origin]) & (labels == numpy.array(origin))
        wrong = ~copy & (labels != numpy.arange(len(labels)))
        row = {"side": name}
        for kind in STRENGTHS:
            hits, misses = int(right[kinds == kind].sum()), int((kinds == kind).sum() - right[kinds == kind].sum())
            row[kind] = 2 * hits / (2 * hits + misses + int(wrong.sum()))
        row |= {"macro-F1": statistics.mean(row[kind] for kind in STRENGTHS), "wrongly joined": int(wrong.sum())}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stream", type=int, default=30_000, help="documents of the memory measurement")
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "TEXTS"), help="print the peak bytes of one side")
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(*arguments.peak))
        return
    packages = [d for d in list_distributions() if d.name in ("numpy", "pandas", "transformers")]
    texts = [d.body for d in read_environment(distributions=packages) if len(d.body) > 40]
    texts = texts[:: max(1, len(texts) // arguments.documents)][: arguments.documents]
    speed = measure_speed(texts, arguments.rounds)
    print(Table(speed, f"Near-duplicates among {len(texts)} documents, {arguments.rounds} rounds, medians"), end="\n\n")
    memory = measure_memory(list(varied(texts, arguments.stream)))
    print(Table(memory, f"Peak memory of a stream of {arguments.stream:,} documents"), end="\n\n")
    kinds = measure_planted(arguments.documents // 4, real_texts())
    print(Table(kinds, "F1 of planted copies"))
    if arguments.result:
        with open(arguments.result, "w", encoding="utf-8") as stream:
            json.dump({"documents": len(texts), "rows": speed, "memory": memory, "planted": kinds}, stream, indent=1)


if __name__ == "__main__":
    main()
