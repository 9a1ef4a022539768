"""Byte-level BPE: ours, the `tokenizers` library and the textbook loop, on this Python's own text.

Training: the same texts and vocabulary on both sides, interleaved, merges compared. The textbook loop
gets a small part of the text and few merges; it is compared per byte and merge, and on that part.
Encoding: `DocumentEncoder` starts with an empty memory in each round; the library encodes the same
texts by `encode_batch_fast`. Ids are compared.

    python benchmarks/bpe_training.py [--megabytes 4] [--vocabulary 4096] [--rounds 5] [--output FILE.json]
"""

import argparse
import json
import pydoc_data.topics
import statistics
import sysconfig
import time
from pathlib import Path

from llmbook.core import Table
from llmbook.tokenization import (
    SPECIAL_TOKENS,
    DocumentEncoder,
    byte_letters,
    count_words,
    encode_plain,
    train_bpe,
    train_textbook_bpe,
    train_tokenizer,
)


def read_texts(megabytes: float) -> list[str]:
    "The language reference, then the sources of the standard library, until there is enough."
    texts = list(pydoc_data.topics.topics.values())
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if sum(map(len, texts)) >= megabytes * 1e6:
            break
        if "site-packages" not in path.parts and "test" not in path.parts:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return texts


def timed(function, *arguments) -> tuple[float, float, object]:
    "Wall seconds, processor seconds and result."
    wall, processor = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return time.perf_counter() - wall, time.process_time() - processor, result


def spelt(merges: list[tuple[bytes, bytes]]) -> list[tuple[str, ...]]:
    "Merges in the letters that tokenizer.json uses."
    return [tuple("".join(byte_letters()[byte] for byte in part) for part in pair) for pair in merges]


def main() -> None:
    "Run the comparison."
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--megabytes", type=float, default=4.0)
    options.add_argument("--vocabulary", type=int, default=4096)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--output")
    chosen = options.parse_args()
    texts, size = read_texts(chosen.megabytes), chosen.vocabulary
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    train_tokenizer(texts[:5], 300)  # imports are not measured
    took: dict[str, list[tuple[float, float]]] = {}
    for _ in range(chosen.rounds):
        *ours, merges = timed(train_bpe, texts, size)
        *theirs, tokenizer = timed(train_tokenizer, texts, size)
        *encode_ours, (ids, _) = timed(lambda tok: DocumentEncoder(tok).encode(texts), tokenizer)
        *encode_theirs, rows = timed(encode_plain, tokenizer, texts)
        learnt = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        assert spelt(merges) == [tuple(pair) for pair in learnt], "the merges differ"
        assert ids.tolist() == [i for row in rows for i in [*row, tokenizer.eos_token_id]]
        sides = (("train, ours", ours), ("train, tokenizers", theirs),
                 ("encode, ours", encode_ours), ("encode, tokenizers", encode_theirs))  # fmt: skip
        for name, seconds in sides:
            took.setdefault(name, []).append(tuple(seconds))
    rows = []
    for name, seconds in took.items():
        wall, processor = (statistics.median(column) for column in zip(*seconds, strict=True))
        walls = sorted(first for first, _ in seconds)
        rows.append({"work": name, "wall s": wall, "cpu s": processor, "wall from": walls[0], "to": walls[-1],
                     "MB per cpu s": megabytes / processor})  # fmt: skip
    small, joins = texts[:4], 60
    words = [word.encode() for word in count_words(small).elements()]
    part = sum(map(len, words)) / 1e6
    _, slow, first = timed(train_textbook_bpe, words, joins)
    _, fast, second = timed(train_bpe, small, len(SPECIAL_TOKENS) + 256 + joins)
    assert first == second, "the textbook learns other merges"
    told = {
        "megabytes": megabytes, "vocabulary": size, "rows": rows,
        "train, ours / tokenizers, wall": rows[0]["wall s"] / rows[1]["wall s"],
        "train, ours / tokenizers, cpu": rows[0]["cpu s"] / rows[1]["cpu s"],
        "encode, tokenizers / ours, wall": rows[3]["wall s"] / rows[2]["wall s"],
        "encode, tokenizers / ours, cpu": rows[3]["cpu s"] / rows[2]["cpu s"],
        "textbook / ours per byte and merge": slow / (part * joins)
        / (rows[0]["cpu s"] / (megabytes * (size - 262))),
        "textbook / ours on the same small part": slow / fast,
    }
    print(Table(rows, f"{megabytes:.1f} MB, vocabulary {size:,}, medians of {chosen.rounds} interleaved rounds"))
    print(Table([{"ratio": name, "": told[name]} for name in list(told)[3:]]))
    if chosen.output:
        Path(chosen.output).write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
