"""What filtering saves: tokens that a small decoder needs on filtered text to be as good as on all of a polluted pile.

    python benchmarks/filtering_gain.py [RESULT.json] [--megabytes 0.7] [--seeds 2] [--methods]

The environment's documentation is split by near-duplicate clusters into a held-out part, a reference sample and a training part.
The training part is polluted one to one by bytes with four kinds of junk in equal shares: documents with their words shuffled,
navigation of web pages, copies of a few documents, and machine noise (logs, hex dumps, base64, minified code). One decoder is
trained on everything for one epoch with a whole schedule of its own; the same decoder with the same settings is trained on what
the filter keeps, with whole schedules of several shorter lengths, until one is as good on held-out text in bits per byte. Each
side trains its tokenizer on its own text, as its user would; the row "tokenizer of the pile" takes that advantage away. The
seconds of the filter count as tokens at the speed of the training.

The filter never sees a label. It repairs text, drops near-duplicates, applies the rules for documentation, and drops texts whose
order of words means nothing to a counted model of the rest of the pile. That rule compares texts with copies it shuffles itself:
so it knows that words can be shuffled. The thresholds of the rules were chosen on documentation and on junk of the same four
kinds, made by an earlier form of the generator below: junk of your own is the fairer judge.
Only the methods with a reference (`--methods`) see the reference sample.
All times are processor seconds of one thread, so a busy machine does not change the ratio.
"""

import argparse
import base64
import json
import random
import statistics
import time

import numpy as np
import torch
from short_training import train_short

from llmbook.architecture import Decoder, initialise_weights
from llmbook.cleaning import clean_text
from llmbook.core import Table, set_seed
from llmbook.documents import cut_text
from llmbook.duplicates import find_near_duplicates, split_documents
from llmbook.environment import list_distributions, read_environment
from llmbook.objectives import Autoregressive, heldout_bits_per_byte
from llmbook.pretraining import PretrainSettings, choose_shape
from llmbook.quality import PerplexityScorer, classifier_scores, judge_corpus
from llmbook.selection import (
    amount_to_reach, hashed_vectors, score_density, score_nearness, score_perplexity, select_documents, selection_gain,
)
from llmbook.tokenization import encode_plain, train_tokenizer

LINKS = (
    "Home|Products|About us|Contact|Blog|Careers|Support|Sign in|Register|Basket|Search|Help centre|Privacy policy|"
    "Terms of use|Cookie settings|Newsletter|Download|Community|Forum|Events|Press|Partners|Pricing|Documentation|"
    "Site map|Languages|Follow us|Share|Print this page|Back to top|Next|Previous|Read more|Show all|Related articles|"
    "Most read|Categories|Archive|Tags|Log out"
).split("|")
ROWS, CONTEXT = 8, 128  # of a step
LENGTHS = (0.3, 0.38, 0.46, 0.58)  # of the filtered runs, as shares of the raw run


def size_of(texts: list[str]) -> int:
    """Bytes of some texts."""
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def shuffled(draw: random.Random, texts: list[str]) -> list[str]:
    """A document with its words in random order."""
    words = draw.choice(texts).split()
    return [" ".join(draw.sample(words, len(words)))]


def navigation(draw: random.Random, texts: list[str]) -> list[str]:
    """The frame of a web page."""
    lines = []
    for _ in range(draw.randint(10, 40)):
        kind = draw.random()
        if kind < 0.4:
            lines.append(draw.choice([" | ", " > ", " · "]).join(draw.sample(LINKS, draw.randint(3, 8))))
        elif kind < 0.8:
            lines.append(draw.choice(["* ", "- ", ""]) + draw.choice(LINKS))
        elif kind < 0.9:
            lines.append(f"© {draw.randint(1999, 2026)} All rights reserved. {draw.choice(LINKS)}")
        else:
            lines.append(f"This site uses cookies. Accept all | Reject | {draw.choice(LINKS)}")
    return ["\n".join(lines)]


