"""Faults of the training loop: kills, flipped bytes, bad losses, several processes."""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.bridge import load_decoder
from llmbook.core import InputError, ResourceError, SettingsError, write_json
from llmbook.objectives import Autoregressive, Windows, heldout_windows
from llmbook.optimisation import TrainSettings, schedule_rate
from llmbook.pretraining import PretrainSettings, plan_cost, pretrain
from llmbook.training import collect_weights, load_checkpoint, save_checkpoint, train

SHAPE = DecoderSettings(64, 2, 32, 2, 2, 48, 16)
SETTINGS = TrainSettings(steps=40, precision="float32", device="cpu", checkpoint_every=1)


def tokens() -> np.ndarray:
    "A stream with something to learn: each token follows from the one before."
    chance = np.random.default_rng(0)
    return (np.cumsum(chance.integers(1, 4, 4000)) % 64).astype(np.uint16)


def learn(folder: Path, settings: TrainSettings = SETTINGS, **options) -> tuple[Decoder, dict]:
    "Train the tiny model in a folder."
    torch.manual_seed(1)
    model = Decoder(SHAPE)
    objective = Autoregressive(tokens(), context=16, rows=8)
    return model, train(model, objective, settings, folder, watch_every=10, **options)


def equal(one: dict, other: dict) -> bool:
    "Whether two sets of weights have the same bits."
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def start(folder: Path, settings: dict, **environment: str) -> subprocess.Popen:
    "Train in another process, by this file."
    command = [sys.executable, __file__, str(folder), json.dumps(settings)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_kill_at_random_moments(tmp_path, optimiser):
    settings = replace(SETTINGS, optimiser=optimiser, steps=60)
    undisturbed, whole = learn(tmp_path / "undisturbed", settings)
    chance, folder = random.Random(optimiser), tmp_path / "killed"
    for _ in range(3):
        process = start(folder, {"optimiser": optimiser, "steps": 60})
        done = max((int(p.name[5:]) for p in folder.glob("step-*")), default=0)
        goal, patience = min(done + chance.randint(3, 15), 59), time.time() + 120
        while not (folder / f"step-{goal:08d}").exists() and process.poll() is None:
            assert time.time() < patience
            time.sleep(0.001)
        time.sleep(chance.random() * 0.03)  # anywhere: in a step, in the middle of writing
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0].decode()
        assert process.returncode == -signal.SIGKILL, output[-3000:]
    model, resumed = learn(folder, settings)
    assert resumed["resumed_from"] > 0 and resumed["curve"] == whole["curve"]
    assert equal(collect_weights(model), collect_weights(undisturbed))


def test_flipped_bytes_anywhere(tmp_path):
    "Whatever file of the newest checkpoint is damaged, the one before it is taken."
    undisturbed, _ = learn(tmp_path / "a", replace(SETTINGS, steps=20))
    files = ["model.safetensors", "optimiser.safetensors", "chance.safetensors", "state.json"]
    for name in files:
        folder = tmp_path / name
        with pytest.raises(KeyboardInterrupt):
            learn(folder, replace(SETTINGS, steps=20), watch=stop_at_third)
        victim = folder / "step-00000010" / name
        data = bytearray(victim.read_bytes())
        data[random.Random(name).randrange(len(data))] ^= 16
        victim.write_bytes(data)
        with pytest.warns(UserWarning, match="step-00000010"):
            model, result = learn(folder, replace(SETTINGS, steps=20))
        assert result["resumed_from"] == 9
        assert equal(collect_weights(model), collect_weights(undisturbed))


def stop_at_third(model, calls=[]) -> dict:  # noqa: B006
    "Interrupt at every second look: at step 10."
    calls.append(1)
    if len(calls) % 2 == 0:
        raise KeyboardInterrupt
    return {}


def test_all_checkpoints_damaged_starts_anew(tmp_path):
    save_checkpoint(tmp_path, 5, {"model": {"w": torch.ones(3)}}, {})
    (tmp_path / "step-00000005" / "model.safetensors").write_bytes(b"short")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert load_checkpoint(tmp_path) is None


