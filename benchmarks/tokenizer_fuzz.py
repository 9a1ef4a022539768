"""Hostile text against our encoder and the production path: bytes that come back, ids that agree, time that stays linear.

    python benchmarks/tokenizer_fuzz.py [RESULT.json] [--megabytes 10] [--vocabulary 4096] [--corpus-megabytes 40]

Fuzz: random bytes, UTF-8 cut in the middle, every script, combining marks, emoji sequences, Unicode spaces, long runs, digits,
punctuation, names of special tokens, code. `BytePairs` must give all bytes back; for valid text `encode_plain` and
`DocumentEncoder` must give the ids of `BytePairs`, and the tokenizer must give the text back. Code points that no character
has yet are left out: regex libraries differ in which of them are letters, so the cut may differ (the bytes come back anyway).
Worst cases: one megabyte of one letter, and of other runs, against one megabyte of prose (the language reference).
Workers: `write_shard` with one process and with one per core writes the same bytes; how much sooner is printed.
"""

import argparse
import json
import pydoc_data.topics
import random
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from llmbook.core import Table, available_cores
from llmbook.tokenization import (
    SPECIAL_TOKENS,
    BytePairs,
    DocumentEncoder,
    encode_plain,
    train_bpe,
    train_tokenizer,
    write_shard,
)

CHOSEN = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cs", "Cn", "Co")]
SPACES = [c for c in CHOSEN if c.isspace() or unicodedata.category(c) in ("Zs", "Cf")]
MARKS = [c for c in CHOSEN if unicodedata.category(c) in ("Mn", "Me", "Mc")]
EMOJI = ["👩", "👧", "🏽", "\u200d", "\ufe0f", "🇧🇷", "🇪", "❤", "🏴", "\U000e0067", "\U000e007f", "#\u20e3"]
PROSE = [text for _, text in sorted(pydoc_data.topics.topics.items())]


def _slice(draw: random.Random, size: int) -> str:
    text = draw.choice(PROSE)
    start = draw.randrange(max(1, len(text) - size))
    return text[start : start + size]


