"""What the sentence encoder adds to search by words, and what smaller vectors cost.

    python benchmarks/encoder_quality.py [RESULT.json] [--corpus FOLDER] [--encoder FOLDER] [--questions 1000]

Held-out questions of a corpus (built if none is given), by form: those that name the symbol, those that describe it,
and keywords. `bm25s` searches whole documents with its defaults; `words` is our index of chunks without vectors. The share of
meaning is calibrated on validation questions. Intervals: 95 % of 2,000 paired bootstrap samples of documents.
"""

import argparse
import json
import tempfile
from pathlib import Path

import bm25s
import numpy as np
import pandas as pd

from llmbook.compression import CompactVectors, cut_vectors, places_found, quantize_vectors, search_binary
from llmbook.core import Table
from llmbook.data import CorpusSettings, build_corpus, load_pairs
from llmbook.encoder import (
    SentenceEncoderSettings,
    build_encoder,
    encode_texts,
    grade_pairs,
    load_encoder,
    spearman_correlation,
)
from llmbook.rag import IndexSettings, calibrate, read_corpus
from llmbook.retrieval import LEAD, evaluate_retrieval, fuse_scores, index_documents, score_ranks, spread

METRIC = "ndcg@10"


def read_questions(corpus: Path, split: str, count: int) -> pd.DataFrame:
    "A sample of the questions of a split, with their form."
    pairs = load_pairs(corpus, split)
    pairs = pairs.sample(min(count, len(pairs)), random_state=0).reset_index(drop=True)

    def form(question: str, symbol: str) -> str:
        return "named" if symbol in question else "keywords" if question == question.lower() else "described"

    if "form" not in pairs:
        pairs["form"] = [form(*both) for both in zip(pairs["question"], pairs["symbol"], strict=True)]
    return pairs


def interval(difference: np.ndarray, documents: pd.Series) -> tuple[float, float]:
    "95 % interval of a mean, with all questions of a document drawn together."
    code = pd.factorize(documents)[0]
    sums, counts = np.bincount(code, difference), np.bincount(code)
    drawn = np.random.default_rng(0).integers(0, len(sums), (2000, len(sums)))
    return tuple(np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5]).tolist())


def by_library(documents: pd.DataFrame, pairs: pd.DataFrame) -> np.ndarray:
    "nDCG@10 of bm25s with its defaults, on whole documents."
    cut = lambda texts, **how: bm25s.tokenize(texts, stopwords="en", show_progress=False, **how)
    engine = bm25s.BM25()
    engine.index(cut(documents["text"].tolist()), show_progress=False)
    found, _ = engine.retrieve(cut(pairs["question"].tolist(), return_ids=False), k=10, show_progress=False)
    right = documents.reset_index().set_index("id").loc[pairs["document"], "index"].to_numpy()
    place = places_found(found, right)
    return score_ranks(np.where(place < 10, place + 1, 0))[METRIC]


class Chunks:
    "All scores of all chunks, to compare vectors of many kinds."

    def __init__(self, index, encoder, pairs: pd.DataFrame):
        frame = index.chunks.to_pandas()
        self.documents, names = pd.factorize(frame["document"])
        self.starts = np.flatnonzero(np.diff(self.documents, prepend=-1))
        self.right = pd.Series(range(len(names)), index=names).loc[pairs["document"]].to_numpy()
        texts = [f"{h}\n{t[:LEAD]}\n{t}" for h, t in zip(frame["header"], frame["text"], strict=True)]
        self.stored, self.asked = encode_texts(encoder, texts), encode_texts(encoder, pairs["question"].tolist())
        self.words = np.stack([index.words.scores(spread(index.read(q))) for q in pairs["question"]])

    def measure(self, scores: np.ndarray) -> np.ndarray:
        "nDCG@10 of each question, by the best chunk of each document."
        best = np.maximum.reduceat(scores, self.starts, axis=1)
        mine = np.take_along_axis(best, self.right[:, None], 1)
        return score_ranks((best >= mine).sum(1))[METRIC]

    def measure_list(self, rows: np.ndarray) -> np.ndarray:
        "nDCG@10 of lists of chunks."
        order = [list(dict.fromkeys(found)) for found in self.documents[rows].tolist()]
        ranks = [o.index(r) + 1 if r in o else 0 for o, r in zip(order, self.right.tolist(), strict=True)]
        return score_ranks(ranks)[METRIC]

    def fused(self, scores: np.ndarray, share: float) -> np.ndarray:
        "nDCG@10 of a mixture with the words."
        return self.measure(np.stack([fuse_scores(w, s, share) for w, s in zip(self.words, scores, strict=True)]))


def rows_of_forms(values: dict[str, np.ndarray], pairs: pd.DataFrame) -> list[dict]:
    "nDCG@10 by form; then what fusion adds, with intervals."
    parts = {"all": np.ones(len(pairs), bool)} | {f: (pairs["form"] == f).to_numpy() for f in pairs["form"].unique()}
    rows = [{"": name} | {f: float(v[rows].mean()) for f, rows in parts.items()} for name, v in values.items()]
    for base in ("bm25s", "words"):
        row = {"": f"fused − {base}"}
        for form, part in parts.items():
            difference = (values["fused"] - values[base])[part]
            low, high = interval(difference, pairs["document"][part])
            row[form] = f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        rows.append(row)
    return rows


