"""Searches against the reference on random models, and against trying everything."""

import pytest
import torch
from sample_models import build_decoder
from hypothesis import given, settings as budget, strategies as st

from llmbook.bridge import to_transformers
from llmbook.core import InputError, SettingsError
from llmbook.generation import LeanDecoder, complete, next_logits
from llmbook.sampling import Sampling
from llmbook.search import beam_search, contrast, contrastive_search
from llmbook.tokenization import train_tokenizer

MODES = {"likely": False, "never": "never", "first": True}


@pytest.fixture(scope="module")
def models():
    """Random models of several shapes, each with its reference."""
    decoders = [
        build_decoder(120, 1), build_decoder(57, 2, tied=False, head_width=6),
        build_decoder(300, 3, key_value_heads=1, depth=1),
    ]
    return [(decoder, LeanDecoder.of(decoder), to_transformers(decoder).eval()) for decoder in decoders]


def reference(llama, ids: list[int], beams: int, count: int, ends, **options) -> list[tuple[tuple, float]]:
    """Tokens (padding cut) and score of each beam of `transformers.generate`."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False, num_beams=beams, num_return_sequences=beams, max_new_tokens=count, bos_token_id=None,
        eos_token_id=sorted(ends) or None, pad_token_id=0, return_dict_in_generate=True, output_scores=True, **options,
    )
    with torch.inference_mode():
        prompt = torch.tensor([ids])
        found = llama.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    rows = []
    for row in found.sequences[:, len(ids) :].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        rows.append(tuple(row[:stop]))
    return list(zip(rows, found.sequences_scores.tolist(), strict=True))


@budget(max_examples=40, deadline=None)
@given(
    st.integers(0, 2), st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(2, 6), st.integers(1, 14),
    st.sets(st.integers(1, 56), max_size=24), st.sampled_from([0.0, 0.7, 1.0, 2.0, -0.5]), st.sampled_from(list(MODES)),
)
def test_beams_are_those_of_the_reference(models, which, ids, beams, count, ends, penalty, mode):
    decoder, lean, llama = models[which]
    expected = reference(llama, ids, beams, count, ends, length_penalty=penalty, early_stopping=MODES[mode])
    for model in (decoder, lean):
        found = beam_search(model, ids, beams, count, frozenset(ends), penalty, mode)
        assert [beam.score for beam in found] == pytest.approx([score for _, score in expected], abs=2e-3, rel=1e-3)
        for ours, (tokens, score) in zip(found, expected, strict=True):
            near = [other for other, value in expected if abs(value - score) < 1e-3]
            assert ours.tokens == tokens or len(near) > 1 and ours.tokens in near


def test_beams_reach_what_trying_everything_reaches(models):
    model = models[0][0]
    found = beam_search(model, [7, 8], beams=64, max_tokens=2, length_penalty=0.0)[0]
    with torch.inference_mode():
        first = next_logits(model, torch.tensor([[7, 8]]))[0].log_softmax(-1)
        rows = torch.tensor([[7, 8, token] for token in range(len(first))])
        both = first[:, None] + next_logits(model, rows).log_softmax(-1)
    assert found.score == pytest.approx(float(both.max()), abs=1e-3)
    assert found.tokens == tuple(divmod(int(both.argmax()), len(first)))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("penalty", [0.2, 0.6, 1.0])
def test_contrast_is_the_formula(models, which, penalty):
    decoder, lean, _ = models[which]
    ids, k = [3, 9, 4, 9], 5
    found = contrastive_search(lean, ids, k, penalty, 20)
    for i, token in enumerate(found):
        past = [*ids, *found[:i]]
        with torch.inference_mode():
            states = decoder.states(torch.tensor([past]))[0]
            chances, tokens = next_logits(decoder, torch.tensor([past]))[0].softmax(-1).topk(k)
            new = [decoder.states(torch.tensor([[*past, int(other)]]))[0, -1] for other in tokens]
            alike = torch.stack([torch.cosine_similarity(state[None], states).max() for state in new])
        scores = (1 - penalty) * chances - penalty * alike
        at = tokens.tolist().index(token)
        assert scores[at] > scores.max() - 1e-4
        torch.testing.assert_close(contrast(chances, torch.stack(new), states, penalty), scores, atol=1e-5, rtol=1e-4)


def test_contrast_of_nothing_is_greedy(models):
    tokenizer = train_tokenizer(["a text of no importance"] * 3, 290)
    model = build_decoder(len(tokenizer))
    plain = complete(model, tokenizer, [7, 8], Sampling(max_tokens=15)).tokens
    assert tuple(contrastive_search(model, [7, 8], 4, 0.0, 15))[: len(plain)] == plain


def test_searches_stay_in_the_context(models):
    lean = models[0][1]
    assert len(beam_search(lean, [7] * 94, 3, 50)[0].tokens) <= 2
    assert len(contrastive_search(lean, [7] * 94, 3, max_tokens=50)) == 2


def test_searches_refuse_nonsense(models):
    model = models[0][0]
    for call in (lambda: beam_search(model, [7], 0), lambda: contrastive_search(model, [7], penalty=2.0),
                 lambda: beam_search(model, [7], 2, 0), lambda: beam_search(model, [7], stop="soon"),
                 lambda: beam_search(model, [7], length_penalty=float("nan"))):
        with pytest.raises(SettingsError):
            call()
    for call in (lambda: beam_search(model, []), lambda: contrastive_search(model, [7] * 96)):
        with pytest.raises(InputError):
            call()
