"""Byte-level BPE: ours, the `tokenizers` library and the textbook loop, on documentation, code and Portuguese.

    python benchmarks/bpe_training.py [RESULT.json] [--megabytes 4] [--vocabularies 4096 16384] [--rounds 3]

Training: the same texts and vocabulary on both sides, interleaved, merges compared. Encoding: `DocumentEncoder` starts with
an empty memory in each round; the library encodes the same texts by `encode_batch_fast`; ids are compared. The textbook loop
and ours then learn the same number of merges from the same slice of the documentation: nothing is extrapolated.

Documentation comes from the installed packages, code from the standard library. Portuguese is read from the Debian packages
`manpages-pt-br` and `debian-handbook`; where they are missing that part is left out, and the script says so.
"""

import argparse
import gzip
import json
import statistics
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

from llmbook.core import Table
from llmbook.documents import read_html
from llmbook.environment import read_environment
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


def documentation() -> Iterable[str]:
    """The documentation of the installed packages."""
    return (document.text for document in read_environment())


def code() -> Iterable[str]:
    """The sources of the standard library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if "site-packages" not in path.parts and "test" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="replace")


def portuguese() -> Iterable[str]:
    """Manual pages and a handbook in Portuguese, if Debian's packages are installed."""
    for path in sorted(Path("/usr/share/doc/debian-handbook/html/pt-BR").glob("**/*.html")):
        yield read_html(path)
    for path in sorted(Path("/usr/share/man/pt_BR").glob("man*/*.gz")):
        yield gzip.open(path, "rt", encoding="utf-8", errors="replace").read()


def take(texts: Iterable[str], megabytes: float) -> list[str]:
    """Texts until there is enough."""
    found, size = [], 0
    for text in texts:
        if size >= megabytes * 1e6:
            break
        found.append(text.encode("utf-8", "replace").decode())
        size += len(found[-1].encode())
    return found


def timed(function, *arguments) -> tuple[float, float, object]:
    """Wall seconds, processor seconds and result."""
    wall, processor = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return time.perf_counter() - wall, time.process_time() - processor, result


def spelt(merges: list[tuple[bytes, bytes]]) -> list[tuple[str, ...]]:
    """Merges in the letters that tokenizer.json uses."""
    return [tuple("".join(byte_letters()[byte] for byte in part) for part in pair) for pair in merges]


def compare(name: str, texts: list[str], size: int, rounds: int) -> dict:
    """Both sides on one corpus, interleaved."""
    took: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        *ours, merges = timed(train_bpe, texts, size)
        *theirs, tokenizer = timed(train_tokenizer, texts, size)
        *encode_ours, (ids, _) = timed(lambda tok: DocumentEncoder(tok).encode(texts), tokenizer)
        *encode_theirs, rows = timed(encode_plain, tokenizer, texts)
        learnt = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        assert spelt(merges) == [tuple(pair) for pair in learnt], "the merges differ"
        assert ids.tolist() == [i for row in rows for i in [*row, tokenizer.eos_token_id]], "the ids differ"
        sides = {"ours": ours, "tokenizers": theirs, "encode ours": encode_ours, "encode tokenizers": encode_theirs}
        for side, seconds in sides.items():
            took.setdefault(side, []).append(tuple(seconds))
    wall = {side: statistics.median(a for a, _ in seconds) for side, seconds in took.items()}
    cpu = {side: statistics.median(b for _, b in seconds) for side, seconds in took.items()}
    ratios = sorted(a[1] / b[1] for a, b in zip(took["ours"], took["tokenizers"], strict=True))
    return {
        "corpus": name, "MB": sum(len(text.encode()) for text in texts) / 1e6, "vocabulary": size,
        "merges": len(merges), "train, ours, cpu s": cpu["ours"], "tokenizers, cpu s": cpu["tokenizers"],
        "ours / tokenizers, cpu": cpu["ours"] / cpu["tokenizers"], "from–to": f"{ratios[0]:.2f}–{ratios[-1]:.2f}",
        "wall": wall["ours"] / wall["tokenizers"],
        "encode, ours / tokenizers, cpu": cpu["encode ours"] / cpu["encode tokenizers"],
    }  # fmt: skip


def textbook(texts: list[str], kilobytes: float, joins: int) -> dict:
    """The textbook loop and ours on one slice."""
    part = take(texts, kilobytes / 1e3)
    words = [word.encode() for word in count_words(part).elements()]
    _, slow, first = timed(train_textbook_bpe, words, joins)
    fast = min(timed(train_bpe, part, len(SPECIAL_TOKENS) + 256 + joins)[1] for _ in range(3))
    assert first == train_bpe(part, len(SPECIAL_TOKENS) + 256 + joins), "the textbook learns other merges"
    return {
        "slice, kB": sum(map(len, words)) / 1e3, "merges": joins, "textbook, cpu s": slow, "ours, cpu s": fast,
        "textbook / ours": slow / fast,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", nargs="?")
    parser.add_argument("--megabytes", type=float, default=4.0)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slice", type=float, default=200.0, help="kilobytes for the textbook loop")
    parser.add_argument("--joins", type=int, default=200, help="merges that the textbook loop learns")
    chosen = parser.parse_args()
    sources = {"documentation": documentation, "code": code, "Portuguese": portuguese}
    corpora = {name: take(read(), chosen.megabytes) for name, read in sources.items()}
    for name in [name for name, texts in corpora.items() if not texts]:
        print(f"{name} is left out: install the Debian packages manpages-pt-br and debian-handbook to have it")
        del corpora[name]
    train_tokenizer(corpora["code"][:5], 300)  # imports are not measured
    rows = [compare(name, texts, size, chosen.rounds) for size in chosen.vocabularies for name, texts in corpora.items()]
    print(Table(rows, f"Merges and ids identical; medians of {chosen.rounds} interleaved rounds"))
    slow = textbook(corpora["documentation"], chosen.slice, chosen.joins)
    print(Table([slow], "The textbook loop and ours on the same slice of the documentation"))
    if chosen.result:
        Path(chosen.result).write_text(json.dumps({"rows": rows, "textbook": slow}, indent=1))


if __name__ == "__main__":
    main()