def rows_of_sizes(chunks: Chunks, pairs: pd.DataFrame, share: float) -> list[dict]:
    "nDCG@10 of smaller vectors alone, rescored by the whole ones, and fused with words."
    stored, asked = chunks.stored, chunks.asked
    width, rows = stored.shape[1], []
    whole = asked @ stored.T
    full, mixed = chunks.measure(whole), chunks.fused(whole, share)

    def add(name: str, size: float, alone: np.ndarray, fused: np.ndarray | None = None) -> None:
        low, high = (1 + x / full.mean() for x in interval(alone - full, pairs["document"]))
        row = {"vectors": name, "bytes": size, METRIC: float(alone.mean()), "kept": f"{alone.mean() / full.mean():.1%}"}
        row |= {"interval": f"{low:.1%}–{high:.1%}", "fused": "" if fused is None else float(fused.mean())}
        rows.append(row | {"kept, fused": "" if fused is None else f"{fused.mean() / mixed.mean():.1%}"})

    add(f"{width} floats", 4 * width, full, mixed)
    for part in (2, 4, 8, 16):
        scores = cut_vectors(asked, width // part) @ cut_vectors(stored, width // part).T
        add(f"{width // part} floats", 4 * width // part, chunks.measure(scores), chunks.fused(scores, share))
        near = np.sort(np.argpartition(-scores, 100, axis=1)[:, :100], axis=1)
        again = np.take_along_axis(whole, near, 1)
        listed = np.take_along_axis(near, np.argsort(-again, axis=1, kind="stable"), 1)
        add(f"{width // part} floats, 100 rescored by all", 4 * width // part, chunks.measure_list(listed))
    bytes_ = quantize_vectors(stored, "int8")
    scores = asked @ bytes_.restore().T
    add(f"{width} bytes", width, chunks.measure(scores), chunks.fused(scores, share))
    bits = quantize_vectors(stored, "binary")

    def listed_by_bits(depth: int, finer: CompactVectors | None = None) -> np.ndarray:
        return chunks.measure_list(search_binary(asked, bits, 100, depth, finer)[1])

    signs = asked @ bits.restore().T
    add(f"{width} bits", width // 8, chunks.measure_list(np.argsort(-(np.sign(asked) @ bits.restore().T), 1)[:, :100]))
    add(f"{width} bits, rescored by the question", width // 8, listed_by_bits(200), chunks.fused(signs, share))
    add(f"{width} bits, 200 rescored by bytes", width // 8 + width, listed_by_bits(200, bytes_))
    return rows


def main() -> None:
    "Build what is missing, measure and print."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--questions", type=int, default=1000)
    chosen = parser.parse_args()
    room = Path(tempfile.mkdtemp())
    corpus, folder = chosen.corpus or room / "corpus", chosen.encoder or room / "encoder"
    for made in {room / "corpus", room / "encoder"} & {corpus, folder}:
        made.mkdir()
    if not chosen.corpus:
        build_corpus(CorpusSettings(), {}, corpus)
    if not chosen.encoder:
        build_encoder(SentenceEncoderSettings(), {"corpus": corpus}, folder)
    documents, encoder = read_corpus(corpus), load_encoder(folder)
    index = index_documents(documents, encoder)
    share = calibrate(index, load_pairs(corpus, "validation"), IndexSettings().calibration_questions)["share"]
    pairs = read_questions(corpus, "test", chosen.questions)
    found = evaluate_retrieval(index, pairs)
    names = {"sparse": "words", "dense": "vectors", "hybrid": "fused", "reranked": "re-ranked"}
    values = {"bm25s": by_library(documents, pairs)} | {new: found[old][METRIC] for old, new in names.items()}
    forms, counts = rows_of_forms(values, pairs), pairs["form"].value_counts().to_dict()
    told = ", ".join(f"{form} {count}" for form, count in counts.items())
    print(Table(forms, f"{METRIC}; {len(documents):,} documents, {len(index):,} chunks; {told}; share of meaning {share}"))
    chunks = Chunks(index, encoder, pairs)
    sizes = rows_of_sizes(chunks, pairs, share)
    print(Table(sizes, f"\n{METRIC} of smaller vectors, by the best chunk of each document"))
    leads = pairs[pairs["form"] != "named"].drop_duplicates("document")
    texts = documents.set_index("id").loc[leads["document"], "text"].str[:1000].tolist()
    left, right, grade = grade_pairs(leads["symbol"].tolist())
    a, b = encode_texts(encoder, leads["question"].tolist()), encode_texts(encoder, texts)
    spearman = spearman_correlation((a[left] * b[right]).sum(1), grade)
    print(f"\nSpearman's correlation of cosines with grades (same symbol, module, other): {spearman:.2f}, {len(grade):,} pairs")
    if chosen.result:
        result = {"forms": forms, "sizes": sizes, "share": share, "spearman": spearman, "questions": counts}
        Path(chosen.result).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
