"""The rules that choose a token, on scores nobody thought of; the chapter's page shows the rest."""

import math

import pytest
import torch
from hypothesis import given, settings as budget, strategies as st

from llmbook.core import InputError, SettingsError
from llmbook.sampling import (
    Sampling, adjust_logits, ban_repeated_ngrams, choose_token, keep_allowed, keep_min_p, keep_top_k, keep_top_p,
    keep_typical, penalise_counts, penalise_repetition, read_sampling,
)

scores = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40).map(torch.tensor)


@budget(max_examples=60, deadline=None)
@given(scores, st.integers(1, 50), st.floats(0.01, 1.0))
def test_cuts_keep_the_rest_and_never_everything(logits, k, p):
    for cut in (keep_top_k(logits, k), keep_top_p(logits, p), keep_min_p(logits, p), keep_typical(logits, p)):
        left = cut > -math.inf
        assert left.any() and torch.equal(cut[left], logits[left])
    for cut in (keep_top_k(logits, k), keep_top_p(logits, p), keep_min_p(logits, p)):
        assert cut.max() == logits.max()


@budget(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 4))
def test_no_ngram_comes_twice(ids, n):
    for _ in range(4):
        allowed = ban_repeated_ngrams(torch.zeros(4), ids, n)
        seen = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}
        for token in range(4):
            assert (allowed[token] == -math.inf) == (len(ids) >= n - 1 and (*ids[len(ids) - n + 1 :], token) in seen)
        if (allowed == -math.inf).all():
            break
        ids = [*ids, int(allowed.argmax())]


@budget(max_examples=120, deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=8, max_size=60, unique=True).map(torch.tensor),
    st.lists(st.integers(0, 7), min_size=1, max_size=12), st.sampled_from([0.4, 1.0, 2.5]), st.sampled_from([0, 1, 5, 100]),
    st.sampled_from([0.05, 0.5, 0.95, 1.0]), st.sampled_from([0.0, 0.02, 0.5]), st.sampled_from([0.2, 0.9, 1.0]),
    st.sampled_from([0.8, 1.0, 1.4]), st.sampled_from([0, 1, 2, 3]),
)
def test_all_rules_together_are_those_of_the_reference(logits, ids, heat, k, p, low, typical, repetition, ngram):
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as theirs

    processors = [
        (repetition != 1, lambda: theirs.RepetitionPenaltyLogitsProcessor(repetition)),
        (ngram, lambda: theirs.NoRepeatNGramLogitsProcessor(ngram)), (heat != 1, lambda: theirs.TemperatureLogitsWarper(heat)),
        (k, lambda: theirs.TopKLogitsWarper(k)), (p < 1, lambda: theirs.TopPLogitsWarper(p)),
        (low, lambda: theirs.MinPLogitsWarper(low)), (typical < 1, lambda: theirs.TypicalLogitsWarper(typical)),
    ]
    wanted = LogitsProcessorList([make() for on, make in processors if on])
    expected = wanted(torch.tensor([ids]), logits[None])[0]
    sampling = Sampling(
        temperature=heat, top_k=k, top_p=p, min_p=low, typical_p=typical, repetition_penalty=repetition,
        no_repeat_ngram=ngram)
    found = adjust_logits(logits, ids, sampling)
    assert torch.equal(found, expected) or (expected == -math.inf).all()


@budget(max_examples=60, deadline=None)
@given(scores, st.lists(st.integers(0, 1), max_size=9), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties_by_counting(logits, generated, presence, frequency):
    found = penalise_counts(logits, generated, presence, frequency)
    for token in range(len(logits)):
        count = generated.count(token)
        assert float(found[token]) == pytest.approx(float(logits[token]) - presence * (count > 0) - frequency * count, abs=1e-4)


def test_bans_that_leave_nothing_are_lifted_and_rules_from_outside_are_not():
    logits = torch.tensor([1.0, 2.0, 0.0])
    assert torch.equal(adjust_logits(logits, [0, 1, 2], Sampling(no_repeat_ngram=1)), logits)
    only = keep_allowed(logits, torch.tensor([True, False]))  # the third is beyond the mask
    assert only.tolist() == [1.0, -math.inf, -math.inf]
    assert adjust_logits(only, [0], Sampling(no_repeat_ngram=1)).argmax() == 0
    for wrong in (torch.zeros(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool), torch.ones(3)):
        with pytest.raises(InputError, match="of bool"):
            keep_allowed(logits, wrong)


@pytest.mark.parametrize("request_", [
    {"temperature": -1}, {"temperature": "1"}, {"top_p": 1.1}, {"top_k": 1.5}, {"logprobs": 21}, {"stop": [""]},
    {"max_tokens": 0}, {"seed": 2**63}, {"min_p": float("nan")}, {"temprature": 1}, {"typical_p": 0.9},
    {"repetition_penalty": 0}, {"presence_penalty": 2.1}, {"frequency_penalty": "much"},
])
def test_wrong_settings_name_themselves(request_):
    with pytest.raises(SettingsError) as error:
        read_sampling(request_)
    assert next(iter(request_)) in str(error.value)


def test_a_cut_distribution_draws_what_it_should():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    kept = adjust_logits(logits, [0], Sampling(temperature=1.0, top_k=2))
    generator = torch.Generator().manual_seed(0)
    draws = [choose_token(kept, 1.0, generator) for _ in range(2000)]
    assert set(draws) == {0, 1}
    assert draws.count(0) / 2000 == pytest.approx(math.e / (1 + math.e), abs=0.04)


@pytest.mark.parametrize("rule", [
    lambda x: keep_top_k(x, 0), lambda x: keep_top_p(x, 0.0), lambda x: keep_top_p(x, math.nan), lambda x: keep_min_p(x, 2.0),
    lambda x: keep_typical(x, 0.0), lambda x: penalise_repetition(x, [1], 0.0), lambda x: ban_repeated_ngrams(x, [1, 1], 0),
    lambda x: choose_token(x * math.nan, 0.0), lambda x: choose_token(x * math.nan, 1.0), lambda x: choose_token(x[:0], 1.0),
    lambda x: choose_token(torch.full_like(x, -math.inf), 0.0),
])
def test_rules_alone_refuse_what_they_cannot_do(rule):
    with pytest.raises(InputError, match="Allowed"):
        rule(torch.tensor([1.0, 2.0, 0.0]))


def test_nothing_said_yet_is_no_repetition():
    logits = torch.tensor([1.0, 2.0, 0.0])
    assert torch.equal(adjust_logits(logits, [], Sampling(repetition_penalty=1.3, no_repeat_ngram=2)), logits)
