"""Bytes counted by hand, exponents of exact laws, and layers that try to cheat."""

import math

import pytest
import torch
from torch import nn

from llmbook.attention import attend, naive_attention
from llmbook.core import InputError, set_seed
from llmbook.growth import (
    LiveBytes,
    Stateless,
    common_layers,
    compare_recall,
    exponents,
    fit_exponent,
    make_layer,
    measure_growth,
    measure_length,
    peak_bytes,
    state_bytes,
)
from llmbook.recurrence import AttentionLayer, Recurrent


class Mean(nn.Module):
    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class Gpt(nn.Module):
    "A layer as a user might bring it: torch's own, without state."

    def __init__(self, width):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x, nn.Transformer.generate_square_subsequent_mask(x.shape[1]), is_causal=True)


def test_live_bytes_by_hand():
    x = torch.ones(256)  # 1,024 bytes
    with LiveBytes() as live:
        a = x * 2
        b = a + a
        assert live.now == 2048
        a.add_(1)  # in place: nothing new
        assert live.now == 2048
        del a
        c = b.view(16, 16).mT
        assert live.now == 1024
        del b
        assert live.now == 1024, "a view keeps its store alive"
        del c
    assert (live.now, live.peak) == (0, 2048)


@pytest.mark.parametrize("build,least", [  # a fused kernel also needs room within itself, which is not seen
    (lambda: AttentionLayer(16, 2, naive_attention), 0.95), (lambda: AttentionLayer(16, 2), 0.4),
    (lambda: Recurrent("gru", 16), 0.4),
])
def test_peak_is_near_what_torchs_profiler_sees(build, least):
    from torch.profiler import ProfilerActivity, profile

    layer, x = build(), torch.randn(1, 400, 16)
    run = lambda: layer(x)[0].sum().backward()
    run()
    layer.zero_grad()
    ours = peak_bytes(run)
    layer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    now = top = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    assert least < ours / top < 1.05


def test_state_bytes():
    keys = torch.zeros(2, 3, 4)
    assert state_bytes((keys, keys[0], {"a": [keys.view(-1)]}, 7, None)) == 96
    assert state_bytes((keys, keys.clone())) == 192
    layer, x = AttentionLayer(8, 2), torch.randn(1, 10, 8)
    _, state = layer(x)
    assert state_bytes(state[:2]) >= 2 * 10 * 8 * 4


@pytest.mark.parametrize("name", ["sliding window", "linear", "gated state space", "LSTM", "compressive"])
def test_fixed_states_are_fixed(name):
    sizes = set()
    for t in (257, 513):
        layer = common_layers()[name](16, t)
        state = None
        with torch.no_grad():
            for piece in torch.randn(1, t, 16).split(64, 1):
                _, state = layer(piece, state)
        sizes.add(state_bytes(state))
    assert len(sizes) == 1, sizes


@pytest.mark.parametrize("p", [-1, 0, 0.5, 1, 2, 2.7])
def test_exponent_of_exact_laws(p):
    lengths = [3, 10, 77, 1000]
    assert math.isclose(fit_exponent(lengths, [0.3 * t**p for t in lengths]), p, abs_tol=1e-9)


def test_growth_of_bytes_is_what_theory_says():
    set_seed(0)
    layers = {name: common_layers(window=16)[name] for name in ("full, weights kept", "full, fused", "linear", "LSTM", "strided")}
    rows = measure_growth(layers | {"mine": Mean(), "torch's": lambda width, t: Gpt(width)}, [128, 256, 512, 1024], 16, rounds=1)
    assert len(rows) == 7 * 4
    power = exponents(rows)
    assert power["full, weights kept"]["peak [B]"] > 1.8 and power["full, weights kept"]["kept [B]"] > 1.8
    for name in ("full, fused", "linear", "LSTM", "mine"):
        assert power[name]["peak [B]"] < 1.3
    assert 1.1 < power["strided"]["kept [B]"] < 1.7
    assert math.isnan(power["mine"]["state [B]"]) and power["full, fused"]["state [B]"] > 0.9
    times = [row[key] for row in rows for key in ("read [µs/token]", "learn [µs/token]")]
    assert all(value > 0 for value in times)


def test_measuring_leaves_no_gradients_behind():
    layer = make_layer(lambda width, t: AttentionLayer(width, 2, attend), 16, 32)
    measure_length(layer, torch.randn(1, 32, 16))
    assert all(weight.grad is None for weight in layer.parameters())


def test_recall_is_compared_at_equal_size_and_repeats():
    layers = {"full, fused": common_layers()["full, fused"], "LSTM": common_layers()["LSTM"], "mean": lambda width, t: Mean()}
    found = [compare_recall(layers, [0, 2], [0, 9], pairs=2, parameters=4000, steps=12) for _ in range(2)]
    assert found[0] == found[1]
    assert all(abs(one["parameters"] / 4000 - 1) < 0.1 for one in found[0].values())
    for one in found[0].values():
        assert set(one["scores"]) == {0, 9} and all(0 <= share <= 1 for share in one["scores"].values())


def test_attention_recalls_and_the_mean_does_not():
    layers = {"full, fused": common_layers()["full, fused"], "mean": lambda width, t: Mean()}
    found = compare_recall(layers, range(9), [8, 40], pairs=3, steps=150)
    assert found["full, fused"]["scores"][40] > 0.9 > 0.6 > found["mean"]["scores"][40]


class Ahead(nn.Module):
    def forward(self, x):
        return x.flip(1)


@pytest.mark.parametrize("layer", [Ahead(), nn.Softmax(1), nn.Linear(16, 8), nn.LSTM(16, 8, batch_first=True)])
def test_cheats_and_misfits_are_refused(layer):
    with pytest.raises(InputError, match="Allowed"):
        make_layer(layer, 16, 32)


def test_torchs_modules_may_compete():
    assert make_layer(nn.GRU(16, 16, batch_first=True), 16, 32)(torch.randn(1, 5, 16))[0].shape == (1, 5, 16)
    assert isinstance(make_layer(Gpt(16), 16, 32), Stateless)
    with pytest.raises(InputError):
        make_layer(Gpt(16), 16, 32)(torch.randn(1, 5, 16), "a state")


@pytest.mark.parametrize("call", [
    lambda: measure_growth({}, [1, 2]), lambda: measure_growth({"m": Mean()}, [8]), lambda: measure_growth({"m": Mean()}, [8, 4]),
    lambda: fit_exponent([1, 1], [1, 1]), lambda: fit_exponent([1, 2], [0, 1]), lambda: fit_exponent([1, 2], [1]),
    lambda: compare_recall({"m": lambda width, t: Mean()}, [1], [1], pairs=9, steps=1),
])
def test_bad_input_is_refused_with_words(call):
    with pytest.raises(InputError, match="Allowed"):
        call()
