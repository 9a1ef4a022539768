"""Speculation must not be noticed: the same text, the same distribution, a bounded loss of time."""

import itertools
from functools import partial

import pytest
import torch
from sample_models import build_decoder, build_tokenizer
from hypothesis import given, settings as budget, strategies as st

from llmbook.architecture import DecoderSettings
from llmbook.core import InputError, SettingsError, set_seed
from llmbook.generation import Continuation, KeyValueCache, LeanDecoder, gather_pieces, next_logits, stream
from llmbook.sampling import Sampling
from llmbook.speculation import (
    DraftModel, Guard, Guess, Guesser, PromptLookup, build_copier, keep_guess, leftover, speculate,
)

build = partial(build_decoder, context=120)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def models(tokenizer):
    """Clear choices, loops that repeat, and a model that quotes; with one that guesses for them."""
    v = len(tokenizer)
    return [
        LeanDecoder.of(build(v)), build(v, 2, tied=False, head_width=6), LeanDecoder.of(build_copier(v, context=120)),
        LeanDecoder.of(build(v, 3, depth=1, key_value_heads=4)),
    ]


class Whim(Guard):
    """A guard that decides by chance: the text must not depend on it."""

    def allows(self, count: int) -> bool:
        return bool(torch.rand(()) < 0.7)


def eager() -> PromptLookup:
    """A guesser that the clock does not stop."""
    return PromptLookup(guard=Guard(99))


requests = st.builds(
    Sampling, max_tokens=st.integers(1, 60), temperature=st.sampled_from([0.0, 0.0, 0.5, 1.0]), top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]), repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.5]), frequency_penalty=st.sampled_from([0.0, 0.3]),
    no_repeat_ngram=st.sampled_from([0, 0, 3]), stop=st.sampled_from([(), ("e",), ("st o", "zz")]),
    seed=st.integers(0, 99), logprobs=st.sampled_from([0, 2]),
)
prompts = st.lists(st.sampled_from([7, 40, 41, 90, 200, 300]), min_size=1, max_size=40)


def odd_tokens(generated) -> torch.Tensor:
    """A rule from outside that depends on what was generated."""
    allowed = torch.ones(310, dtype=torch.bool)
    allowed[len(generated) % 7 :: 7] = False
    return allowed


def tied(model, tokenizer, ids, sampling, allow, plain, quick) -> bool:
    """Whether two greedy texts part where two tokens are equally likely, as they are for the copier by construction."""
    state, at = Continuation(tokenizer, ids, sampling, model.settings.context, allow), 0
    while plain[at].token == quick[at].token:
        state.ids.append(plain[at].token)
        at += 1
    with torch.inference_mode():
        scores = state.scores(next_logits(model, torch.tensor([state.ids]))[0])
    return sampling.temperature == 0 and bool((scores[plain[at].token] - scores[quick[at].token]).abs() < 1e-3)


@budget(max_examples=120, deadline=None)
@given(
    which=st.integers(0, 2), ids=prompts, sampling=requests, match=st.integers(1, 4), most=st.integers(1, 20),
    ruled=st.booleans(),
)
def test_lookup_changes_nothing(models, tokenizer, which, ids, sampling, match, most, ruled):
    model, allow = models[which], odd_tokens if ruled else None
    plain = list(stream(model, tokenizer, ids, sampling, allow=allow))
    guesser = PromptLookup(most, match, history=[40, 41, 90], guard=Whim())
    quick = list(speculate(model, tokenizer, ids, sampling, allow=allow, guesser=guesser))
    shown = [[(piece.token, piece.text, piece.finish_reason) for piece in pieces] for pieces in (plain, quick)]
    if shown[0] != shown[1]:
        assert which == 2 and tied(model, tokenizer, ids, sampling, allow, plain, quick)
        return
    for ours, theirs in zip(quick, plain, strict=True):
        assert ours.logprob == (theirs.logprob and pytest.approx(theirs.logprob, abs=2e-3))
    assert guesser.tally.kept <= guesser.tally.guessed


@budget(max_examples=60, deadline=None)
@given(which=st.integers(0, 1), ids=prompts, sampling=requests, most=st.integers(1, 12))
def test_a_greedy_draft_changes_nothing(models, tokenizer, which, ids, sampling, most):
    sampling = Sampling(**vars(sampling) | {"temperature": 0.0})
    plain = gather_pieces(stream(models[which], tokenizer, ids, sampling), len(ids))
    for draft in (models[3], models[which]):
        guesser = DraftModel(draft, most)
        quick = gather_pieces(speculate(models[which], tokenizer, ids, sampling, guesser=guesser), len(ids))
        assert quick[:4] == plain[:4]
    assert plain.finish_reason == "stop" or guesser.tally.kept == guesser.tally.guessed  # its own guesses are right


