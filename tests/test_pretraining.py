"""The stage of pretraining, its windows, schedules and settings, on texts that are not in the notebooks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llmbook.architecture import Decoder, DecoderSettings, initialise_weights
from llmbook.bridge import load_decoder
from llmbook.core import InputError, SettingsError, set_seed, write_json
from llmbook.objectives import Windows, heldout_windows
from llmbook.optimisation import TrainSettings, schedule_rate
from llmbook.pretraining import PretrainSettings, count_pairs, pretrain, start_from_pairs
from llmbook.tokenization import TokenShard


def test_windows_cover_each_epoch_once():
    stream = np.arange(1000)
    for seed, length, rows in ((0, 7, 3), (1, 10, 4), (2, 33, 5)):
        windows = Windows(stream, length, rows, seed)
        for epoch in range(3):
            starts = windows.starts(epoch)
            assert len(set(starts.tolist())) == windows.count
            assert (np.diff(np.sort(starts)) == length).all() and starts.max() + length <= 1000
    with pytest.raises(InputError, match="at least"):
        Windows(stream[:10], 8, 1)


def test_heldout_windows_score_each_token_once():
    text = np.arange(1, 1001)
    for context, stride in ((64, 64), (64, 16), (50, 7), (2000, 2000)):
        seen = [labels[labels >= 0] for _, labels in heldout_windows(text, context, stride)]
        assert (np.concatenate(seen) == text).all()
        for ids, labels in heldout_windows(text, context, stride):
            assert len(ids) == len(labels) == context
            assert (ids[1:][labels[1:] >= 0] == labels[labels >= 0][-1] - 1).any() or stride < 3


def test_schedules_are_bounded_and_end_near_zero():
    for fall in ("linear", "cosine"):
        for decay in (0.0, 0.2, 1.0):
            settings = TrainSettings(steps=50, warmup=0.1, decay=decay, fall=fall)
            rates = [schedule_rate(step, settings) for step in range(50)]
            assert all(0 < rate <= 1 for rate in rates) and (rates[-1] < 0.11 or decay == 0)


def test_settings_name_what_is_wrong():
    with pytest.raises(SettingsError, match="steps = 0"):
        TrainSettings(steps=0)
    with pytest.raises(SettingsError, match="multiple of 64"):
        PretrainSettings(width=100)
    with pytest.raises(SettingsError, match="checkpoint_every"):
        PretrainSettings(checkpoint_every=0)


def make_inputs(folder: Path) -> dict[str, Path]:
    "A tokenizer and token shards of a text that is not in the notebook."
    from llmbook.tokenization import identify_tokenizer, train_tokenizer, write_shard

    texts = [f"Row {i}: the square of {i} is {i * i}." for i in range(600)]
    tokenizer = train_tokenizer(texts, 300)
    inputs = {"tokenizer": folder / "tokenizer", "tokens": folder / "tokens"}
    tokenizer.save_pretrained(inputs["tokenizer"])
    inputs["tokens"].mkdir()
    parts = {"train": texts[:500], "validation": texts[500:550], "test": texts[550:]}
    splits = {
        name: write_shard(tokenizer, [part], inputs["tokens"], name) for name, part in parts.items()
    }
    write_json(
        inputs["tokens"] / "meta.json",
        {"dtype": "uint16", "vocabulary": len(tokenizer), "splits": splits,
         "tokenizer": identify_tokenizer(tokenizer)},
    )
    return inputs


@pytest.mark.parametrize("packed, pairs", [(False, False), (True, True)])
def test_stage_writes_a_llama_that_transformers_opens(tmp_path, packed, pairs):
    from transformers import AutoModelForCausalLM

    inputs, output = make_inputs(tmp_path), tmp_path / "model"
    output.mkdir()
    settings = PretrainSettings(
        depth=2, width=64, context=32, steps=30, points=3, samples=2, precision="float32", packed=packed,
        pairs=pairs,
    )
    numbers = pretrain(settings, inputs, output)
    json.dumps(numbers)
    curve = numbers["curve"]
    assert [point["step"] for point in curve] == [0, 10, 20, 30]
    heldout = TokenShard(inputs["tokens"], "validation")
    uniform = np.log2(heldout.vocabulary) * len(heldout) / heldout.bytes
    assert numbers["bits_per_byte"] < 0.8 * uniform
    assert (curve[0]["bits_per_byte"] < 0.8 * uniform) == pairs, "pairs are known before the first step"
    assert numbers["shape"]["tied"] != pairs
    assert len(curve[-1]["samples"]) == 2 and not (output / "checkpoints").exists()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(output)(ids).logits
        assert torch.allclose(load_decoder(output)(ids), theirs, atol=1e-4)


def test_tables_that_are_wide_enough_hold_the_counted_pairs():
    tokens = np.random.default_rng(3).choice(12, 600, p=np.arange(1, 13) / 78)
    pairs = np.zeros((12, 12))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    shares = (np.bincount(tokens, minlength=12) + 1) / (600 + 12)
    mixed = (pairs + 5 * shares) / (pairs.sum(1, keepdims=True) + 5)
    set_seed(0)
    model = Decoder(DecoderSettings(12, 2, 16, 2, 2, 24, 8, tied=False))
    initialise_weights(model)
    start_from_pairs(model, tokens, believed=5.0)
    with torch.no_grad():
        guess = model(torch.arange(12)[:, None])[:, 0].softmax(-1).numpy()
    apart = np.abs(guess - mixed).max(1)
    assert np.sort(apart)[-2] < 1e-4, "the longest row is shortened, no other"


@pytest.mark.parametrize("tokens, vocabulary, believed", [
    ([1], 4, 20), ([], 4, 20), ([0, 4], 4, 20), ([0, -1], 4, 20), ([0, 1], 4, 0),
])
def test_pairs_of_what_is_no_text_are_refused(tokens, vocabulary, believed):
    with pytest.raises(InputError, match="two token ids or more"):
        count_pairs(np.array(tokens, np.int64), vocabulary, believed)
