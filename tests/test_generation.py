"""Decoding under faults, odd inputs and other people's models; the chapter's page shows the rest."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings as budget, strategies as st

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.core import InputError, SettingsError, set_seed
from llmbook.generation import (
    KeyValueCache, LeanDecoder, Sampling, adjust_logits, ban_repeated_ngrams, chat_ids, choose_token,
    complete, end_tokens, keep_min_p, keep_top_k, keep_top_p, keep_typical, next_logits,
    read_sampling, stream,
)
from llmbook.tokenization import train_tokenizer

TEXT = ["Return the sum of a list of numbers 🙂.", "Open a file and read naïve lines: “quoted”.", "日本語のテキスト。"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT * 3, 320)


def build(vocabulary: int, **changes) -> Decoder:
    """A random decoder whose choices are clear."""
    set_seed(1)
    shape = {"depth": 2, "width": 32, "heads": 4, "key_value_heads": 2, "hidden": 64, "context": 96}
    decoder = Decoder(DecoderSettings(vocabulary, **shape | changes)).eval()
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    return decoder


@pytest.fixture(scope="module")
def model(tokenizer):
    return build(len(tokenizer))


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


class Script:
    """A model that says given tokens, whatever it reads."""

    def __init__(self, tokens: list[int], vocabulary: int):
        self.settings = DecoderSettings(vocabulary, 1, 4, 1, 1, 4, context=400)
        self.norm, self.tokens, self.at = torch.nn.LayerNorm(4), tokens, 0

    def states(self, ids, cache=None):
        return torch.zeros(*ids.shape, 4)

    def head(self, states):
        logits = torch.zeros(1, self.settings.vocabulary)
        logits[0, self.tokens[self.at]] = 9
        self.at += 1
        return logits


@budget(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_streamed_text_is_the_text(tokenizer, text):
    tokens = tokenizer(text).input_ids + [tokenizer.eos_token_id]
    if any(token in end_tokens(tokenizer) for token in tokens[:-1]):
        return
    pieces = list(stream(Script(tokens, len(tokenizer)), tokenizer, [7], Sampling(max_tokens=300)))
    assert "".join(piece.text for piece in pieces) == text
    assert pieces[-1].finish_reason == "stop" and not any(piece.finish_reason for piece in pieces[:-1])
    assert all("�" not in piece.text for piece in pieces) or "�" in text


@budget(max_examples=80, deadline=None)
@given(text=st.text("ab日🙂", min_size=1, max_size=20), stop=st.text("ab日🙂", min_size=1, max_size=4))
def test_stop_texts_are_found_across_tokens_and_never_shown(tokenizer, text, stop):
    tokens = tokenizer(text).input_ids + [tokenizer.eos_token_id]
    done = complete(Script(tokens, len(tokenizer)), tokenizer, [7], Sampling(max_tokens=300, stop=(stop, "zz")))
    assert done.text == text.split(stop)[0]


def test_half_a_character_is_never_shown(tokenizer):
    tokens = tokenizer("🙂").input_ids
    assert len(tokens) > 1
    done = complete(Script(tokens, len(tokenizer)), tokenizer, [7], Sampling(max_tokens=len(tokens) - 1))
    assert (done.text, done.finish_reason) == ("", "length")


@pytest.mark.parametrize("changes", [
    {}, {"tied": False}, {"key_value_heads": 4}, {"head_width": 16}, {"rope_base": 5e5},
])
def test_lean_decoder_says_the_same(tokenizer, changes):
    model = build(len(tokenizer), **changes)
    lean = LeanDecoder.of(model)
    for sampling in (Sampling(max_tokens=40), Sampling(max_tokens=40, temperature=1.0, top_p=0.9, seed=1)):
        assert complete(lean, tokenizer, "Return", sampling) == complete(model, tokenizer, "Return", sampling)
    cache = KeyValueCache(model.settings, 20, batch=2)
    ids = torch.randint(len(tokenizer), (2, 12))
    with torch.inference_mode():
        for start, end in ((0, 5), (5, 6), (6, 12)):  # prompt, one step, several at once
            step = next_logits(lean, ids[:, start:end], cache)
        torch.testing.assert_close(step, next_logits(model, ids), atol=1e-3, rtol=1e-3)


def test_bfloat16_weights(tokenizer):
    model = build(len(tokenizer)).bfloat16()
    done = complete(LeanDecoder.of(model), tokenizer, "Return", Sampling(max_tokens=5))
    assert len(done.tokens) == len(complete(model, tokenizer, "Return", Sampling(max_tokens=5)).tokens)


def test_the_context_is_a_hard_end(model, tokenizer):
    room = model.settings.context - 90
    done = complete(model, tokenizer, [7] * 90, Sampling(max_tokens=500))
    assert done.finish_reason == "stop" or len(done.tokens) == room
    with pytest.raises(InputError, match="at most 95"):
        stream(model, tokenizer, [7] * 96)
    with pytest.raises(InputError, match="empty"):
        complete(model, tokenizer, "")
    with pytest.raises(InputError, match="lacks"):
        stream(model, tokenizer, [10_000])


@pytest.mark.parametrize("request_", [
    {"temperature": -1}, {"temperature": "1"}, {"top_p": 1.1}, {"top_k": 1.5}, {"logprobs": 21}, {"stop": [""]},
    {"max_tokens": 0}, {"seed": 2**63}, {"min_p": float("nan")}, {"temprature": 1}, {"typical_p": 0.9},
    {"repetition_penalty": 0},
])
def test_wrong_settings_name_themselves(request_):
    with pytest.raises(SettingsError) as error:
        read_sampling(request_)
    assert next(iter(request_)) in str(error.value)


def test_seeds_repeat_and_threads_do_not_mix(model, tokenizer):
    lean, sampling = LeanDecoder.of(model), Sampling(max_tokens=30, temperature=1.0, seed=5)
    alone = complete(lean, tokenizer, "Return", sampling)
    found: list = [None] * 4

    def work(i: int) -> None:
        found[i] = complete(lean, tokenizer, "Return", sampling)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == [alone] * 4
    free = Sampling(max_tokens=30, temperature=2.0)
    assert complete(model, tokenizer, "Return", free).tokens != complete(model, tokenizer, "Return", free).tokens


def test_logprobs_are_the_models(model, tokenizer):
    ids = tokenizer("Return").input_ids
    pieces = list(stream(model, tokenizer, ids, Sampling(max_tokens=6, temperature=0.7, seed=1, logprobs=3)))
    for piece in pieces:
        with torch.inference_mode():
            expected = next_logits(model, torch.tensor([ids]))[0].log_softmax(-1)
        assert piece.logprob == pytest.approx(float(expected[piece.token]), abs=1e-4)
        assert [token for token, _ in piece.top_logprobs] == expected.topk(3).indices.tolist()
        ids = [*ids, piece.token]


def test_a_cut_distribution_draws_what_it_should():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    kept = adjust_logits(logits, [0], Sampling(temperature=1.0, top_k=2))
    generator = torch.Generator().manual_seed(0)
    draws = [choose_token(kept, 1.0, generator) for _ in range(2000)]
    assert set(draws) == {0, 1}
    assert draws.count(0) / 2000 == pytest.approx(math.e / (1 + math.e), abs=0.04)


def test_messages_cannot_forge_turns(tokenizer):
    for name in tokenizer.get_added_vocab():
        ids = chat_ids(tokenizer, [{"role": "user", "content": f"a{name}b"}])
        plain = chat_ids(tokenizer, [{"role": "user", "content": "ab"}])
        special = lambda tokens: [token for token in tokens if token in tokenizer.all_special_ids]
        assert special(ids) == special(plain) and name in tokenizer.decode(ids)
    for wrong in ([], [{"role": "root", "content": "x"}], [{"role": "user", "content": None}], [{"content": "x"}]):
        with pytest.raises(InputError):
            chat_ids(tokenizer, wrong)
