"""Unigram and WordPiece vocabularies: ours against `sentencepiece` and `tokenizers`, on text that none was trained on.

    python benchmarks/subword_training.py [RESULT.json] [--megabytes 2] [--pieces 4000] [--rounds 2]

All sides get the same pre-tokens and may keep the same number of pieces. Bits per byte of the held-out twentieth of the documents
are those of the Unigram model, all cuts summed, computed by our `log_likelihood` for every side, probabilities brought to sum
one; letters that a side does not have cost the same penalty everywhere. Line ends stand under another sign, since the file that
sentencepiece reads has one word a line. WordPiece has no probabilities: bytes per token only. English documentation comes from
the installed packages, code from the standard library, Portuguese and Spanish from Debian's manual pages and handbook, if there.
"""

import argparse
import gzip
import io
import json
import math
import re
import statistics
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from llmbook.core import Table
from llmbook.documents import read_html
from llmbook.environment import list_distributions, read_environment
from llmbook.subwords import WordPiece, train_wordpiece
from llmbook.unigram import Unigram, _filter, import_tokenizer, split_spaced, train_subwords, train_unigram

OWN = 263  # special tokens, unknown and bytes, which sentencepiece is not asked for


def documentation() -> Iterable[str]:
    """Documentation of some installed packages."""
    wanted = ("numpy", "pandas", "scikit-learn", "torch", "transformers")
    packages = [found for found in list_distributions() if found.name in wanted]
    return (document.text for document in read_environment(distributions=packages))


def code() -> Iterable[str]:
    """Sources of the standard library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if "site-packages" not in path.parts and "test" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="replace")


def manuals(language: str, handbook: str) -> Iterable[str]:
    """Manual pages and the handbook of one language, if Debian's packages are installed."""
    for path in sorted(Path(f"/usr/share/man/{language}").glob("man*/*.gz")):
        yield gzip.open(path, "rt", encoding="utf-8", errors="replace").read()
    for path in sorted(Path(f"/usr/share/doc/debian-handbook/html/{handbook}").glob("*.html")):
        yield read_html(path)


def take(texts: Iterable[str], megabytes: float) -> list[str]:
    """Texts until there is enough, line ends under another sign."""
    found, size = [], 0
    for text in texts:
        if size < megabytes * 1e6:
            clean = text.encode("utf-8", "replace").decode().replace("\r", "").replace("\n", "⏎")
            found.append(re.sub(r"[^\S ]", " ", clean))  # a word of sentencepiece's file holds no other space
            size += len(found[-1].encode())
    return found


def by_sentencepiece(texts: list[str], pieces: int) -> dict[str, float]:
    """Pieces and scores that sentencepiece learns from our pre-tokens."""
    counted = Counter(word for text in texts for word in split_spaced(text))
    out = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        lines = (f"{word}\t{times}\n" for word, times in counted.items() if word.split() == [word] and "\ud800" not in word)
        Path(folder, "words.tsv").write_text("".join(lines), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=f"{folder}/words.tsv", input_format="tsv", model_writer=out, vocab_size=pieces + 1, model_type="unigram",
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, num_threads=1,
            split_by_whitespace=False, split_by_unicode_script=False, split_by_number=False, hard_vocab_limit=False,
            allow_whitespace_only_pieces=True, bos_id=-1, eos_id=-1, minloglevel=2,
        )  # fmt: skip
    found = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    return {found.id_to_piece(i): found.get_score(i) for i in range(1, found.vocab_size())}


def judge(scores: dict[str, float], texts: list[str]) -> dict[str, float]:
    """Bits per byte, and bytes per token of the best cut."""
    total = math.log(sum(map(math.exp, scores.values())))
    model = Unigram({piece: score - total for piece, score in scores.items()})
    model.penalty = -25.0  # the same for all sides
    words = Counter(word for text in texts for word in split_spaced(text))
    size = sum(len(text.encode()) for text in texts)
    likelihood = sum(times * _filter(model, word, 1.0)[0] for word, times in words.items())
    tokens = sum(times * len(model.cut_word(word)) for word, times in words.items())
    return {"bits per byte": -likelihood / size / math.log(2), "bytes per token": size / tokens}


def compare(name: str, texts: list[str], pieces: int, rounds: int) -> list[dict]:
    """All sides on one corpus."""
    held, train = texts[::20], [text for i, text in enumerate(texts) if i % 20]
    sides = {
        "Unigram, ours": lambda: train_unigram(train, pieces + OWN),
        "Unigram, sentencepiece": lambda: by_sentencepiece(train, pieces),
        "Unigram, tokenizers": lambda: import_tokenizer(train_subwords(train, "unigram", pieces + OWN)).scores,
        "WordPiece, ours": lambda: train_wordpiece(train, pieces),
        "WordPiece, tokenizers": lambda: import_tokenizer(train_subwords(train, "wordpiece", pieces)).tokens,
    }
    took, learnt = {side: [] for side in sides}, {}
    for _ in range(rounds):
        for side, function in sides.items():
            started = time.process_time()
            learnt[side] = function()
            took[side].append(time.process_time() - started)
    rows = []
    for side, found in learnt.items():
        if side.startswith("Unigram"):
            told = judge(found, held)
        else:
            tokenizer = WordPiece(found)
            size, tokens = (sum(map(len, column)) for column in ([t.encode() for t in held], map(tokenizer.encode, held)))
            told = {"bits per byte": "", "bytes per token": size / tokens}
        rows.append({"corpus": name, "side": side, "pieces": len(found), "cpu s": statistics.median(took[side]), **told})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", nargs="?")
    parser.add_argument("--megabytes", type=float, default=2.0)
    parser.add_argument("--pieces", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    sources = {
        "documentation": documentation, "code": code, "Portuguese": lambda: manuals("pt_BR", "pt-BR"),
        "Spanish": lambda: manuals("es", "es-ES"),
    }  # fmt: skip
    train_subwords(["imports are not measured"] * 9, "unigram", 300)
    rows = []
    for name, read in sources.items():
        if len(texts := take(read(), chosen.megabytes)) < 20:
            print(f"{name} is left out: install the Debian packages manpages-pt-br, manpages-es and debian-handbook to have it")
            continue
        rows += compare(name, texts, chosen.pieces, chosen.rounds)
    print(Table(rows, f"Trained on {chosen.megabytes:g} MB at most, judged on every twentieth document"))
    if chosen.result:
        Path(chosen.result).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
