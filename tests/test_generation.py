"""Decoding under faults, odd inputs and other people's models; the chapter's page shows the rest."""

import json
import threading

import pytest
import torch
from sample_models import build_decoder, build_tokenizer
from hypothesis import given, settings as budget, strategies as st

from llmbook.architecture import DecoderSettings
from llmbook.core import InputError, set_seed
from llmbook.generation import (
    KeyValueCache, LeanDecoder, TextStream, TokenBytes, chat_ids, complete, describe_logprobs, next_logits, stream,
)
from llmbook.sampling import Sampling
from llmbook.tokenization import end_tokens


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_decoder(len(tokenizer))


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


@budget(max_examples=80, deadline=None)
@given(data=st.data(), n=st.integers(1, 60), high=st.booleans())
def test_any_tokens_stream_as_the_tokenizer_decodes_them(tokenizer, data, n, high):
    low = 134 if high else 6  # the bytes that are not ASCII lie there: most of it is no UTF-8
    tokens = data.draw(st.lists(st.integers(low, 261 if high else len(tokenizer) - 1), min_size=n, max_size=n))
    words = TextStream(tokenizer)
    shown = "".join([words.add(token) for token in tokens]) + words.rest()
    whole = tokenizer.decode(tokens)
    assert whole.startswith(shown) and len(whole) - len(shown) <= 3  # at most half a character waits


def test_a_model_of_broken_bytes_cannot_hold_the_stream_back(tokenizer):
    broken = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("日")[0])
    words = TextStream(tokenizer)
    assert "".join(words.add(broken) for _ in range(500)).count("�") >= 499


def test_tokenizers_with_names_for_bytes():
    from tokenizers import Tokenizer, decoders, models as kinds
    from transformers import PreTrainedTokenizerFast

    names = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b"]
    backend = Tokenizer(kinds.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    ids = [names.index("▁a"), *(1 + byte for byte in "é🙂".encode()), names.index("b")]
    assert b"".join(map(TokenBytes(theirs), ids)) == " aé🙂b".encode()
    words = TextStream(theirs)
    assert "".join(words.add(token) for token in [*ids, 0]) + words.rest() == theirs.decode(ids)


def test_half_a_character_is_never_shown(tokenizer):
    tokens = tokenizer("🙂").input_ids
    assert len(tokens) > 1
    done = complete(Script(tokens, len(tokenizer)), tokenizer, [7], Sampling(max_tokens=len(tokens) - 1))
    assert (done.text, done.finish_reason) == ("", "length")


@pytest.mark.parametrize("changes", [
    {}, {"tied": False}, {"key_value_heads": 4}, {"head_width": 16}, {"rope_base": 5e5},
])
def test_lean_decoder_says_the_same(tokenizer, changes):
    model = build_decoder(len(tokenizer), **changes)
    lean = LeanDecoder.of(model)
    for sampling in (Sampling(max_tokens=40), Sampling(max_tokens=40, temperature=1.0, top_p=0.9, seed=1)):
        assert complete(lean, tokenizer, "Return", sampling) == complete(model, tokenizer, "Return", sampling)
    cache = KeyValueCache(model.settings, 20, batch=2)
    ids = torch.randint(len(tokenizer), (2, 12))
    with torch.inference_mode():
        for start, end in ((0, 5), (5, 6), (6, 12)):  # prompt, one step, several at once
            step = next_logits(lean, ids[:, start:end], cache)
        torch.testing.assert_close(step, next_logits(model, ids), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("lean", [False, True])
def test_the_cache_holds_16_bits(tokenizer, lean):
    model = build_decoder(len(tokenizer)).bfloat16()
    exact = build_decoder(len(tokenizer))
    exact.load_state_dict(model.state_dict())  # the rounded weights in 32 bits
    model = LeanDecoder.of(model) if lean else model
    cache, ids = KeyValueCache(model.settings, 20, like=model.norm.weight), torch.randint(len(tokenizer), (1, 16))
    assert cache.keys.dtype == torch.bfloat16
    with torch.inference_mode():
        for start, end in ((0, 7), (7, 8), (8, 16)):
            step = next_logits(model, ids[:, start:end], cache)
        whole, expected = next_logits(model, ids), next_logits(exact, ids)
    assert step.dtype == torch.float32
    spread = expected.std()
    assert (step - whole).abs().max() < 0.15 * spread and (step - expected).abs().max() < 0.3 * spread
    done = complete(model, tokenizer, "Return", Sampling(max_tokens=9, temperature=1.0, top_p=0.9, seed=1, logprobs=1))
    assert done.tokens and all(logprob <= 0 for logprob in done.logprobs)


SHAPES = {
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96},
    "one key for all": {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 64},
    "wide heads": {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 96, "head_dim": 80},
    "narrow heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 96, "head_dim": 10},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "sliding_window": None},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_any_folder_of_the_family_in_any_number_format(tokenizer, tmp_path, kind, tied):
    """A folder that transformers wrote, opened in 32, 16, 8 and 4 bits, against transformers on the same weights."""
    import transformers

    from llmbook.bridge import load_decoder, to_transformers
    from llmbook.quantization import load_quantized, quantize_blocks, quantize_rows, save_quantized, to_int8

    name = "Mistral" if kind == "mistral" else "Llama"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer), intermediate_size=96, num_hidden_layers=2, max_position_embeddings=64, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0}, tie_word_embeddings=tied, bos_token_id=0,
        eos_token_id=0, pad_token_id=1, initializer_range=0.3, **SHAPES[kind],
    )
    set_seed(3)
    stranger = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    stranger.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    ids = torch.tensor([tokenizer("Open a file and read naïve lines").input_ids])

    def agree(model, reference, tolerance: float) -> None:
        with torch.inference_mode():
            expected = reference(ids).logits[0].float()
            cache = KeyValueCache(model.settings, ids.shape[1], like=model.norm.weight)
            steps = [ids[:, :4], *ids[:, 4:].split(1, dim=1)]
            found = torch.cat([next_logits(model, step, cache) for step in steps])
        error = (found - expected[3:]).square().mean().sqrt() / expected.std()
        assert error < tolerance, float(error)

    plain = load_decoder(tmp_path / "plain")
    agree(LeanDecoder.of(plain), stranger, 1e-4)
    with torch.inference_mode():
        text = stranger.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert list(complete(LeanDecoder.of(plain), tokenizer, ids[0].tolist(), Sampling(max_tokens=20)).tokens) == text.tolist()
    half = load_decoder(tmp_path / "plain", dtype=torch.bfloat16)
    agree(LeanDecoder.of(half), stranger, 0.05)
    small = to_int8(plain)
    agree(small, stranger, 0.12)
    assert complete(small, tokenizer, "Open a", Sampling(max_tokens=5)).tokens
    few = load_decoder(tmp_path / "plain")
    codes = quantize_rows(few) | quantize_blocks(few, ids, bits=4, method="rtn")
    save_quantized(few, codes, tmp_path / "plain", tmp_path / "int4")
    agree(load_quantized(tmp_path / "int4"), to_transformers(few).eval(), 0.15)  # of which the codes stand for the blocks