def repeated(draw: random.Random, texts: list[str]) -> list[str]:
    """Copies of one document."""
    return [draw.choice(texts)] * draw.randint(8, 20)


def noise(draw: random.Random, texts: list[str]) -> list[str]:
    """What machines write for machines."""
    size, kind = draw.randint(800, 3000), draw.randrange(4)
    raw = draw.randbytes(size // 3)
    if kind == 0:
        level = lambda: draw.choice(["INFO", "WARN", "ERROR", "DEBUG"])
        return ["\n".join(
            f"2026-{draw.randint(1, 12):02}-{draw.randint(1, 28):02}T{draw.randint(0, 23):02}:{draw.randint(0, 59):02}Z "
            f"{level()} [worker-{draw.randint(0, 63)}] req={draw.getrandbits(64):016x} took={draw.randint(1, 9999)}ms"
            for _ in range(size // 80)
        )]
    if kind == 1:
        return ["\n".join(f"{i:08x}  {raw[i : i + 16].hex(' ')}" for i in range(0, len(raw), 16))]
    if kind == 2:
        return [base64.b64encode(draw.randbytes(size * 3 // 4)).decode()]
    name = lambda: draw.choice("abcdefghijknrt")
    return ["".join(
        f"function {name()}{draw.randint(0, 99)}({name()},{name()}){{return {name()}[{draw.randint(0, 999)}]?{name()}."
        f"{name()}({draw.getrandbits(20)}):!{draw.randint(0, 1)}}};" for _ in range(size // 60)
    )]


KINDS = {"shuffled": shuffled, "navigation": navigation, "repeated": repeated, "noise": noise}


def pollute(clean: list[str], seed: int) -> list[tuple[str, str]]:
    """(kind, text) of a pile that is half junk by bytes, in random order."""
    draw, pile = random.Random(seed), [("clean", text) for text in clean]
    for kind, make in KINDS.items():
        size = 0
        while size < size_of(clean) / 4:
            found = make(draw, clean)
            size += size_of(found)
            pile += [(kind, text) for text in found]
    draw.shuffle(pile)
    return pile


def read_corpus(megabytes: float) -> tuple[list[str], list[str], list[str]]:
    """Training, reference and held-out text; near twins are on one side."""
    names = ("numpy", "pandas", "scikit-learn", "torch")
    packages = [found for found in list_distributions() if found.name in names]
    documents = [d for d in read_environment(distributions=packages, share=1.5e6) if len(d.body) > 200]
    labels = find_near_duplicates([d.body for d in documents])
    documents = [d for i, d in enumerate(documents) if labels[i] == i]
    clusters = find_near_duplicates([d.body for d in documents], 0.5)
    sides = split_documents(documents, clusters.tolist(), 0.04, 0.04)
    parts = {side: [] for side in ("train", "validation", "test")}
    for document, side in zip(documents, sides, strict=True):
        parts[side] += cut_text(document.body, 3000)
    random.Random(0).shuffle(parts["train"])
    ends = np.cumsum([len(text.encode()) for text in parts["train"]])
    count = int(np.searchsorted(ends, megabytes * 1e6)) + 1
    return parts["train"][:count], parts["validation"], parts["test"]


class Stream:
    """Texts as one array of token ids."""

    def __init__(self, texts: list[str], tokenizer):
        rows = encode_plain(tokenizer, texts)
        self.tokens = np.array([i for row in rows for i in [*row, tokenizer.eos_token_id]], np.uint16)
        self.bytes, self.vocabulary = size_of(texts), len(tokenizer)


def fit(texts: list[str], tokenizer, held_out: list[str], steps: int, options: argparse.Namespace, seed: int) -> dict:
    """Train the decoder with a whole schedule; held-out bits per byte and processor seconds."""
    stream, held = Stream(texts, tokenizer), Stream(held_out, tokenizer)
    set_seed(seed)
    model = Decoder(choose_shape(PretrainSettings(options.depth, options.width, CONTEXT), stream.vocabulary))
    initialise_weights(model)
    objective = Autoregressive(stream.tokens, CONTEXT, ROWS, seed)
    spent, tokens = train_short(model, objective, steps, seed, learning_rate=options.rate), steps * ROWS * CONTEXT
    return {"loss": heldout_bits_per_byte(model, held), "tokens": tokens, "seconds": spent["CPU seconds"],
            "epochs": tokens / len(stream.tokens)}


def keep_filtered(texts: list[str]) -> np.ndarray:
    """Indices of what the whole filter keeps."""
    cleaned = [clean_text(text) for text in texts]
    labels = find_near_duplicates(cleaned)
    fresh = np.flatnonzero((labels == np.arange(len(labels))) & np.array([bool(text.strip()) for text in cleaned]))
    reasons = judge_corpus([cleaned[i] for i in fresh])
    return np.array([i for i, reason in zip(fresh, reasons, strict=True) if not reason])


def count_recall(pile: list[tuple[str, str]], kept: np.ndarray) -> dict[str, float]:
    """Share of the bytes of each kind that is removed; of copies, those beyond the first of a text count as junk."""
    seen, found = {text for kind, text in pile if kind == "clean"}, {}
    chosen = set(kept.tolist())
    left = {text for i, (_, text) in enumerate(pile) if i in chosen}
    for kind in KINDS:
        mine = [(i, text) for i, (k, text) in enumerate(pile) if k == kind]
        gone = sum(len(text) for i, text in mine if i not in chosen)
        found[kind] = gone / sum(len(text) for _, text in mine)
    lost = sum(len(text) for text in seen - left)  # a clean text is lost if no copy of it stays
    removed = [(kind, text) for i, (kind, text) in enumerate(pile) if i not in chosen]
    junk = sum(len(text) for kind, text in removed if kind != "clean" or text in left)
    found["precision"] = junk / max(sum(len(text) for _, text in removed), 1)
    found["clean lost"] = lost / sum(map(len, seen))
    return found


def measure(pile: list[tuple[str, str]], held_out: list[str], options: argparse.Namespace, seed: int) -> dict:
    """The raw run, the filtered runs of rising length, and the gain."""
    texts = [text for _, text in pile]
    plain = train_tokenizer(texts, options.vocabulary)
    whole = len(Stream(texts, plain).tokens) // (ROWS * CONTEXT)
    raw = fit(texts, plain, held_out, whole, options, seed)
    start = time.process_time()
    kept = keep_filtered(texts)
    cost = time.process_time() - start
    chosen = [texts[i] for i in kept]
    own = train_tokenizer(chosen, options.vocabulary)
    result = {"raw": raw, "filter seconds": cost, "removed": count_recall(pile, kept), "bytes kept": size_of(chosen)}
    speed = raw["tokens"] / raw["seconds"]
    for name, tokenizer in (("own tokenizer", own), ("tokenizer of the pile", plain)):
        runs = []
        for share in LENGTHS:
            runs.append(fit(chosen, tokenizer, held_out, int(whole * share), options, seed))
            done = runs[-1]
            print(f"  seed {seed}, {name}: {done['tokens']:,} tokens, {done['loss']:.4f} against {raw['loss']:.4f} "
                  f"after {raw['tokens']:,}", flush=True)
            if runs[-1]["loss"] <= raw["loss"]:
                break
        needed = amount_to_reach([run["tokens"] for run in runs], [run["loss"] for run in runs], raw["loss"])
        result[name] = {
            "runs": runs, "tokens": needed, "gain": raw["tokens"] / needed,
            "gain, selection paid": selection_gain(raw["tokens"], needed, cost, speed),
        }
    return result


def compare_methods(
    pile: list[tuple[str, str]], reference: list[str], held_out: list[str], options: argparse.Namespace, seed: int
) -> list[dict]:
    """Each selection at the same number of tokens, a quarter of the raw run: loss, cost and how much of the choice is clean."""
    texts = [text for _, text in pile]
    tokenizer = train_tokenizer(texts, options.vocabulary)
    sizes = np.array([len(row) + 1 for row in encode_plain(tokenizer, texts)])
    budget = sizes.sum() / 4

    def among_kept(score) -> np.ndarray:
        kept = keep_filtered(texts)
        scores = np.full(len(texts), -np.inf)
        scores[kept] = score([texts[i] for i in kept])
        return scores

    def near() -> np.ndarray:
        both = hashed_vectors([*texts, *reference])
        return score_nearness(both[: len(texts)], both[len(texts) :])

    methods = {
        "random": (lambda: np.zeros(len(texts)), 1.0),
        "filter": (lambda: among_kept(lambda kept: np.zeros(len(kept))), 1.0),
        "filter, then density": (lambda: among_kept(lambda kept: score_density(hashed_vectors(kept))), 1.0),
        "density": (lambda: score_density(hashed_vectors(texts)), 1.0),
        "perplexity, head": (lambda: score_perplexity(PerplexityScorer(reference).surprise(texts)), 0.0),
        "perplexity, middle": (lambda: score_perplexity(PerplexityScorer(reference).surprise(texts), "middle"), 0.0),
        "classifier": (lambda: classifier_scores(texts, reference), 0.0),
        "nearness": (near, 0.0),
    }
    rows = []
    for name, (score, temperature) in methods.items():
        start = time.process_time()
        chosen = select_documents(score(), sizes, budget, temperature, seed)
        cost = time.process_time() - start
        run = fit([texts[i] for i in chosen], tokenizer, held_out, int(budget) // (ROWS * CONTEXT), options, seed)
        clean = sum(sizes[i] for i in chosen if pile[i][0] == "clean")
        rows.append({
            "selection": name, "bits per byte": round(run["loss"], 3),
            "clean share": round(float(clean / sizes[chosen].sum()), 2),
            "cost [CPU s]": round(cost, 2), "share of the training": f"{cost / run['seconds']:.0%}",
        })
        print("  ", rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--megabytes", type=float, default=0.7, help="clean text; as much junk is added")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--methods", action="store_true", help="also compare the selections at equal tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clean, reference, held_out = read_corpus(options.megabytes)
    print(f"clean {size_of(clean):,} bytes, reference {size_of(reference):,}, held out {size_of(held_out):,}", flush=True)
    results, rows = [], []
    for seed in range(options.seeds):
        found = measure(pollute(clean, seed), held_out, options, seed)
        results.append(found)
        rows += [{
            "seed": seed, "filtered run with": name, "raw tokens": found["raw"]["tokens"],
            "bits per byte": round(found["raw"]["loss"], 3),
            "tokens needed": round(found[name]["tokens"]), "times fewer": round(found[name]["gain"], 2),
            "selection paid": round(found[name]["gain, selection paid"], 2),
        } for name in ("own tokenizer", "tokenizer of the pile")]
    print(Table(rows, "Tokens to the loss of the raw run"))
    removed = [
        {"seed": seed, **{kind: round(share, 3) for kind, share in found["removed"].items()},
         "filter [CPU s]": round(found["filter seconds"], 1)} for seed, found in enumerate(results)
    ]
    print(Table(removed, "What the filter removes: share of the bytes of each kind"))
    for name in ("own tokenizer", "tokenizer of the pile"):
        gains = [found[name]["gain, selection paid"] for found in results]
        print(f"{name}: median {statistics.median(gains):.2f}×, {min(gains):.2f}–{max(gains):.2f}, selection paid")
    table = compare_methods(pollute(clean, 0), reference, held_out, options, 0) if options.methods else []
    if table:
        print(Table(table, "Selections at equal tokens, a quarter of the raw run, tokenizer of the pile"))
    if options.result:
        with open(options.result, "w", encoding="utf-8") as stream:
            json.dump({"settings": vars(options), "seeds": results, "methods": table}, stream, indent=1)


if __name__ == "__main__":
    main()
