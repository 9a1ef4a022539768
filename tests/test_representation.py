"""Counting in parts, against scipy, and weights and samples with properties that must hold."""

import math
from collections import Counter

import numpy
import pandas
import pytest
import scipy.spatial.distance
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.core import InputError, SettingsError
from llmbook.documents import Document
from llmbook.representation import (
    Representation,
    compare_representation,
    describe_representation,
    draw_weighted,
    effective_size,
    jensen_shannon,
    kl_divergence,
    rake,
    sample_documents,
    temperature_shares,
    weigh_to_target,
)

TEXTS = {
    "en": [
        "She told the judge about Kenya in 1999.",
        "The old man is a Muslim farmer.",
        "No one is here.",
        "You may go; we must stay.",
    ],
    "pt": ["A médica angolana disse que sim.", "O menino chegou em 1987.", "Nada."],
    "es": ["La jueza chilena habló con los niños.", "Según el ministro, quizás.", "Nada."],
    "de": ["Eine Frau lacht."],
}
DOCUMENTS = [
    Document(
        text * (1 + i % 3),
        f"{language}{i}",
        "file",
        f"source {i % 4}",
        "MIT",
        language=language,
        collected=f"2024-0{1 + i % 9}-01",
    )
    for language, texts in TEXTS.items()
    for i, text in enumerate(texts * 3)
]


def state(found):
    return found.totals, found.tallies, found.documents, found.words, found.unmeasured


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=len(DOCUMENTS), max_size=len(DOCUMENTS)))
def test_parts_add_up_to_the_whole(places):
    parts = [Representation().add(d for d, p in zip(DOCUMENTS, places, strict=True) if p == part) for part in range(4)]
    assert state(sum(parts[1:], parts[0])) == state(describe_representation(reversed(DOCUMENTS)))


def test_a_stream_is_read_once_and_languages_without_lists_are_named():
    found = describe_representation(iter(DOCUMENTS))
    assert found.documents == len(DOCUMENTS) and dict(found.unmeasured) == {"de": 3}
    assert found.totals["gender"][0] == sum(row["count"] for row in found.rows("gender"))
    assert "no word lists for de" in repr(found)
    assert [row["group"] for row in found.rows("years")] == ["1980s", "1990s"]


def test_groups_that_never_occur_are_shown_with_an_honest_interval():
    rows = {row["group"]: row for row in describe_representation(DOCUMENTS).rows("religion")}
    assert rows["Muslim"]["share"] == 1 and rows["Hindu"]["share"] == 0
    assert rows["Hindu"]["high"] > 0.3, "three documents prove little"


def test_one_talkative_document_counts_as_one():
    talk = Document("She " * 400, "talk", "file", "x", "MIT")
    rows = describe_representation([talk]).rows("gender")
    assert rows[0]["share"] == 1 and rows[0]["effective"] == 1 and rows[0]["low"] < 0.3


def test_independent_mentions_count_in_full():
    draw = numpy.random.default_rng(0)
    texts = ["She" if draw.random() < 0.3 else "He" for _ in range(500)]
    row = describe_representation(pandas.DataFrame({"text": texts})).rows("gender")[0]
    assert row["effective"] == pytest.approx(500, rel=0.01)


def test_tables():
    frame = pandas.DataFrame({"text": ["A mulher", "woman"], "language": ["pt", float("nan")], "source": [None, "web"]})
    found = describe_representation(frame)
    assert {row["group"]: row["count"] for row in found.rows("language")} == {"pt": 1, "en": 1}
    assert {row["group"] for row in found.rows("source")} == {"unknown", "web"}
    for bad in (frame.drop(columns="text"), frame.assign(text=[1, 2]), frame.iloc[:0]):
        with pytest.raises(InputError):
            describe_representation(bad)
    with pytest.raises(InputError, match="a str among the documents"):
        describe_representation(["just text"])


def test_different_ways_to_count_do_not_add():
    with pytest.raises(InputError, match="same facets"):
        Representation() + Representation({"kind": lambda d: d.kind})


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=12).filter(
        lambda x: sum(a for a, _ in x)
    )
)
def test_divergences_equal_scipy(counts):
    p, q = map(numpy.array, zip(*counts, strict=True))
    assert kl_divergence(p, q) == pytest.approx(scipy.stats.entropy(p, q, base=2), abs=1e-9)
    theirs = numpy.nan_to_num(scipy.spatial.distance.jensenshannon(p, q, base=2) ** 2)
    assert jensen_shannon(p, q) == pytest.approx(theirs, abs=1e-7)
    assert 0 <= kl_divergence(q, p, smoothing=0.1) < math.inf


@pytest.mark.parametrize(
    "bad",
    [([], []), ([0, 0], [1, 1]), ([1, -1], [1, 1]), ([1, float("nan")], [1, 1]), ([1, 2], [1, 2, 3]), ([[1]], [[1]])],
)
def test_divergences_refuse(bad):
    for function in (kl_divergence, jensen_shannon):
        with pytest.raises(InputError):
            function(*bad)