def test_finished_training_does_nothing(tmp_path):
    first, one = learn(tmp_path)
    second, two = learn(tmp_path)
    assert two["resumed_from"] == SETTINGS.steps and one["curve"] == two["curve"]
    assert equal(collect_weights(first), collect_weights(second))


def test_full_disk_keeps_what_was(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(3)}}, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ResourceError, match="disk is full"):
        save_checkpoint(tmp_path, 2, {"model": {"w": torch.zeros(3)}}, {})
    assert load_checkpoint(tmp_path)[1]["step"] == 1


def test_bad_loss_leaves_good_weights(tmp_path):
    class Bad(Autoregressive):
        def loss(self, model, part):
            spoilt = torch.equal(part["ids"], self.batch(7)["ids"])
            return super().loss(model, part) / (0.0 if spoilt else 1.0)

    torch.manual_seed(1)
    objective, model = Bad(tokens(), 16, 8), Decoder(SHAPE)
    with pytest.raises(InputError, match="step 7: loss inf"):
        train(model, objective, replace(SETTINGS, checkpoint_every=100), tmp_path)
    tensors, state = load_checkpoint(tmp_path)
    assert state["step"] == 7
    assert all(torch.isfinite(values).all() for values in tensors["model"].values())


def test_accumulation_equals_whole_batch(tmp_path):
    whole, _ = learn(tmp_path / "whole", replace(SETTINGS, steps=5))
    parts, _ = learn(tmp_path / "parts", replace(SETTINGS, steps=5, micro_batch=3))
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_give_the_same_curve(tmp_path, shard):
    settings = {"steps": 10, "checkpoint_every": 5, "shard": shard}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    pair = [
        start(tmp_path / "two", settings, RANK=str(i), LOCAL_RANK=str(i), **address) for i in (0, 1)
    ]
    outputs = [process.communicate(timeout=240)[0].decode() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs[0][-3000:]
    model, one = learn(tmp_path / "one", replace(SETTINGS, steps=10))
    two = json.loads(outputs[0].splitlines()[-1])
    assert [p["loss"] for p in two["curve"][1:]] == pytest.approx(
        [p["loss"] for p in one["curve"][1:]], abs=1e-4
    )
    saved = load_checkpoint(tmp_path / "two")[0]["model"]
    for name, weight in model.named_parameters():
        assert torch.allclose(saved[name], weight, atol=2e-3), name


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
    with pytest.raises(SettingsError, match="0 to 1"):
        plan_cost(SHAPE, 10, utilisation=2)


def test_more_devices_take_less_time_but_not_less_money():
    one, eight = plan_cost(SHAPE, 10**9), plan_cost(SHAPE, 10**9, count=8)
    assert math.isclose(one.hours, 8 * eight.hours) and math.isclose(one.dollars, eight.dollars)


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


def test_stage_writes_a_llama_that_transformers_opens(tmp_path):
    from transformers import AutoModelForCausalLM

    inputs, output = make_inputs(tmp_path), tmp_path / "model"
    output.mkdir()
    settings = PretrainSettings(
        depth=2, width=64, context=32, steps=30, points=3, samples=2, precision="float32"
    )
    numbers = pretrain(settings, inputs, output)
    json.dumps(numbers)
    curve = numbers["curve"]
    assert [point["step"] for point in curve] == [0, 10, 20, 30]
    assert numbers["bits_per_byte"] < 0.8 * curve[0]["bits_per_byte"]
    assert len(curve[-1]["samples"]) == 2 and not (output / "checkpoints").exists()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(output)(ids).logits
        assert torch.allclose(load_decoder(output)(ids), theirs, atol=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, numbers = learn(Path(sys.argv[1]), replace(SETTINGS, **json.loads(sys.argv[2])))
    print(json.dumps(numbers))
