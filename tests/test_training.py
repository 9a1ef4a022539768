"""Faults of the training loop: kills, flipped bytes, full disks, bad losses, signals, several processes."""

import json
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

import accelerate  # noqa: F401  (loaded before the processes fork)
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.core import InputError, ResourceError, SettingsError
from llmbook.objectives import Autoregressive
from llmbook.optimisation import Muon, TrainSettings, build_optimisers, keep_memory, orthogonalise
from llmbook.training import collect_weights, load_checkpoint, save_checkpoint
from llmbook.training import spark_line, train

SHAPE = DecoderSettings(64, 2, 32, 2, 2, 48, 16)
SETTINGS = TrainSettings(steps=40, precision="float32", device="cpu", checkpoint_every=1)
MUON, ADAMW = replace(SETTINGS, steps=60), replace(SETTINGS, steps=60, optimiser="adamw")
SHORT = replace(SETTINGS, steps=20)


def tokens() -> np.ndarray:
    "A stream with something to learn: each token follows from the one before."
    chance = np.random.default_rng(0)
    return (np.cumsum(chance.integers(1, 4, 4000)) % 64).astype(np.uint16)


class Noisy(nn.Module):
    "A model that draws and that counts: dropout, and a running statistic that is not a weight."

    def __init__(self):
        super().__init__()
        self.decoder, self.dropout = Decoder(SHAPE), nn.Dropout(0.1)
        self.register_buffer("scale", torch.zeros(32))

    def states(self, ids: Tensor) -> Tensor:
        "States with noise in training, divided by their running size."
        states = self.dropout(self.decoder.states(ids))
        if self.training:
            self.scale.lerp_(states.detach().abs().mean((0, 1)), 0.1)
        return states / (1 + self.scale)

    @property
    def output_weight(self) -> Tensor:
        "Of the decoder."
        return self.decoder.output_weight


def learn(folder: Path, settings: TrainSettings = SETTINGS, kind=Decoder, **options):
    "Train a tiny model in a folder."
    torch.manual_seed(1)
    model = kind(SHAPE) if kind is Decoder else kind()
    objective = options.pop("objective", None) or Autoregressive(tokens(), context=16, rows=8)
    return model, train(model, objective, settings, folder, watch_every=10, **options)


def equal(one: nn.Module, other: nn.Module) -> bool:
    "Whether two models have the same bits."
    one, other = collect_weights(one), collect_weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def start(folder: Path, settings: dict, **environment: str) -> subprocess.Popen:
    "Train in a process that knows nothing of this one, by this file."
    command = [sys.executable, __file__, str(folder), json.dumps(settings)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def fork(action) -> int:
    "Run an action in a copy of this process; the number of the process."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's threads are not running: one is set
        number = os.fork()
    if number == 0:
        try:
            action()
        finally:
            os._exit(0)
    return number


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(("settings", "kind"), [(MUON, Decoder), (ADAMW, Noisy)])
def test_twenty_kills_at_random_moments(tmp_path, settings, kind):
    settings = replace(settings, steps=200, checkpoint_every=2)
    began = time.perf_counter()
    undisturbed, whole = learn(tmp_path / "undisturbed", settings, kind)
    stretch, resumed = (time.perf_counter() - began) / 50, []  # four steps
    seed = random.SystemRandom().randrange(10**6)
    print("seed of the kills:", seed)
    chance, killed, writing, folder = random.Random(seed), 0, 0, tmp_path / "0"
    while killed < 20:
        before = {path.name for path in folder.glob("step-*")}
        process = fork(lambda folder=folder: learn(folder, settings, kind))
        if killed % 4:  # three of four come beyond a new checkpoint, the others die anywhere
            while {path.name for path in folder.glob("step-*")} == before:
                assert time.perf_counter() - began < 300
                time.sleep(0.0005)
        time.sleep(chance.random() * stretch)
        os.kill(process, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(process, 0)[1])
        writing += any(folder.glob(".step-*.partial"))
        if (folder / f"step-{settings.steps:08d}").exists() or killed == 20:
            model, result = learn(folder, settings, kind)
            assert result["curve"] == whole["curve"] and equal(model, undisturbed)
            assert not any(folder.glob(".step-*"))
            resumed, folder = [*resumed, result["resumed_from"]], tmp_path / str(killed)
    print(f"{killed} kills, {writing} of them while a checkpoint was written; went on from {resumed}")
    assert max(resumed) > 0


def test_killed_at_each_moment_of_writing(tmp_path):
    "Before and after every rename, flush and removal of a save."
    undisturbed, whole = learn(tmp_path / "undisturbed", SHORT)
    moments = 0
    for moment in range(0, 120, 2):
        folder, calls = tmp_path / str(moment), [0]

        def die_in_time(real, calls=calls, moment=moment):
            def wrapped(*arguments, **options):
                calls[0] += 1
                if calls[0] == moment + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return wrapped

        def action(folder=folder):
            for module, name in ((os, "fsync"), (os, "replace"), (os, "rmdir"), (os, "unlink"), (os, "mkdir")):
                setattr(module, name, die_in_time(getattr(module, name)))
            learn(folder, replace(SHORT, checkpoint_every=7, keep=1))

        _, status = os.waitpid(fork(action), 0)
        if not os.WIFSIGNALED(status):
            break
        moments += 1
        if moment % 6 == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a half removed old checkpoint is told of
                model, result = learn(folder, SHORT)
            assert result["curve"] == whole["curve"] and equal(model, undisturbed), moment
    print(moments, "moments")
    assert moments > 12


def test_goes_on_in_another_process(tmp_path):
    "Nothing of the first process is needed: not its hash seed, not its modules."
    undisturbed, whole = learn(tmp_path / "undisturbed", MUON)
    process = start(tmp_path / "killed", {"steps": 60})
    patience = time.time() + 120
    while not (tmp_path / "killed" / "step-00000023").exists():
        assert time.time() < patience and process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.001)
    process.kill()
    process.communicate()
    model, resumed = learn(tmp_path / "killed", MUON)
    assert resumed["resumed_from"] >= 23
    assert resumed["curve"] == whole["curve"] and equal(model, undisturbed)