def test_comparison_with_another_corpus_and_a_group_that_is_missing():
    here, there = describe_representation(DOCUMENTS), describe_representation(DOCUMENTS[:12])
    found = compare_representation(there, "language", here)
    assert {row["group"] for row in found.rows} == set(TEXTS) and 0 < found.divergence <= 1
    assert {row["group"]: row["verdict"] for row in found.rows}["en"] == "more than wanted"
    same = compare_representation(here, "language", here)
    assert same.divergence == 0 and {row["verdict"] for row in same.rows} == {"cannot tell"}
    with pytest.raises(InputError):
        compare_representation(here, "language", {"en": 0})
    empty = describe_representation([Document("x", "x", "file", "x", "MIT")])
    with pytest.raises(InputError, match="nothing counted"):
        compare_representation(empty, "gender", {"feminine": 1})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_raking_equals_fitting_the_table_of_cells(seed):
    draw = numpy.random.default_rng(seed)
    rows, columns = (draw.integers(0, k, 300).astype(str).tolist() for k in (3, 4))
    rows[:12], columns[:12] = list("012" * 4), list("0123" * 3)
    goals = draw.dirichlet([5] * 3), draw.dirichlet([5] * 4)
    targets = [{str(i): float(x) for i, x in enumerate(goal)} for goal in goals]
    found = rake({"r": rows, "c": columns}, {"r": targets[0], "c": targets[1]}, clip=1e6, rounds=2000)
    assert found.error < 1e-6 and found.values.mean() == pytest.approx(1)
    cells = numpy.zeros((3, 4))
    numpy.add.at(cells, (list(map(int, rows)), list(map(int, columns))), 1)
    fitted = cells.copy()
    for _ in range(2000):
        fitted *= (goals[0] / fitted.sum(1))[:, None]
        fitted *= goals[1] / fitted.sum(0)
    weights = numpy.array([fitted[int(r), int(c)] / cells[int(r), int(c)] for r, c in zip(rows, columns, strict=True)])
    assert found.values / 300 == pytest.approx(weights, abs=1e-7)


def test_weights_are_clipped_and_zero_leaves_out():
    found = weigh_to_target(["a"] * 99 + ["b"], {"a": 0.5, "b": 0.5}, clip=4)
    assert found.values.max() / found.values.min() <= 16.001 and found.error > 0.4
    without = weigh_to_target(["a", "a", "b"], {"a": 1, "b": 0})
    assert without.values.tolist() == [1.5, 1.5, 0] and without.effective == pytest.approx(2)
    assert effective_size([0, 0]) == 0
    for labels, target in ((["a"], {"a": 1, "b": 1}), (["a", "b"], {"a": 1}), ([], {"a": 1})):
        with pytest.raises(InputError):
            weigh_to_target(labels, target)
    with pytest.raises(InputError):
        rake({"x": ["a"]}, {"y": {"a": 1}})


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 60), min_size=1),
    st.integers(0, 200),
    st.sampled_from([0, 0.3, 1, 2]),
    st.integers(1, 3),
)
def test_samples_keep_their_promises(sizes, count, alpha, repeats):
    documents = [
        Document("x", f"{name}{i}", "file", name, "MIT", language=name) for name, n in sizes.items() for i in range(n)
    ]
    drawn = sample_documents(documents, count, alpha=alpha, repeats=repeats)
    assert len(drawn) == min(count, repeats * len(documents))
    assert max(Counter(d.id for d in drawn).values(), default=0) <= repeats
    assert drawn == sample_documents(documents[::-1], count, alpha=alpha, repeats=repeats)
    for name, n in sizes.items():
        mine = Counter(d.id for d in drawn if d.language == name)
        assert not mine or max(mine.values()) - min(mine.values() if len(mine) == n else [0]) <= 1 or repeats > 1


def test_other_seeds_draw_others_and_bad_settings_are_refused():
    assert sample_documents(DOCUMENTS, 5, seed=1) != sample_documents(DOCUMENTS, 5, seed=2)
    assert sample_documents(DOCUMENTS, 6, by=lambda d: d.kind)
    for bad in ({"by": "planet"}, {"count": -1}, {"repeats": 0}):
        with pytest.raises(SettingsError):
            sample_documents(DOCUMENTS, **({"count": 3} | bad))
    for counts, alpha in (({}, 1), ({"a": -1}, 1), ({"a": 1}, -1), ({"a": 0}, 1)):
        with pytest.raises(InputError):
            temperature_shares(counts, alpha)


def test_weighted_draws_follow_the_weights():
    documents = [Document("x", str(i), "file", "x", "MIT") for i in range(400)]
    weights = [3.0] * 200 + [1.0] * 200
    hits = [sum(int(d.symbol) < 200 for d in draw_weighted(documents, weights, 40, seed)) for seed in range(60)]
    assert 0.69 < numpy.mean(hits) / 40 < 0.79  # three quarters, less what a draw without repeats takes away
    assert len(draw_weighted(documents, [1.0] + [0.0] * 399, 10)) == 1
    for bad in ([1.0], [-1.0] * 400, [float("nan")] * 400):
        with pytest.raises(InputError):
            draw_weighted(documents, bad, 3)
