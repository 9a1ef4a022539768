"""Retrieval and answers beyond the notebooks' pages: hand-overs, damage, odd input, properties."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.core import CorruptFileError, InputError, seal
from llmbook.rag import (
    IndexSettings, answer_folder, answer_question, build_index, check_citation, is_faithful,
    measure_answers, rerank, split_spans, tidy_quote, unanswerable_questions,
)
from llmbook.retrieval import (
    Index, WordIndex, chunk_text, evaluate_retrieval, find_names, index_documents, index_terms,
    names_match, score_ranks,
)

PAGES = {
    "kettle.boil": "Heat water until it boils.\n\n"
    "If *whistle* is true (default: ``False``), sound a whistle at the end.",
    "kettle.pour": "Pour the water into a cup.\n\nParameters\n----------\ncup : str\n    Where the water goes.\n"
    "speed : float, optional\n    Litres per minute.\n\nReturns\n-------\nfloat\n    Litres that are left.",
    "tin.open": "Open the tin and smell the tea. Raises an error if the tin is empty.",
    "tin.count_leaves": "Count the leaves in the tin, the broken ones too.",
    "cup": "Cups of clay and of steel.\n\nA clay cup keeps tea warm. A steel cup does not break.",
}


class Letters:
    "An encoder of letter pairs: near enough for a test, and there is nothing to load."

    def __init__(self, width=64, shift=0):
        self.width, self.shift = width, shift

    def encode(self, texts, **options):
        vectors = np.zeros((len(texts), self.width), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for a, b in zip(text.lower(), text.lower()[1:], strict=False):
                row[(31 * ord(a) + ord(b) + self.shift) % self.width] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


@pytest.fixture(scope="module")
def documents():
    rows = []
    for symbol, page in PAGES.items():
        call = "" if symbol == "cup" else f"{symbol}(cup, *, whistle=False)"
        rows.append({
            "id": symbol, "text": f"{call or symbol}\n\n{page}", "symbol": symbol, "signature": call,
            "kind": "function" if call else "module", "source": "tea 1.0", "module": symbol.split(".")[0],
            "licence": "MIT", "language": "en", "collected": "2026-01-01", "sha256": "",
        })
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def index(documents):
    return index_documents(documents, Letters())


@pytest.mark.parametrize("question, symbol, words", [
    ("what does kettle.boil do?", "kettle.boil", "Heat water"),
    ("what does whistle mean in kettle.boil?", "kettle.boil", "sound a whistle"),
    ("what is speed in kettle.pour?", "kettle.pour", "Litres per minute"),
    ("what does kettle.pour return?", "kettle.pour", "Litres that are left"),
    ("how do I count leaves?", "tin.count_leaves", "Count the leaves"),
    ("which cup does not break?", "cup", "does not break"),
    ("what is the signature of tin.open?", "tin.open", "tin.open("),
])
def test_answers_are_found_and_verbatim(index, documents, question, symbol, words):
    answer = answer_question(index, question)
    texts = dict(zip(documents["id"], documents["text"], strict=True))
    assert not answer.abstained, answer.reason
    assert answer.citations[0].symbol == symbol and words in answer.text
    assert all(check_citation(citation, texts[citation.document]) for citation in answer.citations)
    assert answer.citations[0].licence == "MIT" and answer.citations[0].source == "tea 1.0"


@pytest.mark.parametrize("question, word", [
    ("who won the chess match in Vienna?", "chess"),
    ("what does kettle.explode do?", "kettle.explode"),
    ("is kettle.boil dangerous?", "dangerous"),
    ("`tin.shut`", "tin.shut"),
])
def test_silence_has_a_reason(index, question, word):
    answer = answer_question(index, question)
    assert answer.abstained and answer.text == "" and word in answer.reason


def test_near_names_are_proposed(index):
    assert "kettle.boil" in answer_question(index, "what does kettle.boyl do?").reason


@pytest.mark.parametrize("question", ["", "   ", "\n"])
def test_empty_question_is_refused(index, question):
    with pytest.raises(InputError):
        answer_question(index, question)


ODD = ["?", "…", "🍵", "the of and", "\0\0", "a" * 20_000, "`" * 50, "((((", "日本語の質問"]


@pytest.mark.parametrize("question", ODD)
def test_odd_questions_do_no_harm(index, question):
    assert answer_question(index, question).abstained


def test_index_survives_the_disk(index, tmp_path):
    index.save(tmp_path / "index")
    again = Index.load(tmp_path / "index", Letters())
    for question in ("boil water", "tea", "cup of steel"):
        assert again.search(question) == index.search(question)
        assert answer_question(again, question) == answer_question(index, question)
    by_words = Index.load(tmp_path / "index")
    assert by_words.search("boil water")[0].symbol == "kettle.boil"
    with pytest.raises(InputError, match="no vectors"):
        by_words.search("boil", mode="dense")


@pytest.mark.parametrize("other", [Letters(width=32), Letters(shift=1)])
def test_another_encoder_is_refused(index, tmp_path, other):
    index.save(tmp_path)
    with pytest.raises(InputError, match="another encoder"):
        Index.load(tmp_path, other)


@pytest.mark.parametrize("name", ["vectors.faiss", "chunks.parquet", "manifest.json", "bm25/data.csc.index.npy"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_noticed(index, tmp_path, name, damage):
    index.save(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    if damage == "gone":
        (tmp_path / name).unlink()
    else:
        data[len(data) // 2] ^= 1
        (tmp_path / name).write_bytes(data[:-3] if damage == "cut" else data)
    with pytest.raises(CorruptFileError, match=re.escape(name)):
        Index.load(tmp_path, Letters())


def test_stage_reads_a_corpus(documents, tmp_path, monkeypatch):
    corpus, output = tmp_path / "corpus", tmp_path / "index"
    corpus.mkdir()
    for split, part in {"train": documents[:3], "validation": documents[3:4], "test": documents[4:]}.items():
        part.to_parquet(corpus / f"{split}.parquet")
        pairs = [{"question": f"what is {s}?", "answer": "", "document": s, "symbol": s} for s in part["symbol"]]
        pd.DataFrame(pairs).to_parquet(corpus / f"pairs-{split}.parquet")
    (tmp_path / "encoder").mkdir()
    seal(tmp_path / "encoder")
    monkeypatch.setattr("llmbook.rag.open_encoder", lambda folder: Letters())
    numbers = build_index(IndexSettings(), {"corpus": corpus, "encoder": tmp_path / "encoder"}, output)
    assert numbers["documents"] == 5 and json.loads(json.dumps(numbers)) == numbers
    index = Index.load(output, Letters())
    assert len(index.manifest["encoder"]) == 64
    assert {hit.document for hit in index.search("tin tea cup kettle water", 20)} == set(PAGES)


def test_a_cross_encoder_decides_if_given(index):
    question = index.read("water")
    hits = index.search("water tea cup", 5)
    longest = rerank(question, hits, lambda pairs: [len(passage) for _, passage in pairs])
    size = lambda hit: len(hit.text) + len(hit.header)
    assert list(map(size, longest)) == sorted(map(size, hits), reverse=True)


def test_generator_is_checked(index):
    plain = answer_question(index, "what does kettle.boil do?")
    babble = ("", "It flies to Mars.", "Heat water until it boils. Then sell the house in Paris.", "water " * 200)
    for draft in babble:
        told = answer_question(index, "what does kettle.boil do?", generate=lambda prompt, d=draft: d)
        assert told.text == plain.text
    assert is_faithful("kettle.boil heats water until it boils.", "what does kettle.boil do?", plain.citations)


def test_a_false_quotation_lowers_the_verbatim_share(index, documents):
    answer = answer_question(index, "what does kettle.boil do?")
    texts = dict(zip(documents["id"], documents["text"], strict=True))
    pairs = pd.DataFrame({"answer": ["", ""], "document": ["kettle.boil", "cup"]})
    false = replace(answer, citations=[replace(answer.citations[0], quote="Cool the water.")])
    measured = measure_answers([answer, false], pairs, texts)
    assert measured["verbatim"].tolist() == [1, 0] and measured["citation recall"].tolist() == [1, 0]


def test_modes_are_measured_on_the_same_questions(index):
    pairs = pd.DataFrame({"question": [f"what is {s}?" for s in PAGES], "document": list(PAGES)})
    measured = evaluate_retrieval(index, pairs)
    assert set(measured) == {"sparse", "dense", "hybrid", "reranked"}
    assert measured["reranked"]["recall@1"].mean() == 1.0
    assert all(len(values) == len(PAGES) for metrics in measured.values() for values in metrics.values())


def test_folder_is_indexed_once(tmp_path):
    notes, cache = tmp_path / "notes", tmp_path / "cache"
    (notes / "deep").mkdir(parents=True)
    (notes / "deep" / "plan.md").write_text("# Plan\n\nThe launch is on the ninth of May.\n")
    (notes / "noise.bin").write_bytes(bytes(range(256)) * 50)
    first = answer_folder(notes, "when is the launch?", cache=cache)
    assert "ninth of May" in first.text and first.citations[0].symbol.endswith("plan.md")
    made = next(cache.iterdir())
    stamp = made.stat().st_mtime_ns
    assert answer_folder(notes, "when is the launch?", cache=cache) == first and made.stat().st_mtime_ns == stamp
    with pytest.raises(InputError):
        answer_folder(tmp_path / "nowhere", "why?", cache=cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        answer_folder(tmp_path / "empty", "why?", cache=cache)


def test_invented_names_are_not_documented(index):
    for question in unanswerable_questions(index, 60):
        assert answer_question(index, question).abstained, question


def test_bm25_of_bm25s_is_the_same(index):
    terms = index_terms("water in a cup")
    known = [index.words.vocabulary[t] for t in dict.fromkeys(terms) if t in index.words.vocabulary]
    theirs = index.words.engine.get_scores_from_ids(known)
    assert np.allclose(index.words.scores(dict.fromkeys(terms, 1.0)), theirs, atol=1e-5)


TEXT = st.text(alphabet=st.sampled_from("ab .:\n->*`_=#(9Z\t"), max_size=400)


@settings(max_examples=150, deadline=None)
@given(TEXT, st.integers(20, 200))
def test_chunks_cover_every_text(text, size):
    chunks = chunk_text(text, size)
    ends = [0, *(b for _, b, _ in chunks)]
    starts = [*(a for a, _, _ in chunks), len(text)]
    assert all(a <= b and not text[a:b].strip() for a, b in zip(ends, starts, strict=True))


@settings(max_examples=150, deadline=None)
@given(TEXT)
def test_spans_are_ordered_and_lose_nothing(text):
    spans = split_spans(text)
    ends, starts = [0, *(s.end for s in spans)], [*(s.start for s in spans), len(text)]
    assert all(a <= b and not text[a:b].strip() for a, b in zip(ends, starts, strict=True))
    assert all(tidy_quote(text[s.start : s.end]).split() == text[s.start : s.end].split() for s in spans)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_words_of_any_text(text):
    assert all(term == term.lower() and term for term in index_terms(text.lower()))
    assert all(name in text or "." in name for name in find_names(text))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1))
def test_rank_metrics_are_in_order(ranks):
    scores = score_ranks(ranks)
    assert (scores["recall@1"] <= scores["ndcg@10"] + 1e-12).all()
    assert (scores["ndcg@10"] <= scores["recall@10"]).all() and (scores["mrr"] <= scores["ndcg@10"] + 1e-12).all()


def test_names():
    assert names_match("OrderedDict", "collections.OrderedDict") == 0.9
    assert names_match("re.match", "re.Match") < names_match("re.match", "re.match")
    assert find_names("open setup.py or data.csv, e.g. with os.path.join") == ["os.path.join"]
    assert WordIndex.build(["tea", "tea cup"]).idf("nothing") is None