def interrupt_at(step: int):
    "A watcher that stops the training as an accident would, without any save."

    def watch(model: nn.Module, calls=[]) -> dict:  # noqa: B006
        calls.append(1)
        if len(calls) == step // 10 + 1:
            raise RuntimeError("the plug")
        return {}

    return watch


FILES = ("learner.safetensors", "optimiser.safetensors", "chance.safetensors", "state.json", "checksums.json")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_files_are_refused(tmp_path, damage):
    "Whatever file of the newest checkpoint is damaged, the one before it is taken."
    undisturbed, whole = learn(tmp_path / "undisturbed", SHORT)
    chance = random.Random(damage)
    with pytest.raises(RuntimeError, match="plug"):
        learn(tmp_path / "one", SHORT, watch=interrupt_at(10))
    names = sorted(path.name for path in (tmp_path / "one" / "step-00000010").iterdir())
    assert set(FILES[:4]) < set(names) and len(names) == 5
    for name in names:
        folder = tmp_path / name
        with pytest.raises(RuntimeError, match="plug"):
            learn(folder, SHORT, watch=interrupt_at(10))
        victim = folder / "step-00000010" / name
        data = bytearray(victim.read_bytes())
        if damage == "flip":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        victim.write_bytes(data[: chance.randrange(len(data))] if damage == "truncate" else data)
        if damage == "remove":
            victim.unlink()
        with pytest.warns(UserWarning, match="step-00000010"):
            model, result = learn(folder, SHORT)
        assert result["resumed_from"] == 9 and result["curve"] == whole["curve"], name
        assert equal(model, undisturbed), name


def test_all_checkpoints_damaged_starts_anew(tmp_path):
    save_checkpoint(tmp_path, 5, {"learner": {"w": torch.ones(3)}}, {})
    (tmp_path / "step-00000005" / "learner.safetensors").write_bytes(b"short")
    with pytest.warns(UserWarning, match="step-00000005"):
        assert load_checkpoint(tmp_path) is None


def test_finished_training_does_nothing(tmp_path):
    first, one = learn(tmp_path)
    second, two = learn(tmp_path)
    assert two["resumed_from"] == SETTINGS.steps and one["curve"] == two["curve"]
    assert equal(first, second)


@pytest.mark.parametrize("file", [*FILES[:4], "seal"])
def test_full_disk_keeps_what_was(tmp_path, monkeypatch, file):
    "The disk fills up in the middle of the save of step 12, at any of its files."
    import safetensors.torch

    import llmbook.training

    undisturbed, whole = learn(tmp_path / "undisturbed", SHORT)
    folder, real = tmp_path / "full", safetensors.torch.save_file

    def save_file(tensors, path):
        if "step-00000012" in str(path) and Path(path).name == file:
            Path(path).write_bytes(b"the first part")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    def spoil(function):
        def wrapped(path, *rest):
            if "step-00000012" in str(path):
                raise OSError(28, "No space left on device")
            return function(path, *rest)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", save_file)
        if file in ("state.json", "seal"):
            name = "write_json" if file == "state.json" else "seal"
            patch.setattr(llmbook.training, name, spoil(getattr(llmbook.training, name)))
        with pytest.raises(ResourceError, match="disk is full"):
            learn(folder, SHORT)
    assert load_checkpoint(folder)[1]["step"] == 11 and not any(folder.glob(".step-*"))
    model, result = learn(folder, SHORT)
    assert result["curve"] == whole["curve"] and equal(model, undisturbed)