def test_many_greedy_continuations_are_equal(models, tokenizer):
    tokens = 0
    for seed in range(60):
        set_seed(seed)
        ids = torch.randint(6, len(tokenizer), (int(torch.randint(1, 60, ())),)).tolist()
        for model in models[:2]:
            plain = list(stream(model, tokenizer, ids, Sampling(max_tokens=50)))
            assert list(speculate(model, tokenizer, ids, Sampling(max_tokens=50), guesser=PromptLookup(guard=Whim()))) == plain
            tokens += len(plain)
    assert tokens > 3000


numbers = st.lists(st.floats(0, 1).filter(lambda x: x == 0 or x > 1e-3), min_size=5, max_size=5).filter(sum)


@budget(max_examples=100, deadline=None)
@given(numbers, numbers)
def test_the_rule_of_acceptance_by_all_cases(p, q):
    p, q = (torch.tensor(x, dtype=torch.float64) / sum(x) for x in (p, q))
    kept = q * torch.where(q > 0, p / q.clamp(min=1e-12), 0).clamp(max=1)
    torch.testing.assert_close(kept + (1 - kept.sum()) * leftover(p, q), p)
    generator = torch.Generator().manual_seed(0)
    for token in q.nonzero().flatten().tolist():
        for _ in range(4):
            chosen, right = keep_guess(p, q, token, generator)
            assert p[chosen] > 0 and (chosen == token or not right)


class WordPairs:
    """A model whose next token depends on the last one alone."""

    def __init__(self, table: torch.Tensor):
        v = len(table)
        self.settings, self.table = DecoderSettings(v, 1, v, 1, 1, 4, context=16, head_width=2), table
        self.norm, self.head = torch.nn.LayerNorm(v), lambda states: states

    def states(self, ids: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        cache.length += ids.shape[1]
        return self.table[ids]


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.8}, {"frequency_penalty": 0.7, "temperature": 0.8}])
def test_drawn_texts_have_the_distribution_of_the_model(tokenizer, changes):
    """All texts of three tokens: how often each came, against its exact probability (chi-square)."""
    set_seed(7)
    never = torch.tensor([-1e9, 0, 0, 0])  # token 0 would end the text
    large, small = WordPairs(torch.randn(4, 4) + never), WordPairs(1.5 * torch.randn(3, 3) + never[:3])
    sampling, runs = Sampling(**{"max_tokens": 3, "temperature": 1.2} | changes), 1500
    expected = {}
    for text in itertools.product(range(1, 4), repeat=3):
        state, chance = Continuation(tokenizer, [1], sampling, 16), float(runs)
        for token in text:
            logits = large.table[state.ids[-1]]
            chance *= float(state.scores(logits).softmax(-1)[token])
            state.take(token, logits)
        expected[text] = chance
    assert sum(expected.values()) == pytest.approx(runs)
    counts, kept = dict.fromkeys(expected, 0), 0
    for seed in range(runs):
        guesser = DraftModel(small, 3)
        asked = Sampling(**vars(sampling) | {"seed": seed})
        counts[tuple(piece.token for piece in speculate(large, tokenizer, [1], asked, guesser=guesser))] += 1
        kept += guesser.tally.kept
    possible = [text for text, chance in expected.items() if chance > 1e-6]
    assert sum(counts[text] for text in possible) == runs
    statistic = sum((counts[text] - expected[text]) ** 2 / expected[text] for text in possible)
    assert statistic < len(possible) + 5 * (2 * len(possible)) ** 0.5
    assert kept > 0.2 * runs  # the small model lacks token 3: after it, nothing is guessed


def test_a_model_keeps_all_its_own_guesses(models, tokenizer):
    guesser, sampling = DraftModel(models[0], 6), Sampling(max_tokens=60, temperature=1.0, seed=3)
    done = gather_pieces(speculate(models[0], tokenizer, [40, 41], sampling, guesser=guesser), 2)
    assert guesser.tally.guessed - guesser.tally.kept <= (done.finish_reason == "stop") * 6
    again = speculate(models[0], tokenizer, [40, 41], sampling, guesser=DraftModel(models[0], 6))
    assert gather_pieces(again, 2) == done  # same seed, same text


