"""Evaluation beyond the notebook's page: properties of the statistics, baselines, the gate, the stage's hand-over."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.architecture import Decoder, DecoderSettings, derive_decoder
from llmbook.core import InputError, PolicyError, SettingsError
from llmbook.evaluation import (
    DEFAULT_GATE, EvaluationSettings, Gate, GateRule, NgramModel, calibration_error, check_gate, exact_match,
    find_breaches, ngram_bits_per_byte, nats_per_position, paired_bootstrap, score_answers, token_f1,
    zstd_bits_per_byte,
)
from llmbook.losses import token_losses

NUMBERS = st.lists(st.floats(-5, 5), min_size=2, max_size=30)


@settings(max_examples=40, deadline=None)
@given(NUMBERS, st.floats(-3, 3))
def test_a_constant_gain_is_certain(before, gain):
    found = paired_bootstrap(before, [x + gain for x in before], resamples=200)
    assert found.low == pytest.approx(gain, abs=1e-9) and found.high == pytest.approx(gain, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(NUMBERS)
def test_swapping_the_systems_turns_the_sign(values):
    other = values[::-1]
    one, two = (paired_bootstrap(*pair, resamples=300) for pair in ((values, other), (other, values)))
    assert one.difference == pytest.approx(-two.difference) and one.p == pytest.approx(two.p)
    assert (one.low, one.high) == pytest.approx((-two.high, -two.low), abs=1e-9)


def test_intervals_hold_the_truth_as_often_as_they_say():
    chance = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        a = chance.normal(0, 1, 60)
        found = paired_bootstrap(a, a + chance.normal(0.2, 1, 60), resamples=400, seed=trial)
        hits += found.low <= 0.2 <= found.high
    assert 0.89 < hits / 200 < 0.99


@pytest.mark.parametrize("pair", [([1.0], [2.0]), ([1, 2], [1]), ([[1, 2]], [[1, 2]])])
def test_unpaired_values_are_refused(pair):
    with pytest.raises(InputError):
        paired_bootstrap(*pair)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=8, max_size=120), st.integers(1, 6), st.lists(st.integers(0, 4), max_size=5))
def test_counting_gives_probabilities(text, order, before):
    model = NgramModel(np.array(text), 5, order)
    chances = [math.exp(-model.nats(np.array([*before, last]))[-1]) for last in range(5)]
    assert sum(chances) == pytest.approx(1) and min(chances) > 0


def naive_kneser_ney(text, held_out, v, order, discounts):
    "The recursion as it stands in the paper, with dictionaries."
    grams = [set(tuple(text[i : i + n]) for i in range(len(text) - n + 1)) for n in range(1, order + 2)]
    raw = [tuple(text[i : i + order]) for i in range(len(text) - order + 1)]

    def count(gram):
        if len(gram) == order:
            return raw.count(gram)
        return sum(1 for g in grams[len(gram)] if g[1:] == gram)

    def chance(history, word):
        rest = chance(history[1:], word) if history else 1 / v
        counts = {w: count((*history, w)) for w in range(v)}
        total = sum(counts.values())
        if not total:
            return rest
        d = discounts[len(history)]
        taken = sum(d[min(c, 3)] for c in counts.values())
        return (counts[word] - d[min(counts[word], 3)]) / total + taken / total * rest

    def back_off(i):
        return chance(tuple(held_out[max(0, i - order + 1) : i]), held_out[i])

    return [-math.log(back_off(i)) for i in range(len(held_out))]


def test_counting_equals_the_recursion():
    text = list(np.random.default_rng(1).integers(0, 4, 80)) + [0, 1, 2, 3] * 5
    held_out = [0, 1, 2, 3, 0, 0, 2, 1, 3, 3]
    model = NgramModel(np.array(text), 4, 3)
    slow = naive_kneser_ney(text, held_out, 4, 3, [level.discounts for level in model.levels])
    assert model.nats(np.array(held_out)) == pytest.approx(slow)


def test_more_context_helps_on_a_pattern():
    text = np.array(list(itertools.islice(itertools.cycle([0, 1, 0, 2, 0, 3]), 600)))
    bits = [ngram_bits_per_byte(text, text[:60], 60, 4, order) for order in (1, 2, 3)]
    assert bits[0] > bits[1] > bits[2]
    with pytest.raises(InputError):
        NgramModel(np.array([1, 2]), 4, 5)


def test_a_compressor_knows_what_it_has_seen():
    chance = np.random.default_rng(0)
    noise, fresh = (bytes(chance.integers(0, 256, 5000, dtype=np.uint8)) for _ in range(2))
    assert zstd_bits_per_byte(noise, noise) < 0.1 and zstd_bits_per_byte(noise, fresh) == pytest.approx(8, abs=0.1)


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    shape = derive_decoder(1, 50, 16)
    return Decoder(shape if isinstance(shape, DecoderSettings) else shape).eval()


def test_every_token_is_scored_once_and_rightly(decoder):
    tokens = np.random.default_rng(0).integers(0, 50, 16)
    with torch.no_grad():
        ids = torch.tensor(np.concatenate([tokens[-1:], tokens[:-1]]))[None]
        direct = token_losses(decoder(ids), torch.tensor(tokens)[None])[0].numpy()
    assert np.allclose(nats_per_position(decoder, tokens, 16, 16), direct, atol=1e-4)
    long = np.random.default_rng(1).integers(0, 50, 101)
    assert all(len(nats_per_position(decoder, long, 16, stride)) == 101 for stride in (1, 5, 16))


@pytest.mark.parametrize("said, right, match, f1", [
    ("The cat!", "cat", 1, 1), ("", "", 1, 1), ("", "cat", 0, 0), ("a dog", "cat", 0, 0), ("cat cat", "cat", 0, 2 / 3),
])
def test_squad_rules(said, right, match, f1):
    assert exact_match(said, right) == match and token_f1(said, right) == pytest.approx(f1)


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_scores_stay_in_bounds(said, right):
    assert all(0 <= values[0] <= 1 + 1e-9 for values in score_answers([said], [right]).values())


def test_calibration_of_the_extremes():
    assert calibration_error([1, 1, 0], [1, 1, 0]) == 0 and calibration_error([1, 1], [0, 0]) == 1
    with pytest.raises(InputError):
        calibration_error([], [])


def nested(path, value):
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize("rule, now, before, says", [
    (GateRule("a.b", at_least=1), 0.5, None, "below 1"),
    (GateRule("a.b", at_most=1), 1.5, None, "above 1"),
    (GateRule("a.b", may_lose=0.1), 0.8, 1.0, "20.0% worse"),
    (GateRule("a.b", may_lose=0.1, falls=True), 1.2, 1.0, "20.0% worse"),
    (GateRule("a.b"), float("nan"), None, "not measured"),
    (GateRule("a.c"), 1.0, None, "not measured"),
    (GateRule("a.b", may_lose=0.1), 0.95, 1.0, ""),
    (GateRule("a.b", may_lose=0.1, falls=True), 0.5, 1.0, ""),
    (GateRule("a.b", may_lose=0.1), 0.5, None, ""),
])
def test_rules(rule, now, before, says):
    gate, numbers = Gate((rule,)), nested("a.b", now)
    earlier = None if before is None else nested("a.b", before)
    assert says in "".join(find_breaches(gate, numbers, earlier))
    if says:
        with pytest.raises(PolicyError, match=says):
            check_gate(gate, numbers, earlier)
    else:
        assert check_gate(gate, numbers, earlier) is None


def test_an_empty_evaluation_opens_no_gate():
    assert len(find_breaches(DEFAULT_GATE, {})) == len(DEFAULT_GATE.rules)


def test_settings_are_checked():
    with pytest.raises(SettingsError, match="evaluation.questions"):
        EvaluationSettings(questions=0)