def test_a_disk_that_is_really_full(tmp_path):
    "On a small disk in memory, where the system allows to make one."
    script = f"""
mount -t tmpfs -o size=300k none {tmp_path} || exit 77
exec {sys.executable} {__file__} {tmp_path}/run '{json.dumps({"steps": 20, "keep": 9})}'
"""
    process = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if process.returncode == 77 or "unshare" in process.stderr[:20]:
        pytest.skip("no right to mount a disk in memory here")
    assert process.returncode == 1 and "disk is full" in process.stderr, process.stderr[-2000:]


class Bad(Autoregressive):
    "At step 7 the loss, or only the gradient, is not a number; `cured` says whether it still is."

    def __init__(self, kind: str, cured: bool = False):
        super().__init__(tokens(), 16, 8)
        self.kind, self.cured, self.seventh = kind, cured, self.batch(7)["ids"]

    def loss(self, model: nn.Module, part: dict[str, Tensor]) -> Tensor:
        "Spoilt at step 7."
        loss = super().loss(model, part)
        if self.cured or not torch.equal(part["ids"], self.seventh):
            return loss
        if self.kind == "gradient":  # the root of zero is zero, its slope is not a number
            return loss + (model.output_weight[0, 0] * 0).sqrt() * 0
        return loss / 0.0 if self.kind == "inf" else loss * float("nan")


@pytest.mark.parametrize("kind", ["inf", "nan", "gradient"])
def test_bad_step_leaves_good_weights(tmp_path, kind):
    "The training stops; when the fault is gone it goes on as if nothing had happened."
    settings = replace(SHORT, checkpoint_every=100)
    undisturbed, whole = learn(tmp_path / "whole", settings, Noisy, objective=Bad(kind, cured=True))
    said = "gradient norm nan" if kind == "gradient" else f"step 7: loss {kind}"
    with pytest.raises(InputError, match=said):
        learn(tmp_path / "bad", settings, Noisy, objective=Bad(kind))
    tensors, state = load_checkpoint(tmp_path / "bad")
    assert state["step"] == 7
    assert all(torch.isfinite(values).all() for values in tensors["learner"].values())
    model, result = learn(tmp_path / "bad", settings, Noisy, objective=Bad(kind, cured=True))
    assert result["resumed_from"] == 7
    assert result["curve"] == whole["curve"] and equal(model, undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_signals_save_and_say_how_to_go_on(tmp_path, number, code):
    undisturbed, whole = learn(tmp_path / "undisturbed", replace(SETTINGS, checkpoint_every=10**6))
    process = start(tmp_path / "run", {"checkpoint_every": 10**6, "signal_at": 17, "signal": number})
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode in (code, -number), output[-3000:]
    assert "stopped, saved in" in output and "goes on from there" in output
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000018"]
    model, result = learn(tmp_path / "run", replace(SETTINGS, checkpoint_every=10**6))
    assert result["resumed_from"] == 18
    assert result["curve"] == whole["curve"] and equal(model, undisturbed)


def signal_at(step: int, number: int):
    "An objective whose batch comes with a signal."

    class Signalled(Autoregressive):
        def batch(self, at: int) -> dict[str, Tensor]:
            if at == step:
                os.kill(os.getpid(), number)
            return super().batch(at)

    Signalled.__name__ = "Autoregressive"
    return Signalled(tokens(), 16, 8)


def test_the_model_that_was_stopped_goes_on(tmp_path):
    "In a notebook the same model is trained again after Ctrl-C; another one is refused."
    undisturbed, whole = learn(tmp_path / "undisturbed", SHORT)
    torch.manual_seed(1)
    model, settings = Decoder(SHAPE), replace(SHORT, checkpoint_every=100)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt, match="goes on from there"):
            train(model, signal_at(5, signal.SIGINT), settings, tmp_path / "run", watch_every=10)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    objective = Autoregressive(tokens(), 16, 8)
    with pytest.raises(SettingsError, match="another training"):
        train(Decoder(SHAPE), objective, settings, tmp_path / "run", watch_every=10)
    result = train(model, objective, settings, tmp_path / "run", watch_every=10)
    assert result["resumed_from"] == 6
    assert result["curve"] == whole["curve"] and equal(model, undisturbed)