def kinds(draw: random.Random) -> dict[str, Callable[[int], str | bytes]]:
    """Name → a maker of about so many characters."""
    several = lambda letters: lambda n: "".join(draw.choices(letters, k=n))  # noqa: E731
    blocks = [CHOSEN[i : i + 128] for i in range(0, len(CHOSEN), 128)]
    return {
        "random bytes": draw.randbytes,
        "torn UTF-8": lambda n: several(CHOSEN)(n).encode()[1:-1] or b"\xff",
        "prose with torn bytes": lambda n: draw.randbytes(2).join([_slice(draw, 50).encode()] * (n // 50 + 1)),
        "all scripts": several(CHOSEN),
        "one script": lambda n: several(draw.choice(blocks))(n),
        "combining marks": lambda n: "".join(draw.choice("aeiouncз日") + draw.choice(MARKS) for _ in range(n // 2 + 1)),
        "emoji": several(EMOJI),
        "spaces": several([*SPACES, "\n", "\r\n", "\t", " ", "x"]),
        "line ends": several(["\n", "\r", " ", "\t"]),
        "runs": lambda n: "".join(draw.choice([*"a-= \n1é日", "\u0301"]) * draw.randint(1, n) for _ in range(2)),
        "digits and signs": several("0123456789.,-+()[]{}'\"!?/\\_ "),
        "special names": several([*SPECIAL_TOKENS, "<|", "|>", "endoftext", " ", "<|endoftext|", "<s>"]),
        "apostrophes": several(["'s", "'S", "'ſ", "'ll", "'", "’s", " a", "I", "İ"]),
        "prose": lambda n: _slice(draw, n),
    }


def fuzz(megabytes: float, size: int, seed: int) -> list[dict]:
    """Count bytes and differences for each kind of text."""
    draw = random.Random(seed)
    tokenizer, ours = train_tokenizer(PROSE, size), BytePairs(train_bpe(PROSE, size))
    encoder, makers = DocumentEncoder(tokenizer), kinds(random.Random(seed))
    rows = []
    for name, make in makers.items():
        row = {"text": name, "bytes": 0, "texts": 0, "bytes not back": 0, "other ids": 0, "text not back": 0}
        while row["bytes"] < megabytes * 1e6 / len(makers):
            made = [make(draw.choice((1, 2, 3, 10, 100, 1000, 20_000))) for _ in range(20)]
            raw = [text if isinstance(text, bytes) else text.encode() for text in made]
            mine = [ours.encode(text) for text in raw]
            ours.known.clear()
            row["bytes"] += sum(map(len, raw))
            row["texts"] += len(raw)
            row["bytes not back"] += sum(ours.decode(ids) != text for ids, text in zip(mine, raw, strict=True))
            texts = [text.decode("utf-8", "replace") for text in raw]
            expected = [ours.encode(text) for text in texts]
            ids, starts = encoder.encode(texts)
            ends = [*starts[1:].tolist(), len(ids)]
            other = [ids[i : j - 1].tolist() for i, j in zip(starts.tolist(), ends, strict=True)]
            for good, plain, remembered, text in zip(expected, encode_plain(tokenizer, texts), other, texts, strict=True):
                row["other ids"] += good != plain or good != remembered
                row["text not back"] += tokenizer.decode(plain) != text
        rows.append(row)
    total = {name: sum(row[name] for row in rows) for name in list(rows[0])[1:]}
    return [*rows, {"text": "all", **total}]


def runs(size: int, rounds: int) -> Iterator[dict]:
    """Seconds for a megabyte of each run, against a megabyte of prose."""
    tokenizer, merges, n = train_tokenizer(PROSE, size), train_bpe(PROSE, size), 1_000_000
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=n)
    texts = {
        "prose": ("".join(PROSE) * 3)[:n], "a": "a" * n, "-": "-" * n, "space": " " * n, "line end": "\n" * n,
        "line end, space": "\n " * (n // 2), "digit": "1" * n, "é": "é" * (n // 2), "日": "日" * (n // 3),
        "the": "the" * (n // 3), "spaces, then x": " " * (n - 1) + "x", "marks": "e" + "\u0301" * (n // 2),
        "random letters": "".join(letters),
    }  # fmt: skip
    sides = {
        "ours": lambda text: BytePairs(merges).encode(text), "encode_plain": lambda text: encode_plain(tokenizer, [text]),
        "DocumentEncoder": lambda text: DocumentEncoder(tokenizer).encode([text]),
    }  # fmt: skip
    best = {(name, side): 1e9 for name in texts for side in sides}
    for _ in range(rounds):
        for name, text in texts.items():
            for side, function in sides.items():
                start = time.process_time()
                function(text)
                best[name, side] = min(best[name, side], time.process_time() - start)
    for name in texts:
        row = {f"{side}, cpu s": best[name, side] for side in sides}
        yield {"1 MB of": name, **row, **{f"{side} / prose": best[name, side] / best["prose", side] for side in sides}}


def workers(megabytes: float, size: int, rounds: int) -> list[dict]:
    """Encode one corpus with one process and with one per core."""
    tokenizer = train_tokenizer(PROSE, size)
    draw = random.Random(0)
    documents = [_slice(draw, 8000) for _ in range(int(megabytes * 1e6 / 4600))]
    rows, written = [], []
    with tempfile.TemporaryDirectory() as folder:
        for count in [1, available_cores()] * rounds:
            start, used = time.perf_counter(), time.process_time()
            batches = [documents[i : i + 500] for i in range(0, len(documents), 500)]
            told = write_shard(tokenizer, batches, Path(folder), f"by{count}", count)
            wall = time.perf_counter() - start
            written.append((Path(folder) / f"by{count}.bin").read_bytes())
            rows.append({"workers": count, "MB": told["bytes"] / 1e6, "wall s": wall, "MB per s": told["bytes"] / 1e6 / wall,
                         "cpu s, parent": time.process_time() - used, "same bytes": written[0] == written[-1]})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", nargs="?")
    parser.add_argument("--megabytes", type=float, default=10.0, help="of hostile text")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--corpus-megabytes", type=float, default=40.0, help="for the comparison of workers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    slow = list(runs(chosen.vocabulary, chosen.rounds))
    print(Table(slow, f"Worst cases, best of {chosen.rounds} rounds"))
    found = fuzz(chosen.megabytes, chosen.vocabulary, chosen.seed)
    print(Table(found, "Hostile text: bytes, and how many texts differ"))
    spread = workers(chosen.corpus_megabytes, chosen.vocabulary, 2)
    print(Table(spread, "A corpus into one shard"))
    if chosen.result:
        Path(chosen.result).write_text(json.dumps({"runs": slow, "fuzz": found, "workers": spread}, indent=1))


if __name__ == "__main__":
    main()
