"""Repeated spans, the same meaning, benchmarks in the corpus: against plain Python, and at their edges."""

import re
import unicodedata

import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmbook.core import InputError
from llmbook.documents import Ledger
from llmbook.redundancy import (
    cluster_vectors, diversify, find_contamination, find_repeats, find_semantic_duplicates, hash_vectors, hash_windows,
    remove_contamination, remove_repeats, score_repetition,
)

# the same words


def by_dictionary(texts: list, length: int) -> list[list[bool]]:
    """Which tokens lie in a window that stands further up, apart from it."""
    first, covered = {}, []
    for number, tokens in enumerate(texts):
        marks = [False] * len(tokens)
        for i in range(len(tokens) - length + 1):
            place = first.setdefault(tuple(tokens[i : i + length]), (number, i))
            if place[0] < number or place[1] + length <= i:
                marks[i : i + length] = [True] * length
        covered.append(marks)
    return covered


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "ç", "Ñ", "ı"]), max_size=25), max_size=5), st.integers(1, 6))
@example([["a"] * 25], 3)
@example([["a", "b"] * 12, ["b", "a"] * 12], 5)
def test_words_equal_a_dictionary(words, length):
    texts = [" — ".join(part) for part in words]
    marked = [[False] * len(part) for part in words]
    for repeat in find_repeats(texts, length):
        assert texts[repeat.text][repeat.start : repeat.end].strip(" —") == texts[repeat.text][repeat.start : repeat.end]
        for i, match in enumerate(re.finditer(r"\w+", texts[repeat.text])):
            if repeat.start <= match.start() < repeat.end:
                marked[repeat.text][i] = True
    assert marked == by_dictionary([[word.lower() for word in part] for part in words], length)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="ab\n", max_size=40), max_size=4), st.integers(1, 6))
def test_bytes_equal_a_dictionary(texts, length):
    marked = [[False] * len(text) for text in texts]
    for repeat in find_repeats(texts, length, "bytes"):
        marked[repeat.text][repeat.start : repeat.end] = [True] * (repeat.end - repeat.start)
    assert marked == by_dictionary(texts, length)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="éèя\U0001f375a", max_size=20), max_size=4), st.integers(1, 6))
def test_bytes_never_cut_a_letter(texts, length):
    kept = remove_repeats(texts, length, "bytes")
    for repeat in find_repeats(texts, length, "bytes"):
        span = texts[repeat.text][repeat.start : repeat.end]
        assert span and span.encode() in "\0".join(texts).encode()
    assert all(part.encode().decode() == part for part in kept)


@pytest.mark.parametrize("period", [1, 2, 7, 49, 50, 51])
def test_a_megabyte_of_little(period):
    text = ("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[:period] * (10**6 // period + 1))[: 10**6]
    (kept,) = remove_repeats([text], 50, "bytes")
    assert text.startswith(kept) and 50 <= len(kept) <= 50 + 2 * period
    found = find_repeats([text], 50, "bytes")
    assert sum(repeat.end - repeat.start for repeat in found) + len(kept) == 10**6


def test_words_of_one_kind_end_soon():
    (kept,) = remove_repeats(["tea " * 200_000], 50)
    assert kept.split() == ["tea"] * 50


def test_first_occurrence_stays_and_the_ledger_knows():
    passage = " ".join(f"word{i}" for i in range(60))
    texts = [f"One. {passage}. End.", "Nothing.", f"Two: {passage.upper()}! More.", passage]
    ledger = Ledger()
    kept = remove_repeats(texts, 50, ledger=ledger, names=["a", "b", "c", "d"])
    assert kept == [texts[0], "Nothing.", "Two: More.", ""]
    step = ledger.steps["repeated spans"]
    assert step["count"] == 2 and step["bytes"] == 2 * len(passage)
    assert [(sample["what"], sample["reason"]) for sample in step["samples"]] == [("c", "stands in a"), ("d", "stands in a")]
    assert remove_repeats(kept, 50) == kept
    assert find_repeats(texts, 61) == []


@pytest.mark.parametrize("texts", [[], [""], ["", "?!"], ["a b c"]])
@pytest.mark.parametrize("unit", ["words", "bytes"])
def test_nothing_repeats_in_nothing(texts, unit):
    assert find_repeats(texts, 50, unit) == [] and remove_repeats(texts, 50, unit) == texts


def test_windows_are_told_apart():
    draw = numpy.random.default_rng(0)
    tokens = draw.integers(0, 2**64, 2, numpy.uint64)[draw.integers(0, 2, 4000)]  # two letters
    for length in (1, 2, 3, 12, 13, 50, 1024, 4000):
        windows = {tokens[i : i + length].tobytes() for i in range(len(tokens) - length + 1)}
        assert len(set(hash_windows(tokens, length).tolist())) == len(windows)
    assert len(hash_windows(tokens, 4001)) == 0


# the same meaning


def test_scores_equal_all_pairs():
    vectors = numpy.random.default_rng(1).normal(size=(300, 8))
    labels, centroids = cluster_vectors(vectors, 5)
    unit = vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)
    near = (unit * centroids[labels]).sum(1)
    score = score_repetition(3 * vectors, labels, centroids)
    for i in range(300):
        farther = numpy.flatnonzero((labels == labels[i]) & (near < near[i]))
        assert score[i] == pytest.approx((unit[farther] @ unit[i]).max(initial=-1), abs=1e-5)