def test_other_settings_are_refused_where_they_matter(tmp_path):
    with pytest.raises(RuntimeError, match="plug"):
        learn(tmp_path, SHORT, watch=interrupt_at(10))
    for change in ({"steps": 30}, {"seed": 1}, {"matrix_rate": 0.02}, {"clip": 0.5}):
        with pytest.raises(SettingsError, match="another training"):
            learn(tmp_path, replace(SHORT, **change))
    with pytest.raises(SettingsError, match="another training"):
        learn(tmp_path, SHORT, objective=Autoregressive(tokens(), 16, 4))
    _, result = learn(tmp_path, replace(SHORT, micro_batch=2, checkpoint_every=3, shard=True))
    assert result["resumed_from"] == 10 and result["steps"] == 20


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_accumulation_equals_whole_batch(tmp_path, optimiser):
    settings = replace(SETTINGS, steps=8, optimiser=optimiser)
    whole, one = learn(tmp_path / "whole", settings)
    parts, other = learn(tmp_path / "parts", replace(settings, micro_batch=3))
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)
    for weight, same in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(weight, same, atol=1e-4)


def losses(result: dict) -> list[float]:
    "Of all points of a curve."
    return [point["loss"] for point in result["curve"] if "loss" in point]


class Tempered(nn.Module):
    "An objective with a weight of its own."

    def __init__(self):
        super().__init__()
        self.inner, self.sharpness = Autoregressive(tokens(), 16, 8), nn.Parameter(torch.zeros(()))
        self.batch, self.count = self.inner.batch, self.inner.count

    def loss(self, model: nn.Module, part: dict[str, Tensor]) -> Tensor:
        "Cross-entropy of logits times a learnt factor."
        logits = model(part["ids"]) * self.sharpness.exp()
        return nn.functional.cross_entropy(logits.flatten(0, 1), part["labels"].flatten())


def test_weights_of_an_objective_are_trained_and_saved(tmp_path):
    whole = Tempered()
    undisturbed, _ = learn(tmp_path / "whole", SHORT, objective=whole)
    assert whole.sharpness.abs() > 1e-2
    with pytest.raises(RuntimeError, match="plug"):
        learn(tmp_path / "run", SHORT, objective=Tempered(), watch=interrupt_at(10))
    again = Tempered()
    model, result = learn(tmp_path / "run", SHORT, objective=again)
    assert result["resumed_from"] == 10 and torch.equal(again.sharpness, whole.sharpness)
    assert equal(model, undisturbed)


def test_every_weight_of_the_model_moves(tmp_path):
    torch.manual_seed(1)
    before = {name: p.clone() for name, p in Decoder(SHAPE).named_parameters()}
    model, _ = learn(tmp_path, replace(SETTINGS, steps=3))
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("shard", "optimiser"), [(False, "muon"), (False, "adamw"), (True, "muon"), (True, "adamw")])
def test_two_processes_equal_one(tmp_path, shard, optimiser):
    "Also sharded; and what two have saved, one loads and goes on with."
    settings = {"steps": 10, "checkpoint_every": 5, "shard": shard, "optimiser": optimiser}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    pair = [
        start(tmp_path / "two", settings, RANK=str(i), LOCAL_RANK=str(i), **address) for i in (0, 1)
    ]
    outputs = [process.communicate(timeout=240)[0].decode() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs[0][-3000:]
    model, one = learn(tmp_path / "one", replace(SETTINGS, **settings))
    two = json.loads(outputs[0].splitlines()[-1])
    print("largest difference", max(abs(a - b) for a, b in zip(losses(one), losses(two), strict=True)))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert two["step_losses"] == pytest.approx(step_losses(tmp_path / "one"), abs=1e-5)
    saved = load_checkpoint(tmp_path / "two")[0]["learner"]
    for name, weight in model.named_parameters():
        assert torch.allclose(saved[f"model.{name}"], weight, atol=1e-4), name
    (tmp_path / "two" / "step-00000010" / "state.json").write_text("{")  # back to step 5, in one process
    with pytest.warns(UserWarning, match="step-00000010"):
        again, result = learn(tmp_path / "two", replace(SETTINGS, **settings))
    assert result["resumed_from"] == 5 and losses(result) == pytest.approx(losses(one), abs=1e-5)
    for weight, same in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.allclose(weight, same, atol=1e-4)


def step_losses(folder: Path) -> list[float]:
    "Losses since the last point, from the checkpoint in the middle."
    return json.loads((folder / "step-00000005" / "state.json").read_text())["journal"]["losses"]


def test_compiled_loop_learns_the_same(tmp_path):
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception as error:  # no compiler on this machine
        pytest.skip(f"torch.compile does not work here: {type(error).__name__}")
    settings = replace(SETTINGS, steps=3, checkpoint_every=100)
    plain, one = learn(tmp_path / "plain", settings)
    compiled, other = learn(tmp_path / "compiled", replace(settings, compile=True))
    assert losses(one) == pytest.approx(losses(other), abs=1e-4)
    for weight, same in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(weight, same, atol=2e-3)


def test_equal_matrices_move_together_as_alone():
    torch.manual_seed(0)
    shapes = [(48, 32)] * 3 + [(32, 48)] * 2 + [(32, 32)] * 4 + [(96, 32)]
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2e-3)):
        weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        alone = [nn.Parameter(weight.detach().clone()) for weight in weights]
        many, single = Muon(weights, dtype=dtype), [Muon([weight], dtype=dtype) for weight in alone]
        for _ in range(3):
            for weight, same in zip(weights, alone, strict=True):
                weight.grad = torch.randn(weight.shape)
                same.grad = weight.grad.clone()
            many.step()
            for one in single:
                one.step()
        for weight, same in zip(weights, alone, strict=True):
            assert torch.allclose(weight, same, atol=near)


