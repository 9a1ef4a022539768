"""Bits per byte of the book's decoder at equal compute: BPE, Unigram, WordPiece and bytes on English documentation.

    python benchmarks/tokenizer_bits.py [RESULT.json] [--operations 2.5e12] [--seeds 2] [--vocabulary 2048] [--depth 2]

Every tokenizer gets the same decoder but for its vocabulary, the same operations (forward and backward, as `count_flops`
counts them), the same window in bytes, and the same number of predictions per step; so the one with the cheaper output takes
more steps, and the one with the longer tokens reads more text. Bits are summed over whole held-out documents, their ends
included, and divided by their bytes; intervals are bootstrapped over documents, from the mean of the seeds.

WordPiece loses white space, and words it does not know. What it loses is coded beside it, and counted: each run of white space
by how often it stood between such signs, after such a line beginning, in the training text; unknown words in plain bytes.

Fair vocabularies: BPE and Unigram from English paragraphs of the Debian handbook alone, and from the same amount of text in
three languages; what the same held-out paragraphs cost in each (Debian package debian-handbook; left out if it is missing).
"""

import argparse
import json
import math
from collections import Counter

import numpy as np
import torch
from handbook import HANDBOOK, read_paragraphs
from short_training import train_short

from llmbook.architecture import count_flops, Decoder, derive_decoder
from llmbook.comparison import decode_ids, encode_all, measure_cost, parity, resample_ratio
from llmbook.core import Table, set_seed, set_threads
from llmbook.duplicates import find_near_duplicates
from llmbook.environment import list_distributions, read_environment
from llmbook.losses import token_losses
from llmbook.objectives import Autoregressive, heldout_windows
from llmbook.subwords import PieceList, WordPiece, _bert_splitter, list_pieces, train_wordpiece
from llmbook.tokenization import train_tokenizer
from llmbook.unigram import Unigram, train_unigram

END = 0  # <|endoftext|> in every vocabulary of the book