def test_of_equal_vectors_one_stays():
    vectors = numpy.repeat(numpy.random.default_rng(2).normal(size=(20, 6)), 4, 0)
    gone = find_semantic_duplicates(vectors, 0.01, clusters=4)
    assert gone.reshape(20, 4).sum(1).tolist() == [3] * 20


def test_big_clusters_are_compared_in_blocks():
    vectors = numpy.random.default_rng(3).normal(size=(2500, 4))
    score = score_repetition(vectors, numpy.zeros(2500, int), numpy.ones((1, 4)))
    unit = vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)
    order = numpy.argsort(unit.sum(1), kind="stable")
    place = numpy.empty(2500, int)
    place[order] = numpy.arange(2500)
    for i in order[[0, 1, 1023, 1024, 1025, 2499]]:
        before = order[: place[i]]
        assert score[i] == pytest.approx((unit[before] @ unit[i]).max(initial=-1), abs=1e-5)


@pytest.mark.parametrize(("distinct", "untypical"), [(1, 1), (0.75, 0.75), (0.5, 0.2), (1, 0)])
def test_shares_are_kept(distinct, untypical):
    kept = diversify(numpy.random.default_rng(4).normal(size=(400, 5)), distinct, untypical, clusters=10)
    assert len(kept) == 400 * distinct * untypical and (numpy.diff(kept) > 0).all()


def test_prototypes_go_first():
    vectors = numpy.random.default_rng(5).normal(size=(300, 6))
    kept = diversify(vectors, 0.8, 0.5, clusters=8)
    left = numpy.flatnonzero(~find_semantic_duplicates(vectors, keep=0.8, clusters=8))
    labels, centroids = cluster_vectors(vectors[left], 8)  # again, on what is left
    unit = vectors[left] / numpy.linalg.norm(vectors[left], axis=1, keepdims=True)
    near = (unit * centroids[labels]).sum(1)
    assert set(kept.tolist()) == set(left[numpy.argsort(near)[:120]].tolist())
    assert near[numpy.isin(left, kept)].max() <= near[~numpy.isin(left, kept)].min()


@pytest.mark.parametrize("vectors", [numpy.zeros((0, 3)), numpy.ones(4), [[numpy.inf, 1.0]], numpy.ones((2, 2, 2))])
def test_arrays_that_are_no_vectors(vectors):
    for function in (find_semantic_duplicates, diversify, cluster_vectors):
        with pytest.raises(InputError, match="finite numbers"):
            function(vectors)


def test_few_vectors():
    assert diversify(numpy.ones((1, 2)), 1, 1).tolist() == [0]
    assert not find_semantic_duplicates(numpy.zeros((3, 2))).any()  # no words, no meaning
    assert hash_vectors([]).shape == (0, 512) and not hash_vectors(["", "?"]).any()


@pytest.mark.parametrize("language", ["en", "pt", "es"])
def test_retold_texts_lie_close(language):
    told = {
        "en": ("The old lighthouse keeper climbed the stairs every evening to light the lamp for passing ships.",
               "Every evening, to light a lamp for ships that were passing, an old keeper climbed the lighthouse stairs.",
               "Bakers knead dough before dawn so that warm bread fills the shelves when shops open."),
        "pt": ("O velho faroleiro subia as escadas todas as noites para acender a lâmpada dos navios que passavam.",
               "Todas as noites, para os navios que passavam, subia o faroleiro velho as escadas e acendia a lâmpada.",
               "Os padeiros amassam o pão antes da aurora e enchem as prateleiras quando abrem as lojas."),
        "es": ("El viejo farero subía las escaleras cada noche para encender la lámpara de los barcos que pasaban.",
               "Cada noche subía el farero viejo las escaleras y, para los barcos que pasaban, encendía su lámpara.",
               "Los panaderos amasan el pan antes del alba y llenan los estantes cuando abren las tiendas."),
    }[language]  # fmt: skip
    vectors = hash_vectors([*told, "one two three", "uno dos tres"], 4096)
    assert vectors[0] @ vectors[1] > 0.6 > 0.4 > vectors[0] @ vectors[2]


# the same test


