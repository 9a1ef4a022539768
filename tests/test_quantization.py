"""Rounding, damaged folders, odd shapes, and the stage on a model that is not the chapter's."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings as budget, strategies as st

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.bridge import load_decoder, save_model
from llmbook.core import CorruptFileError, InputError, LlmbookError, SettingsError, seal, set_seed, write_json
from llmbook.generation import Sampling, complete
from llmbook.positions import Stretch
from llmbook.quantization import (
    Int8Matrix, QuantizeSettings, export_gguf, fit_group, load_quantized, quantize, quantize_gptq,
    quantize_rows, quantize_rtn, save_quantized, spread_windows, to_int8,
)
from llmbook.tokenization import identify_tokenizer, load_tokenizer, train_tokenizer, write_shard

TEXT = [f"Return item {i} of a list, or raise IndexError when {i} is too large." for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder whose widths are not multiples of 32, with its tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXT, 320)
    set_seed(0)
    shape = DecoderSettings(len(tokenizer), 2, 48, 4, 2, 104, 64, tied=False)
    decoder = Decoder(shape)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.ndim == 2:
                weight.mul_(6)
    save_model(decoder, tokenizer, folder / "chat")
    (folder / "tokens").mkdir()
    splits = {"train": TEXT[:50], "validation": TEXT[50:]}
    entries = {name: write_shard(tokenizer, [texts], folder / "tokens", name) for name, texts in splits.items()}
    meta = {"dtype": "uint16", "vocabulary": len(tokenizer), "tokenizer": identify_tokenizer(tokenizer)}
    write_json(folder / "tokens" / "meta.json", meta | {"splits": entries})
    return folder


@budget(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 70), st.sampled_from((4, 8)), st.integers(1, 40), st.floats(1e-6, 1e4))
def test_rounding_stays_within_half_a_step(out, width, bits, group, size):
    weight = torch.randn(out, width) * size
    quantized = quantize_rtn(weight, bits, group)
    assert width % fit_group(width, group) == 0
    steps = quantized.scales.repeat_interleave(width // quantized.scales.shape[1], 1)
    assert ((quantized.restore() - weight).abs() <= 0.5001 * steps).all()
    assert quantized.codes.abs().max() <= 2 ** (bits - 1) - 1
    assert torch.equal(quantized.scales.bfloat16().float(), quantized.scales)


@pytest.mark.parametrize("rank", [4, 24, 64])
def test_gptq_beats_rounding_on_the_layers_output(rank):
    set_seed(rank)
    inputs = torch.randn(500, rank) @ torch.randn(rank, 64) + 0.05 * torch.randn(500, 64)
    weight, hessian = torch.randn(32, 64), inputs.T @ inputs
    error = lambda quantized: ((quantized.restore() - weight) @ inputs.T).square().sum()
    for group in (None, 32):
        assert error(quantize_gptq(weight, hessian, 4, group)) < 0.8 * error(quantize_rtn(weight, 4, group))


def test_gptq_survives_dead_inputs_and_no_inputs():
    weight, hessian = torch.randn(8, 32), torch.zeros(32, 32)
    assert torch.isfinite(quantize_gptq(weight, hessian, 4, 16).restore()).all()
    hessian[3, 3] = 7.0
    assert torch.isfinite(quantize_gptq(weight, hessian, 8, 16).restore()).all()


@pytest.mark.parametrize("width", [32, 64, 95, 96, 100, 104])
@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 70])
def test_int8_products_agree_for_any_shape(width, rows):
    set_seed(width + rows)
    weight, x = torch.randn(41, width), torch.randn(rows, width)
    exact = x @ quantize_rtn(weight).restore().T
    assert (Int8Matrix.of(weight)(x) - exact).norm() / exact.norm() < 0.006


def test_int8_weights_from_a_mapped_file_are_moved_to_even_addresses():
    buffer = torch.zeros(32 * 8 + 1, dtype=torch.int8)
    matrix = Int8Matrix(buffer[1:].view(8, 32), torch.ones(8))
    assert matrix.codes.data_ptr() % 64 == 0 and matrix(torch.ones(1, 32)).shape == (1, 8)


def test_saved_and_read_back(folder, tmp_path):
    from llmbook.tokenization import load_tokenizer

    decoder, tokenizer = load_decoder(folder / "chat"), load_tokenizer(folder / "chat")
    save_quantized(decoder, quantize_rows(decoder), folder / "chat", tmp_path / "int8")
    sampling = Sampling(max_tokens=20, temperature=1.0, seed=3)
    kept = complete(to_int8(decoder), tokenizer, "Return", sampling)
    assert complete(load_quantized(tmp_path / "int8"), tokenizer, "Return", sampling) == kept


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [_flip, _truncate, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "checksums.json"])
def test_damaged_folders_are_refused(folder, tmp_path, damage, name):
    decoder = load_decoder(folder / "chat")
    save_quantized(decoder, quantize_rows(decoder), folder / "chat", tmp_path)
    damage(tmp_path / name)
    with pytest.raises(LlmbookError):
        load_quantized(tmp_path)


@pytest.mark.parametrize("change", [
    {"hidden_size": 64, "head_dim": 12}, {"num_hidden_layers": 3}, {"format_version": 2}, {"model_type": "llama"},
    {"vocab_size": 300},
])
def test_mismatched_folders_are_refused(folder, tmp_path, change):
    decoder = load_decoder(folder / "chat")
    save_quantized(decoder, quantize_rows(decoder), folder / "chat", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | change)
    seal(tmp_path)
    with pytest.raises((CorruptFileError, InputError)):
        load_quantized(tmp_path)


def test_transformers_refuses_what_it_cannot_read(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    decoder = load_decoder(folder / "chat")
    save_quantized(decoder, quantize_rows(decoder), folder / "chat", tmp_path)
    with pytest.raises(ValueError, match="llmbook-integers"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_gguf_opens_with_rows_that_do_not_fit_q8(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    export_gguf(folder / "chat", tmp_path / "model.gguf", "q8_0")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    ids = torch.randint(300, (1, 12))
    with torch.inference_mode():  # no row is a multiple of 32, so all stay in 32 bits
        torch.testing.assert_close(opened(ids).logits, load_decoder(folder / "chat")(ids), atol=1e-3, rtol=1e-3)
    with pytest.raises(SettingsError, match="q8_0 or f32"):
        export_gguf(folder / "chat", tmp_path / "other.gguf", "q2")
    assert not (tmp_path / "other.gguf").exists()


def read_angles(path):
    """Cosines and sines as llama.cpp computes them from the entries of a file, at 60 positions."""
    import gguf

    reader = gguf.GGUFReader(path)
    value = lambda name, usual=None: (reader.fields[f"llama.rope.{name}"].contents()
                                      if f"llama.rope.{name}" in reader.fields else usual)
    width, base, kind = value("dimension_count"), value("freq_base"), value("scaling.type", "none")
    divisors = [torch.tensor(t.data) for t in reader.tensors if t.name == "rope_freqs.weight"]
    pairs = torch.arange(width // 2)
    fast = torch.arange(60)[:, None] * base ** (-2 * pairs / width) / (divisors[0] if divisors else 1)
    slow = fast / value("scaling.factor", 1.0)
    if kind != "yarn":
        return slow.cos(), slow.sin()
    turns = lambda many: width * math.log(value("scaling.original_context_length") / (many * 2 * math.pi)) / (2 * math.log(base))
    low = max(0, math.floor(turns(value("scaling.yarn_beta_fast", 32.0))))
    high = min(width - 1, math.ceil(turns(value("scaling.yarn_beta_slow", 1.0))))
    kept = 1 - ((pairs - low) / max(0.001, high - low)).clamp(0, 1)
    angles, size = slow * (1 - kept) + fast * kept, 1 + 0.1 * math.log(value("scaling.factor"))
    size *= value("scaling.attn_factor", 1.0)
    return angles.cos() * size, angles.sin() * size


@pytest.mark.parametrize("stretch", [
    Stretch(), Stretch("ntk", 4.0), Stretch("linear", 4.0), Stretch("llama3", 8.0, 40), Stretch("llama3", 4.0, 60, 0.5, 9.0),
    Stretch("yarn", 4.0, 16), Stretch("yarn", 4.0, 24, 1.5, 9.0, 1.4),
], ids=str)
def test_gguf_carries_the_stretch(folder, tmp_path, stretch):
    decoder = load_decoder(folder / "chat")
    longer = Decoder(replace(decoder.settings, stretch=stretch, rope_base=5e3))
    longer.load_state_dict(decoder.state_dict())
    save_model(longer, load_tokenizer(folder / "chat"), tmp_path / "longer")
    export_gguf(tmp_path / "longer", tmp_path / "model.gguf", "f32")
    for found, expected in zip(read_angles(tmp_path / "model.gguf"), longer.rotary(0, 60), strict=True):
        torch.testing.assert_close(found, expected[:, : found.shape[1]], atol=1e-4, rtol=0)
    save_quantized(longer, quantize_rows(longer), tmp_path / "longer", tmp_path / "int8")
    torch.testing.assert_close(load_quantized(tmp_path / "int8").turns.real, longer.rotary(0, 64)[0][:, :6])


def test_gguf_refuses_a_stretch_it_cannot_name(folder, tmp_path):
    decoder = Decoder(replace(load_decoder(folder / "chat").settings, stretch=Stretch("yarn", 4.0, 16, whole=False)))
    save_model(decoder, load_tokenizer(folder / "chat"), tmp_path / "chat")
    with pytest.raises(InputError, match="whole pairs"):
        export_gguf(tmp_path / "chat", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_gguf_refuses_a_tokenizer_it_cannot_name(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "chat", tmp_path / "chat")
    path = tmp_path / "chat" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    write_json(path, tokenizer)
    seal(tmp_path / "chat")
    with pytest.raises(InputError, match="split rule"):
        export_gguf(tmp_path / "chat", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_stage(folder, tmp_path, bits):
    settings = QuantizeSettings(bits=bits, calibration_tokens=512, held_out_tokens=256, speed_tokens=2)
    inputs = {"chat": folder / "chat", "tokens": folder / "tokens"}
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        numbers = quantize(settings, inputs, tmp_path / name)
        json.dumps(numbers)
        contents.append(seal(tmp_path / name))
        quantize(settings, inputs, tmp_path / name)  # again, over what a killed run may have left
    assert contents[0] == contents[1]
    rows = {row["model"]: row for row in numbers["table"]}
    assert abs(rows["8 bits"]["perplexity_change"]) < 0.02 and rows["original"]["kl"] == 0
    load_quantized(tmp_path / "two" / f"int{bits}-gptq")


@pytest.mark.parametrize("wrong", [{"bits": 3}, {"group": 0}, {"held_out_tokens": 1}, {"speed_tokens": 0}])
def test_wrong_settings(wrong):
    with pytest.raises(SettingsError):
        QuantizeSettings(**wrong)


def test_windows_cover_a_split():
    found = spread_windows(np.arange(100, dtype=np.uint16), 50, 10)
    assert found.shape == (5, 10) and found[0, 0] == 0 and found[-1, -1] == 99
    assert spread_windows(np.arange(5, dtype=np.uint16), 50, 10).shape == (1, 5)
    with pytest.raises(InputError):
        spread_windows(np.arange(1, dtype=np.uint16), 50, 10)