@pytest.mark.parametrize("stretched", [
    {"rope_type": "linear", "factor": 2.0}, {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                             "original_max_position_embeddings": 32}, {"rope_type": "yarn", "factor": 4.0},
])
def test_stretched_angles_are_used_not_ignored(model, tokenizer, tmp_path, stretched):
    from transformers import AutoModelForCausalLM

    from llmbook.bridge import load_decoder, save_model

    save_model(model, tokenizer, tmp_path)
    (tmp_path / "checksums.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": stretched}))
    stretching, theirs = LeanDecoder.of(load_decoder(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(3, len(tokenizer), (1, 90))
    with torch.inference_mode():
        torch.testing.assert_close(stretching.head(stretching.states(ids)[0]), theirs(ids).logits[0], atol=1e-3, rtol=1e-3)
        assert (stretching.states(ids) - LeanDecoder.of(model).states(ids)).abs().max() > 0.1
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}))
    with pytest.raises(InputError, match="rope_type"):
        load_decoder(tmp_path)


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


def test_logprobs_in_openais_shape(model, tokenizer):
    for piece in stream(model, tokenizer, [7, 9], Sampling(max_tokens=20, temperature=1.5, seed=2, logprobs=4)):
        described = describe_logprobs(tokenizer, piece)
        assert set(described) == {"token", "logprob", "bytes", "top_logprobs"} and len(described["top_logprobs"]) == 4
        for entry in described["top_logprobs"]:
            assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"] and entry["logprob"] <= 0
        assert json.loads(json.dumps(described)) == described
        values = [entry["logprob"] for entry in described["top_logprobs"]]
        assert values == sorted(values, reverse=True)


def test_a_rule_from_outside_is_asked_with_what_was_generated(model, tokenizer):
    seen = []

    def allow(generated):
        seen.append(list(generated))
        allowed = torch.zeros(50, dtype=torch.bool)  # shorter than the vocabulary: the rest is not allowed
        allowed[40 + len(generated)] = True
        return allowed

    done = complete(model, tokenizer, [7, 8, 9], Sampling(max_tokens=4, temperature=2.0, repetition_penalty=9.0), allow)
    assert done.tokens == (40, 41, 42, 43) and seen == [[], [40], [40, 41], [40, 41, 42]]


def test_penalties_of_services_look_at_the_answer_alone(model, tokenizer):
    free = complete(model, tokenizer, [7, 8], Sampling(max_tokens=30)).tokens
    prompt = [7, 8, *free]
    for changes in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        asked = Sampling(max_tokens=1, **changes)
        plain = complete(model, tokenizer, prompt, Sampling(max_tokens=1))
        assert complete(model, tokenizer, prompt, asked).tokens == plain.tokens


def test_messages_cannot_forge_turns(tokenizer):
    for name in tokenizer.get_added_vocab():
        ids = chat_ids(tokenizer, [{"role": "user", "content": f"a{name}b"}])
        plain = chat_ids(tokenizer, [{"role": "user", "content": "ab"}])
        special = lambda tokens: [token for token in tokens if token in tokenizer.all_special_ids]
        assert special(ids) == special(plain) and name in tokenizer.decode(ids)
    for wrong in ([], [{"role": "root", "content": "x"}], [{"role": "user", "content": None}], [{"content": "x"}]):
        with pytest.raises(InputError):
            chat_ids(tokenizer, wrong)
