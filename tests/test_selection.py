"""Budgets kept exactly, draws with known chances, densities equal to all pairs, curves read rightly."""

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from llmbook.core import InputError, SettingsError
from llmbook.selection import (
    DensitySketch, amount_to_reach, counted_bits_per_byte, exact_density, hashed_vectors, score_density, score_nearness,
    score_perplexity, select_documents, selection_gain,
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-50, 50), st.integers(1, 100)), max_size=60), st.integers(1, 2000),
    st.sampled_from([0.0, 0.5, 1.0, 10.0]), st.integers(0, 5),
)
def test_the_budget_is_kept_and_used(pairs, budget, temperature, seed):
    scores, sizes = [score for score, _ in pairs], np.array([size for _, size in pairs], int)
    chosen = select_documents(scores, sizes, budget, temperature, seed)
    assert len(set(chosen.tolist())) == len(chosen) and (np.diff(chosen) > 0).all()
    used = sizes[chosen].sum() if len(chosen) else 0
    left = np.setdiff1d(np.arange(len(sizes)), chosen)
    assert used <= budget and all(sizes[i] > budget - used for i in left)
    assert (chosen == select_documents(scores, sizes, budget, temperature, seed)).all()


def test_best_first_takes_the_best():
    scores = np.random.default_rng(0).permutation(50)
    chosen = select_documents(scores, np.ones(50), 10)
    assert sorted(scores[chosen]) == list(range(40, 50))
    assert select_documents([1, 5, -math.inf], [1, 1, 1], 10).tolist() == [0, 1]
    assert select_documents([1, -math.inf], [1, 1], 10, 1.0).tolist() == [0]


def test_equal_scores_are_a_fair_draw():
    counts = np.zeros(6)
    for seed in range(2000):
        counts[select_documents(np.zeros(6), np.ones(6), 2, 0.0, seed)] += 1
    assert np.abs(counts / 2000 - 1 / 3).max() < 0.05


def test_temperature_moves_from_the_best_to_chance():
    scores = np.arange(30.0)
    mean = [np.mean([scores[select_documents(scores, np.ones(30), 5, t, seed)].mean() for seed in range(50)])
            for t in (0.0, 2.0, 1e6)]
    assert mean[0] == 27 and mean[0] > mean[1] > mean[2] and abs(mean[2] - 14.5) < 2


@pytest.mark.parametrize("arguments", [
    ([1, 2], [1], 5), ([math.nan], [1], 5), ([1], [0], 5), ([1], [1], 0), ([1], [1], math.nan), ([1], [1], 5, -1.0),
    ([[1]], [1], 5),
])
def test_wrong_budgets_are_refused(arguments):
    with pytest.raises(InputError):
        select_documents(*arguments)


@pytest.mark.parametrize("planes", [1, 4, 8])
def test_the_sketch_equals_all_pairs(planes):
    chance = np.random.default_rng(planes)
    vectors = np.concatenate([chance.normal(size=(60, 12)) * 0.3 + chance.normal(size=12), chance.normal(size=(60, 12))])
    exact = exact_density(vectors, planes)
    estimate = DensitySketch(12, planes, 4000, seed=1).add(vectors).density(vectors)
    assert np.abs(estimate - exact).max() < 0.03
    assert np.corrcoef(exact, estimate)[0, 1] > (0.99 if planes > 1 else 0.95)


def test_exact_density_is_the_formula():
    corner = np.array([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])  # angles of 90 and 180 degrees
    assert exact_density(corner, 2) == pytest.approx([(1 + 0.25 + 0) / 3, (1 + 0.25 + 0.25) / 3, (1 + 0.25 + 0) / 3])


def test_batches_of_a_sketch_add_up():
    vectors = np.random.default_rng(0).normal(size=(50, 8))
    whole = DensitySketch(8).add(vectors)
    parts = DensitySketch(8).add(vectors[:20]).add(vectors[20:])
    assert (whole.counts == parts.counts).all() and parts.seen == 50
    assert (whole.density(vectors) == parts.density(vectors)).all()
    assert whole.density(np.zeros((0, 8))).shape == (0,)


def test_a_crowd_is_less_lonely():
    chance = np.random.default_rng(0)
    crowd, lone = np.ones((50, 16)) + chance.normal(size=(50, 16)) * 0.05, chance.normal(size=(10, 16))
    scores = score_density(np.concatenate([crowd, lone]))
    assert scores[:50].max() < scores[50:].min()


def test_wrong_vectors_are_refused():
    sketch = DensitySketch(4)
    for vectors in (np.zeros(4), np.zeros((2, 5)), np.full((2, 4), np.nan)):
        with pytest.raises(InputError):
            sketch.add(vectors)
    for call in (lambda: DensitySketch(4, 0), lambda: DensitySketch(4, 21), lambda: DensitySketch(4, 8, 0)):
        with pytest.raises(SettingsError):
            call()
    for first, second in (((2, 4), (2, 5)), ((2, 4), (0, 4)), ((4,), (1, 4))):
        with pytest.raises(InputError):
            score_nearness(np.zeros(first), np.zeros(second))
    with pytest.raises(InputError):
        score_density(np.zeros((0, 4)))


def test_nearness_is_the_mean_cosine_to_the_nearest():
    target = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    assert score_nearness([[3.0, 0.0]], target, 1) == pytest.approx([1.0])
    assert score_nearness([[3.0, 0.0]], target, 2) == pytest.approx([0.5])
    assert score_nearness([[3.0, 0.0]], target, 9) == pytest.approx([0.0])
    assert score_nearness(np.zeros((0, 2)), target).shape == (0,)


def test_head_and_middle():
    surprise = [5.0, 1.0, 3.0, math.inf, 2.0]
    assert np.argsort(-score_perplexity(surprise), kind="stable").tolist() == [1, 4, 2, 0, 3]
    middle = score_perplexity(surprise, "middle")
    assert middle[3] == -math.inf and set(np.argsort(-middle)[:2]) == {2, 4}
    assert score_perplexity([math.inf]).tolist() == [-math.inf]
    with pytest.raises(SettingsError):
        score_perplexity(surprise, "tail")


def test_vectors_know_common_words():
    texts = ["o chá está quente", "o chá está muito quente", "la máquina se para", ""]
    vectors = hashed_vectors(texts, 64)
    assert vectors.shape == (4, 64) and vectors.dtype == np.float32
    assert vectors[0] @ vectors[1] > 0.5 > abs(vectors[0] @ vectors[2])
    assert (vectors[3] == 0).all() and (vectors == hashed_vectors(texts, 64)).all()
    for bad in ([], "text"):
        with pytest.raises(InputError):
            hashed_vectors(bad)


def test_curves_are_read_horizontally():
    assert amount_to_reach([10, 20, 40], [4, 3, 3], 4) == 10
    assert amount_to_reach([10, 20, 40], [4, 3, 2], 2.5) == pytest.approx(math.sqrt(20 * 40))
    assert amount_to_reach([10], [4], 3) == math.inf
    for bad in (([20, 10], [1, 2], 1), ([1, 2], [1], 1), ([0, 1], [2, 1], 1), ([1, 2], [1, math.nan], 1)):
        with pytest.raises(InputError):
            amount_to_reach(*bad)
    assert selection_gain(100, 50) == 2 and selection_gain(100, 50, 5, 10) == 1
    with pytest.raises(SettingsError):
        selection_gain(100, 0)


def test_reading_what_is_asked_helps():
    text = "the door of the house is open and the tea is on the table. "
    near, far = counted_bits_per_byte([text * 5], [text]), counted_bits_per_byte(["0123456789" * 30], [text])
    assert near < 1 < far
