"""The decoder beyond its page: hand-overs to other tools, caches, faults, odd shapes."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.architecture import count_parameters, Decoder, DecoderSettings, derive_decoder
from llmbook.attention import attend, Attention, naive_attention
from llmbook.bridge import export_tensors, import_tensors, load_decoder
from llmbook.bridge import read_config, save_model, to_transformers, write_config
from llmbook.core import CorruptFileError, InputError, ResourceError, SettingsError

SMALL = DecoderSettings(120, 2, 48, 4, 2, 80, 32, head_width=12)


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return Decoder(SMALL)


class ListCache:
    """The simplest cache: concatenate."""

    def __init__(self):
        self.length, self.held = 0, {}

    def update(self, layer, keys, values):
        if layer in self.held:
            keys = torch.cat((self.held[layer][0], keys), 2)
            values = torch.cat((self.held[layer][1], values), 2)
        self.held[layer] = keys, values
        return keys, values


@pytest.mark.parametrize("steps", [(20,), (1,) * 20, (7, 1, 5, 7)])
def test_a_cache_changes_nothing(decoder, steps):
    ids, cache, parts = torch.randint(0, 120, (2, 20)), ListCache(), []
    for part in ids.split(steps, 1):
        parts.append(decoder(part, cache))
        cache.length += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), decoder(ids), atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 3), shared=st.integers(1, 3), t=st.integers(1, 9), extra=st.integers(0, 9),
    causal=st.booleans(), masked=st.booleans(), seed=st.integers(0, 2**16),
)
def test_naive_and_fused_attention_agree(groups, shared, t, extra, causal, masked, seed):
    torch.manual_seed(seed)
    s = t + extra
    queries = torch.randn(2, groups * shared, t, 4)
    keys, values = torch.randn(2, 2, groups, s, 4)
    mask = torch.rand(2, 1, t, s) < 0.6 if masked else None
    one = naive_attention(queries, keys, values, mask, causal)
    torch.testing.assert_close(one, attend(queries, keys, values, mask, causal), atol=1e-5, rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3), (3, 1)]), half=st.integers(1, 9), depth=st.integers(1, 3),
    hidden=st.integers(1, 40), vocabulary=st.integers(2, 60), tied=st.booleans(), t=st.integers(1, 16),
)
def test_any_shape_equals_llama(heads, half, depth, hidden, vocabulary, tied, t):
    h, kv = heads
    shape = DecoderSettings(vocabulary, depth, 2 * half * h, h, kv, hidden, 16, tied=tied)
    decoder, ids = Decoder(shape), torch.randint(0, vocabulary, (2, t))
    assert count_parameters(shape) == sum(p.numel() for p in decoder.parameters())
    torch.testing.assert_close(decoder(ids), to_transformers(decoder)(ids).logits, atol=1e-4, rtol=1e-3)
    again = import_tensors(read_config(write_config(shape)), export_tensors(decoder))
    assert torch.equal(again(ids), decoder(ids))


def test_training_after_generating(decoder):
    with torch.inference_mode():
        decoder(torch.zeros(1, 4, dtype=torch.long))
    decoder(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert all(weight.grad is not None for weight in decoder.parameters())


def test_a_loaded_model_is_trained_without_touching_its_file(decoder, tmp_path):
    save_model(decoder, None, tmp_path)
    ids, loaded = torch.randint(0, 120, (2, 8)), load_decoder(tmp_path)
    before = loaded(ids).detach()
    loaded(ids).sum().backward()
    torch.optim.SGD(loaded.parameters(), 0.1).step()
    assert not torch.allclose(loaded(ids), before)
    assert torch.equal(load_decoder(tmp_path)(ids), before)


def test_loading_imports_no_transformers(decoder, tmp_path):
    save_model(decoder, None, tmp_path)
    code = (
        "import sys; from llmbook.bridge import load_decoder; load_decoder(sys.argv[1]);"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_half_precision_folders(decoder, tmp_path):
    to_transformers(decoder).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_decoder(tmp_path).embedding.weight.dtype == torch.float32
    assert load_decoder(tmp_path, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16


def test_the_tokenizer_travels_along_and_must_fit(decoder, tmp_path):
    from llmbook.tokenization import train_tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["os.replace renames a file; open opens it, close closes it. " * 20]
    fitting = train_tokenizer(words, 270)
    model = Decoder(derive_decoder(1, len(fitting), 32))
    save_model(model, fitting, tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("open a file", return_tensors="pt").input_ids
    torch.testing.assert_close(opened(ids).logits, load_decoder(tmp_path)(ids), atol=1e-4, rtol=1e-3)
    assert opened.config.eos_token_id == fitting.eos_token_id
    with pytest.raises(InputError, match="tokens for a model of 120"):
        save_model(decoder, fitting, tmp_path / "other")
    (tmp_path / "checksums.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 5000}))
    with pytest.raises(InputError, match="trained with"):
        load_decoder(tmp_path)


def test_a_swapped_tokenizer_is_noticed(decoder, tmp_path):
    from llmbook.tokenization import train_tokenizer

    one, two = (train_tokenizer([text * 50], 270) for text in ("renames a file ", "quite another text "))
    save_model(Decoder(derive_decoder(1, len(one), 32)), one, tmp_path)
    two.save_pretrained(tmp_path)
    with pytest.raises(CorruptFileError, match="tokenizer.json` is changed"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"}, {"model_type": None}, {"attention_bias": True}, {"mlp_bias": True},
        {"hidden_act": "gelu"}, {"sliding_window": 8},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 8.0}},
        {"rope_scaling": {"type": "longrope", "factor": 2.0}, "rope_parameters": None},
    ],
)
def test_other_architectures_are_refused(change):
    with pytest.raises(InputError, match=next(iter(change)).replace("rope_parameters", "rope_type")
                       .replace("rope_scaling", "rope_type")):
        read_config(write_config(SMALL) | change)


def test_configurations_of_transformers_4():
    old = write_config(SMALL)
    del old["rope_parameters"], old["head_dim"], old["num_key_value_heads"], old["tie_word_embeddings"]
    shape = read_config(old | {"rope_theta": 5e5})
    assert (shape.rope_base, shape.key_value_heads, shape.channels, shape.tied) == (5e5, 4, 12, False)
    del old["hidden_size"]
    with pytest.raises(InputError, match="hidden_size"):
        read_config(old)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(decoder, tmp_path, keep):
    save_model(decoder, None, tmp_path)
    (tmp_path / "checksums.json").unlink()
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptFileError, match="not whole"):
        load_decoder(tmp_path)


def test_weights_of_another_shape_and_missing_files(decoder, tmp_path):
    with pytest.raises(InputError, match="config.json"):
        load_decoder(tmp_path)
    save_model(decoder, None, tmp_path)
    (tmp_path / "checksums.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 81}))
    with pytest.raises(CorruptFileError, match="gate_proj"):
        load_decoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_decoder(tmp_path)


def test_a_full_disk_keeps_the_old_model(decoder, tmp_path, monkeypatch):
    import safetensors
    import safetensors.torch

    save_model(decoder, None, tmp_path)
    old = (tmp_path / "model.safetensors").read_bytes()

    def full(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ResourceError, match="No space left"):
        save_model(Decoder(SMALL), None, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == old
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 50}, {"key_value_heads": 3}, {"heads": 0}, {"depth": -1}, {"vocabulary": 0},
        {"width": 20, "head_width": None}, {"head_width": 7},
    ],
)
def test_impossible_shapes(wrong):
    with pytest.raises(SettingsError):
        DecoderSettings(**({"vocabulary": 9, "width": 48, "heads": 4, "key_value_heads": 2} | wrong))


def test_wrong_input(decoder):
    with pytest.raises(InputError, match="context"):
        decoder(torch.zeros(1, 33, dtype=torch.long))
    for bad in (120, -1):
        with pytest.raises(InputError, match="0 to 119"):
            decoder(torch.tensor([[1, bad]]))
    with pytest.raises(SettingsError):
        Attention(10, 3)


def test_states_and_logits_are_one_model(decoder):
    ids = torch.randint(0, 120, (2, 9))
    torch.testing.assert_close(decoder(ids), F.linear(decoder.states(ids), decoder.output_weight))
    assert torch.equal(decoder(ids, logits=False), decoder.states(ids))


@pytest.mark.parametrize("depth", [1, 4, 7, 30])
def test_the_dial(depth):
    shape = derive_decoder(depth, 1000, 64)
    assert shape.width % 64 == 0 and shape.hidden % 64 == 0 and shape.channels == 64
    assert (shape.depth, shape.vocabulary, shape.context) == (depth, 1000, 64)