@pytest.mark.parametrize("shape", [(64, 64), (64, 160), (160, 64), (3, 64, 200), (1, 7), (7, 1)])
@pytest.mark.parametrize("spread", [0.0, 2.0, 6.0])
def test_orthogonal_matrices_for_any_spectrum(shape, spread):
    "Equal to the polynomial applied to the singular values, from even to nearly singular matrices."
    torch.manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -spread, values.shape[-1]).expand_as(values)
    mapped = (values / values.norm(dim=-1, keepdim=True)).double()
    for _ in range(5):
        mapped = 3.4445 * mapped - 4.775 * mapped**3 + 2.0315 * mapped**5
    wanted = left @ torch.diag_embed(mapped.float()) @ right
    got = orthogonalise(left @ torch.diag_embed(values) @ right)
    assert torch.allclose(got, wanted, atol=5e-3), (got - wanted).abs().max()
    assert torch.isfinite(orthogonalise(torch.zeros(shape))).all()


def test_optimisers_share_out_all_weights_once():
    model = Decoder(replace(SHAPE, tied=False, key_value_heads=1))
    for optimiser in ("muon", "adamw"):
        built = build_optimisers(model, TrainSettings(optimiser=optimiser))
        weights = [p for one in built for group in one.param_groups for p in group["params"]]
        assert len(weights) == len(set(weights)) == len(list(model.parameters()))


def test_curves_of_any_length():
    assert spark_line([]) == "" and len(spark_line([1.0])) == 1
    assert spark_line([3.0, 2.0, 1.0]) == "█▅▁" or spark_line([3.0, 2.0, 1.0])[::2] == "█▁"


def test_workers_change_nothing(tmp_path):
    "Not the weights, not after a kill, and not with another number of workers after it."
    undisturbed, whole = learn(tmp_path / "whole", SHORT, Noisy)
    with pytest.raises(RuntimeError, match="plug"):
        learn(tmp_path / "run", replace(SHORT, workers=2), Noisy, watch=interrupt_at(10))
    model, result = learn(tmp_path / "run", replace(SHORT, workers=1), Noisy)
    assert result["resumed_from"] == 10
    assert result["curve"] == whole["curve"] and equal(model, undisturbed)


def test_memory_can_be_given_back(monkeypatch):
    monkeypatch.setenv("LLMBOOK_KEEP_MEMORY", "off")
    assert not keep_memory()


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(sys.argv[2])
    at, number = options.pop("signal_at", None), options.pop("signal", 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background hands down "ignore"
    objective = None if at is None else signal_at(at, number)
    _, numbers = learn(Path(sys.argv[1]), replace(SETTINGS, **options), objective=objective)
    if os.environ.get("RANK", "0") == "0" and (Path(sys.argv[1]) / "step-00000005").exists():
        numbers["step_losses"] = step_losses(Path(sys.argv[1]))
    print(json.dumps(numbers))