def share_by_sets(document: str, item: str, n: int) -> float:
    split = lambda text: re.findall(r"\w+", unicodedata.normalize("NFC", text).lower())
    n = min(n, len(split(item)))
    runs = lambda words: {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    return len(runs(split(document)) & runs(split(item))) / len(runs(split(item)))


LETTERS = st.lists(st.sampled_from(["a", "B", "é", "—", "ñ"]), max_size=30).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(st.lists(LETTERS, max_size=5), st.lists(LETTERS, min_size=1, max_size=4), st.integers(1, 5), st.sampled_from([0, 0.5, 1]))
def test_contamination_equals_sets(texts, items, n, share):
    found = {(match.document, match.item): match.share for match in find_contamination(iter(texts), items, n, share, shortest=3)}
    expected = {
        (d, str(i)): part for d, text in enumerate(texts) for i, item in enumerate(items)
        if len(re.findall(r"\w+", item)) >= 3 and (part := share_by_sets(text, item, n)) > 0 and part >= share
    }
    assert found == pytest.approx(expected)


QUESTIONS = {
    "en": "Which of these four rivers, counted from its source to the sea, flows through the largest number of countries?",
    "pt": "Qual é a soma dos ângulos internos de um polígono convexo que tem exatamente onze vértices e nenhuma simetria?",
    "es": "¿Cuántos años tenía la abuela cuando nació su nieta, si hoy la suma de sus edades llega a noventa y seis?",
}  # fmt: skip


@pytest.mark.parametrize("language", list(QUESTIONS))
@pytest.mark.parametrize("change", [
    str, str.upper, lambda text: unicodedata.normalize("NFD", text), lambda text: re.sub(r"[ ,]+", "…\n", text),
    lambda text: text.replace("o", "o"),
], ids=["same", "capitals", "decomposed", "punctuation", "copy"])
def test_leaks_in_three_languages(language, change):
    texts = ["Nothing here.", f"Antes. {change(QUESTIONS[language])} Depois.", QUESTIONS["en"][:30]]
    (match,) = find_contamination(texts, QUESTIONS)
    assert (match.document, match.item, match.share) == (1, language, 1.0)
    plain = lambda text: re.findall(r"\w+", unicodedata.normalize("NFC", text).lower())
    assert plain(match.text) == plain(QUESTIONS[language])
    (left,) = list(remove_contamination(texts, [match], "spans", 0))[1:2]
    assert left.startswith("Antes. ") and left.endswith("Depois.") and len(plain(left)) == 2
    assert list(remove_contamination(texts, [match])) == [texts[0], texts[2]]


def test_clean_texts_stay_clean():
    texts = [" ".join(f"w{(i * k) % 997}" for i in range(200)) for k in range(2, 40)]
    assert find_contamination(texts, QUESTIONS) == [] and list(remove_contamination(texts, [])) == texts


def test_a_stream_is_read_once_and_not_kept():
    read = []

    def stream():
        for i in range(2000):
            read.append(i)
            yield f"{i} " * 300 + (QUESTIONS["pt"] if i == 1777 else "")

    (match,) = find_contamination(stream(), QUESTIONS)
    assert match.document == 1777 and read == list(range(2000))


def test_margins_and_the_ledger():
    text = "a" * 300 + " " + QUESTIONS["en"] + " Answer: the Danube. " + "b" * 300
    matches, ledger = find_contamination([text], QUESTIONS), Ledger()
    (left,) = remove_contamination([text], matches, "spans", 50, ledger)
    assert "Danube" not in left and "river" not in left and left.startswith("a" * 200) and left.endswith("b" * 200)
    assert ledger.steps["benchmark in the corpus"]["bytes"] == len(text) - len(left)


def test_short_items_are_reported():
    ledger = Ledger()
    assert find_contamination(["Yes, it is."], {"q": "Yes, it is.", "none": ""}, ledger=ledger) == []
    assert ledger.counts() == {"items too short to search": 2}
    assert len(find_contamination(["Yes, it is."], {"q": "Yes, it is."}, shortest=3)) == 1


def test_bad_input():
    for call in (
        lambda: find_repeats("text"), lambda: find_repeats([1]), lambda: find_repeats(["a"], 0),
        lambda: find_repeats(["a"], 1, "lines"), lambda: find_contamination("text", ["a"]),
        lambda: find_contamination(["text"], []), lambda: find_contamination([3], ["a b c d e f g h i"]),
        lambda: find_contamination(["a"], ["b"], 0), lambda: find_contamination(["a"], ["b"], share=1.5),
        lambda: remove_contamination([], [], "all"), lambda: diversify(numpy.eye(3), 0), lambda: hash_vectors(["a"], 0),
        lambda: find_semantic_duplicates(numpy.eye(3), -1), lambda: cluster_vectors(numpy.eye(3), 4),
    ):
        with pytest.raises(InputError):
            call()