def read_texts(megabytes: float) -> tuple[list[str], list[str]]:
    """Documentation without near-duplicates: nine tenths to learn, a tenth held out."""
    wanted = [d for d in list_distributions() if d.name in ("numpy", "pandas", "torch", "matplotlib")]
    found, size = [], 0
    for document in read_environment(distributions=[*wanted], share=megabytes * 1e6 / 2):
        if 300 < len(document.body) < 6000:
            found.append(document.body)
            size += len(document.body)
    labels = find_near_duplicates(found, 0.5)
    found = [text for i, text in enumerate(found) if labels[i] == i]
    np.random.default_rng(0).shuffle(found)
    total, limit = 0, megabytes * 1e6
    kept = [text for text in found if (total := total + len(text.encode())) < limit]
    return kept[len(kept) // 10 :], kept[: len(kept) // 10]


# what WordPiece loses


class Spaces:
    """How many bits the white space between words takes, and words without a token."""

    def __init__(self, texts: list[str]):
        self.counts: dict[tuple, Counter] = {}
        for text in texts:
            for space, contexts in self.walk(text):
                for context in contexts:
                    self.counts.setdefault(context, Counter())[space] += 1

    @staticmethod
    def walk(text: str):
        """Each run of white space, also the empty one, with what stands around it: much, less, nothing."""
        kind = lambda word: word if len(word) == 1 and not word.isalnum() else "word"
        end, left, line = 0, "start", ""
        for match in [*_bert_splitter().finditer(text), None]:
            word = match[0] if match else "end"
            space = text[end : match.start()] if match else text[end:]
            right = kind(word) if match else "end"
            yield space, ((left, right, line), (left, right), ())
            left, end, line = right, match.end() if match else end, space if "\n" in space else line

    def bits(self, text: str, tokenizer: WordPiece) -> float:
        """Everything beside the tokens of one text."""
        total = 0.0
        for space, contexts in self.walk(text):
            p = 2.0 ** (-4 * (len(space) + 1))  # never seen: sign by sign
            for context in reversed(contexts):
                known = self.counts.get(context, Counter())
                p = (known[space] + 2 * p) / (known.total() + 2)
            total -= math.log2(p)
        unknown = (piece for piece in tokenizer.pieces(text) if piece not in tokenizer.ids)
        return total + sum(8 * (len(piece.encode()) + 1) for piece in unknown)


# a training


class Stream:
    """Texts as one row of ids, an end after each."""

    def __init__(self, rows: list[list[int]]):
        self.tokens = np.concatenate([np.array([*row, END], np.int64) for row in rows])
        self.starts = np.cumsum([0, *(len(row) + 1 for row in rows[:-1])])


def score(model: torch.nn.Module, stream: Stream, context: int) -> np.ndarray:
    """Bits of each text; every token is predicted once, with half a window of context or more."""
    windows, nats = list(heldout_windows(stream.tokens, context, context // 2)), []
    with torch.no_grad():
        for start in range(0, len(windows), 8):
            ids, labels = (torch.from_numpy(np.stack(part)) for part in zip(*windows[start : start + 8], strict=True))
            losses = token_losses(model(ids), labels).view(labels.shape)
            nats.append(losses[labels >= 0].double())
    nats = torch.cat(nats).numpy()
    assert len(nats) == len(stream.tokens)
    return np.add.reduceat(nats, stream.starts) / math.log(2)


def measure(tokenizer, vocabulary: int, learn: list[str], heldout: list[str], options, seed: int) -> tuple[dict, np.ndarray]:
    """One training: what it was, and the bits of each held-out text."""
    known, unseen = Stream(encode_all(tokenizer, learn)), Stream(encode_all(tokenizer, heldout))
    reach = sum(len(text.encode()) for text in learn) / len(known.tokens)
    context = max(16, round(options.window / reach / 16) * 16)
    shape = derive_decoder(options.depth, vocabulary, context)
    rows = max(1, round(options.predictions / context))
    operations = 3.0 * count_flops(shape, context)
    steps = max(10, round(options.operations / (operations * rows * context)))
    set_seed(seed)
    model = Decoder(shape)
    objective = Autoregressive(known.tokens, context, rows, seed)
    row = {
        "vocabulary": vocabulary, "window, tokens": context, "steps": steps, "operations": operations * rows * context * steps,
        "megabytes read": steps * rows * context * reach / 1e6, "bytes per token": reach,
        **train_short(model, objective, steps, seed),
    }
    return row, score(model.eval(), unseen, context)


def compare(learn: list[str], heldout: list[str], options) -> list[dict]:
    """Every tokenizer, every seed, interleaved."""
    size = options.vocabulary
    tokenizers = {
        "BPE": train_tokenizer(learn, size), "Unigram": Unigram(train_unigram(learn, size)),
        "WordPiece": WordPiece(train_wordpiece(learn, size)), "bytes": PieceList(list_pieces([], "byte"), "byte"),
    }
    spaces = Spaces(learn)
    beside = np.array([spaces.bits(text, tokenizers["WordPiece"]) for text in heldout])
    for name in ("BPE", "Unigram", "bytes"):
        rows = encode_all(tokenizers[name], heldout)
        assert all(decode_ids(tokenizers[name], r) == t for r, t in zip(rows, heldout, strict=True)), name
    found, about = {name: [] for name in tokenizers}, {}
    for seed in range(options.seeds):
        for name, tokenizer in tokenizers.items():
            about[name], bits = measure(tokenizer, len(tokenizer), learn, heldout, options, seed)
            found[name].append(bits + beside * (name == "WordPiece"))
            print(f"seed {seed}  {name:10} {about[name]['steps']:5} steps  {about[name]['wall seconds']:6.1f} s", flush=True)
    sizes, rows = np.array([len(text.encode()) for text in heldout]), []
    first = np.mean(found["BPE"], axis=0)
    for name, parts in found.items():
        mean = np.mean(parts, axis=0)
        (low, high), (less, more) = resample_ratio(mean, sizes), resample_ratio(mean - first, sizes)
        per_seed = [float(bits.sum() / sizes.sum()) for bits in parts]
        rows.append({
            "tokenizer": name,
            **{k: about[name][k] for k in ("vocabulary", "window, tokens", "steps", "megabytes read")},
            "bits per byte": float(mean.sum() / sizes.sum()), "95 %": f"{low:.3f}–{high:.3f}",
            "from BPE": "" if name == "BPE" else f"{less:+.3f} to {more:+.3f}",
            "seeds": " ".join(f"{value:.3f}" for value in per_seed),
            "beside the tokens": float(beside.sum() / sizes.sum()) if name == "WordPiece" else 0.0,
            "operations": about[name]["operations"],
        })
    return rows


# fair vocabularies


def paragraphs() -> dict[str, list[str]]:
    """Paragraphs of the Debian handbook that stand in three languages, in the same order."""
    names, found = {"en": "en-US", "pt": "pt-BR", "es": "es-ES"}, {"en": [], "pt": [], "es": []}
    for path in sorted((HANDBOOK / "en-US").glob("*.html")):
        parts = {code: read_paragraphs(HANDBOOK / name / path.name) for code, name in names.items()}
        if len({len(texts) for texts in parts.values()}) == 1:
            for trio in zip(*parts.values(), strict=True):
                # a paragraph left in English is no translation
                lengths = sorted(map(len, trio))
                if lengths[0] > 80 and len(set(trio)) == 3 and lengths[2] < 2 * lengths[0]:
                    for code, text in zip(names, trio, strict=True):
                        found[code].append(text)
    return found


def compare_languages(vocabulary: int) -> list[dict]:
    """The same paragraphs with vocabularies from English and from three languages, as much text for each."""
    parts = paragraphs()
    if not parts["en"]:
        print(f"(no fair vocabularies: `{HANDBOOK}` is missing; the Debian package debian-handbook has it)")
        return []
    count = len(parts["en"])
    cut, third = count * 4 // 5, count * 4 // 15
    heldout = {code: texts[cut:] for code, texts in parts.items()}
    english = parts["en"][:cut]
    mixture = [text for i, texts in enumerate(parts.values()) for text in texts[i * third : (i + 1) * third]]
    rows = []
    for method, learn in (
        ("BPE", lambda texts: train_tokenizer(texts, vocabulary)),
        ("Unigram", lambda texts: Unigram(train_unigram(texts, vocabulary))),
    ):
        for source, texts in (("English", english), ("three languages", mixture)):
            tokenizer = learn(texts)
            premium = parity(tokenizer, heldout)
            cost = {code: measure_cost(tokenizer, part) for code, part in heldout.items()}
            rows.append({
                "method": method, "vocabulary from": source, "paragraphs held out": len(heldout["en"]),
                "premium, Portuguese": premium["pt"], "premium, Spanish": premium["es"],
                **{f"bytes per token, {code}": cost[code]["bytes per token"] for code in heldout},
                **{f"tokens per word, {code}": cost[code]["tokens per word"] for code in heldout},
            })
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--operations", type=float, default=2.5e12, help="of each training, forward and backward")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=2, help="of the decoder; its width follows")
    parser.add_argument("--window", type=int, default=512, help="bytes of text in a row, about")
    parser.add_argument("--predictions", type=int, default=1024, help="per step")
    parser.add_argument("--megabytes", type=float, default=3.0, help="of text, held-out documents included")
    parser.add_argument("--threads", type=int, help="every core if left out; 1 on a machine that others use, too")
    options = parser.parse_args()
    set_threads(options.threads)
    languages = compare_languages(options.vocabulary)
    if languages:
        shown = [{k: v for k, v in row.items() if "per word" not in k} for row in languages]
        print(Table(shown, "The same paragraphs of the Debian handbook"), end="\n\n")
    learn, heldout = read_texts(options.megabytes)
    size = lambda texts: sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(learn)} documents ({size(learn):.2f} MB) to learn, {len(heldout)} ({size(heldout):.2f} MB) held out")
    rows = compare(learn, heldout, options)
    shown = [{k: v for k, v in row.items() if k != "operations"} for row in rows]
    print(Table(shown, f"Held-out bits per byte after {options.operations:.2g} operations, {options.seeds} seeds"))
    if options.result:
        with open(options.result, "w", encoding="utf-8") as stream:
            json.dump({"options": vars(options), "rows": rows, "languages": languages}, stream, indent=1)


if __name__ == "__main__":
    main()
