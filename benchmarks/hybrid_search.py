"""One hybrid query: our index against bm25s and FAISS called by hand, interleaved.

Usage: python benchmarks/hybrid_search.py INDEX ENCODER CORPUS [RESULT.json]

Both sides read the same folder, embed the question with the same encoder and return ten chunks. By hand means: tokenize the
question, `bm25s.retrieve` for the best 60, `index.search` for the best 60; no fusion and no chunk is fetched.
"""

import sys
import time
from pathlib import Path

import bm25s
import faiss
import numpy as np

from llmbook.core import Table, write_json
from llmbook.data import load_pairs
from llmbook.encoder import encode_texts, load_encoder
from llmbook.rag import Index  # adds the reranker to the index
from llmbook.retrieval import index_terms

ROUNDS, QUESTIONS = 5, 200


def main() -> None:
    "Measure and print."
    folder, encoder = Path(sys.argv[1]), load_encoder(Path(sys.argv[2]))
    questions = load_pairs(Path(sys.argv[3]), "test")["question"].sample(QUESTIONS, random_state=0).tolist()
    index, vectors = Index.load(folder, encoder), faiss.read_index(str(folder / "vectors.faiss"))
    engine = bm25s.BM25.load(folder / "bm25")

    def words_by_hand(question: str) -> None:
        terms = [t for t in dict.fromkeys(index_terms(question)) if t in engine.vocab_dict]
        engine.retrieve([terms], k=60, show_progress=False)

    def meaning_by_hand(question: str) -> None:
        vectors.search(encode_texts(encoder, [question]), 60)

    sides = {
        "bm25s by hand": words_by_hand, "FAISS by hand": meaning_by_hand,
        "Index.search, hybrid": lambda question: index.search(question, 10),
        "Index.retrieve, reranked": lambda question: index.retrieve(question, 10),
    }
    seconds = {name: np.zeros((ROUNDS, QUESTIONS)) for name in sides}
    for turn in range(ROUNDS):
        for i, question in enumerate(questions):
            for name, side in sides.items():
                started = time.perf_counter()
                side(question)
                seconds[name][turn, i] = time.perf_counter() - started
    each = {name: np.median(values, axis=0) * 1e3 for name, values in seconds.items()}
    each["sum by hand"] = each["bm25s by hand"] + each["FAISS by hand"]
    rows = [
        {"side": name, "p50 [ms]": float(np.percentile(x, 50)), "p95 [ms]": float(np.percentile(x, 95))}
        for name, x in each.items()
    ]
    base = rows[-1]
    for row in rows:
        row["p95 / sum by hand"] = row["p95 [ms]"] / base["p95 [ms]"]
    print(Table(rows, f"{len(index):,} chunks, {QUESTIONS} questions, median of {ROUNDS} interleaved rounds"))
    if len(sys.argv) > 4:
        write_json(sys.argv[4], {"chunks": len(index), "rows": rows})


if __name__ == "__main__":
    main()