@budget(max_examples=100, deadline=None)
@given(
    st.floats(0, 6), st.floats(0, 0.5), st.lists(st.integers(0, 4), min_size=1, max_size=300), st.floats(0, 0.1),
    st.floats(0, 4),
)
def test_the_guard_bounds_the_loss(fixed, per_token, kept, tolerance, credit):
    guard = Guard(tolerance, credit)
    guard.record(0, 0, 0.01)
    tokens = took = 1.0
    price = min(1 + fixed + 4 * per_token, 5.0)  # more than 1 + guesses is not believed
    for right in kept:
        guessed = 4 if guard.allows(4) else 0
        guard.record(guessed, right if guessed else 0, 0.01 * (price if guessed else 1))
        tokens, took = tokens + 1 + (right if guessed else 0), took + (price if guessed else 1)
        assert took <= tokens * (1 + tolerance) + credit + max(0, price - 1 - 1.2) + 8.0 * (took < tokens) + 1e-6


def test_a_wrong_guesser_loses_only_what_the_guard_allows(models, tokenizer):
    class Clockwork(Guard):
        "Checking a token takes a quarter of a plain step, whatever the machine does."

        def record(self, guessed, kept, seconds):
            super().record(guessed, kept, 1 + 0.25 * guessed)

    class Wrong(PromptLookup):
        def propose(self, state, most):
            count = min(4, most)
            return Guess([9] * count if count and self.guard.allows(count) else [])

    guesser = Wrong(guard=Clockwork())
    list(speculate(models[1], tokenizer, [40], Sampling(max_tokens=100), guesser=guesser))
    lost = 1.5 + 0.02 * 100  # plain steps: the credit, and the share of all tokens
    assert guesser.tally.kept == 0 and 4 <= guesser.tally.guessed <= 4 * lost


def test_the_copier_quotes_as_a_decoder_should(tokenizer):
    copier = build_copier(len(tokenizer), depth=3)
    ids = tokenizer("Open a file and read").input_ids
    guesser, model, sampling = eager(), LeanDecoder.of(copier), Sampling(max_tokens=len(ids) - 4)
    done = list(speculate(model, tokenizer, [*ids, 9, *ids[:4]], sampling, guesser=guesser))
    assert [piece.token for piece in done] == ids[4:]
    assert guesser.tally.steps < len(done)


def test_ends_and_refusals(models, tokenizer):
    model = models[2]
    ids = [40, 41, 90, 200] * 5
    clock = iter([False, False, True])
    pieces = list(speculate(model, tokenizer, ids, Sampling(max_tokens=90), lambda: next(clock), guesser=eager()))
    assert pieces[-1].finish_reason == "cancelled" and pieces[-1].token is None
    full = gather_pieces(speculate(model, tokenizer, ids * 5, Sampling(max_tokens=500), guesser=eager()), 100)
    assert (len(full.tokens), full.finish_reason) == (20, "length")
    assert len(list(speculate(model, tokenizer, ids, Sampling(max_tokens=1)))) == 1
    with pytest.raises(InputError, match="empty"):
        speculate(model, tokenizer, [])
    with pytest.raises(InputError, match="same tokenizer"):
        speculate(model, tokenizer, ids, guesser=DraftModel(build(50)))
    for wrong in (lambda: PromptLookup(0), lambda: PromptLookup(match=9), lambda: DraftModel(model, 0), lambda: Guard(-1),
                  lambda: build_copier(30, 1)):
        with pytest.raises(SettingsError):
            wrong()


def test_a_small_draft_context_ends_the_guessing_not_the_text(models, tokenizer):
    draft = LeanDecoder.of(build(len(tokenizer), 3, context=24))
    ids = [40, 41] * 5
    plain = list(stream(models[0], tokenizer, ids, Sampling(max_tokens=60)))
    assert list(speculate(models[0], tokenizer, ids, Sampling(max_tokens=60), guesser=DraftModel(draft))) == plain
    long = list(speculate(models[0], tokenizer, ids * 3, Sampling(max_tokens=20), guesser=DraftModel(draft)))
    assert long == list(stream(models[0], tokenizer, ids * 3, Sampling(max_tokens=20)))


def test_half_precision_runs(tokenizer):
    model = LeanDecoder.of(build_copier(len(tokenizer)).bfloat16())
    ids = tokenizer("Open a file and read").input_ids
    done = list(speculate(model, tokenizer, [*ids, 9, *ids[:4]], Sampling(max_tokens=len(ids) - 4), guesser=eager()))
    assert [piece.token for piece in done] == ids[4:]  # its choices are clear even when rounded


def test_guesser_without_ideas_is_plain_decoding(models, tokenizer):
    guesser = Guesser()
    assert list(speculate(models[0], tokenizer, [40], Sampling(max_tokens=9), guesser=guesser)) == list(
        stream(models[0], tokenizer, [40], Sampling(max_tokens=9)))
    assert guesser.tally.guessed == 0
