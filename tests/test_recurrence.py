"""Rivals of attention: equal to torch's modules, state by state, and refusing what they cannot do."""

import pytest
import torch
from torch import nn

from llmbook.core import InputError, SettingsError, set_seed
from llmbook.recurrence import (
    AttentionLayer,
    GatedConvolution,
    LayeredModel,
    Recurrent,
    causal_convolution,
    count_sequential_steps,
    draw_recall,
    draw_windows,
    gradient_by_distance,
    held_out_loss,
    import_recurrent,
    match_width,
    receptive_field,
    train_briefly,
    train_recall,
)

MODULES = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_equal_to_torch_in_values_states_and_all_gradients(kind, bias, fused, seed):
    set_seed(seed)
    layers, d, width, t = 1 + seed, 5 + seed, 7, 9
    module = MODULES[kind](d, width, layers, bias=bias, batch_first=True)
    x, start = torch.randn(4, t, d, requires_grad=True), torch.randn(2, layers, 4, width)
    theirs, last = module(x, (start[0], start[1]) if kind == "lstm" else start[0])
    ours, y, ends = import_recurrent(module), x, []
    for i, layer in enumerate(ours):
        layer.fused = fused
        y, end = layer(y, tuple(part[i] for part in start[: layer.states]))
        ends.append(end)
    assert torch.allclose(y, theirs, atol=1e-5)
    for part, want in enumerate(last if kind == "lstm" else [last]):
        assert torch.allclose(torch.stack([end[part] for end in ends]), want, atol=1e-5)
    probe = torch.randn_like(y)
    names = [("given", "ih"), ("again", "hh")]
    kinds = ("weight", "bias")[: 1 + bias]
    mine = [getattr(getattr(layer, a), what) for layer in ours for a, _ in names for what in kinds]
    other = [getattr(module, f"{what}_{b}_l{i}") for i in range(layers) for _, b in names for what in kinds]
    found = torch.autograd.grad((y * probe).sum(), [x, *mine])
    wanted = torch.autograd.grad((theirs * probe).sum(), [x, *other])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, wanted, strict=True))


def test_imported_weights_are_a_copy():
    module = nn.GRU(3, 3)
    layer = import_recurrent(module)[0]
    layer.given.weight.data.zero_()
    assert module.weight_ih_l0.abs().sum() > 0


@pytest.mark.parametrize("module", [
    nn.LSTM(4, 4, bidirectional=True), nn.LSTM(4, 4, proj_size=2), nn.RNN(4, 4, nonlinearity="relu"), nn.Linear(4, 4),
    nn.GRU(4, 4, 2, dropout=0.5),
])
def test_other_modules_are_refused(module):
    with pytest.raises(InputError):
        import_recurrent(module)


@pytest.mark.parametrize("taps,dilation", [(1, 1), (2, 3), (4, 1), (3, 9)])
def test_convolution_equals_torch_and_never_looks_ahead(taps, dilation):
    set_seed(taps)
    conv = nn.Conv1d(6, 5, taps, dilation=dilation, padding=dilation * (taps - 1))
    x = torch.randn(2, 17, 6, requires_grad=True)
    ours, theirs = causal_convolution(x, conv.weight, conv.bias, dilation), conv(x.mT).mT[:, :17]
    assert torch.allclose(ours, theirs, atol=1e-5)
    probe = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * probe).sum(), [x, conv.weight, conv.bias]) for y in (ours, theirs)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


LAYERS = [
    lambda: Recurrent("rnn", 8), lambda: Recurrent("lstm", 8, fused=False), lambda: Recurrent("gru", 8),
    lambda: GatedConvolution(8, 4, 3), lambda: GatedConvolution(8, 1), lambda: AttentionLayer(8, 2),
]


@pytest.mark.parametrize("build", LAYERS)
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 7], [1, 11], [11, 1]])
def test_pieces_equal_the_whole(build, cuts):
    set_seed(0)
    layer, x, state, parts = build(), torch.randn(2, 12, 8), None, []
    for piece in x.split(cuts, 1):
        y, state = layer(piece, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), layer(x)[0], atol=1e-5)


@pytest.mark.parametrize("build", LAYERS)
def test_a_layer_never_looks_ahead(build):
    set_seed(0)
    layer, x = build(), torch.randn(1, 12, 8)
    other = x.clone()
    other[:, 7:] += 1
    assert torch.allclose(layer(x)[0][:, :7], layer(other)[0][:, :7], atol=1e-6)


@pytest.mark.parametrize("taps,dilations", [([2, 2, 2], [1, 2, 4]), ([3, 1, 5], [2, 7, 1])])
def test_receptive_field_is_what_gradients_reach(taps, dilations):
    x = y = torch.randn(1, 60, 4, requires_grad=True)
    for k, dilation in zip(taps, dilations, strict=True):
        y, _ = GatedConvolution(4, k, dilation)(y)
    y[0, -1].sum().backward()
    assert int((x.grad[0].abs().sum(-1) > 0).sum()) == receptive_field(taps, dilations)


def test_gradient_by_distance_equals_autograd_through_the_kernel():
    set_seed(0)
    layer, x = Recurrent("rnn", 6), torch.randn(3, 15, 6)
    lengths = gradient_by_distance(layer, x, seed=4)
    state = layer(x[:, :10])[1][0].detach().requires_grad_()  # the state five tokens before the last
    last = layer(x[:, 10:], (state,))[0][:, -1]
    probe = torch.randn(last.shape, generator=torch.Generator().manual_seed(4))
    (last * probe).sum().backward()
    assert torch.allclose(lengths[5], state.grad.norm(), atol=1e-5)


def test_sequential_steps_follow_the_text_only_in_a_loop():
    steps = lambda layer, t: count_sequential_steps(layer(torch.randn(1, t, 8))[0])
    assert steps(Recurrent("gru", 8, fused=False), 40) - steps(Recurrent("gru", 8, fused=False), 20) >= 20
    assert steps(AttentionLayer(8, 2), 40) == steps(AttentionLayer(8, 2), 20)
    with torch.no_grad(), pytest.raises(InputError):
        steps(AttentionLayer(8, 2), 4)


def test_recall_texts_hold_the_answer():
    ids, targets = draw_recall(7, 3, 50, 5, torch.Generator().manual_seed(0))
    assert ids.shape == (50, 19) and int((targets >= 0).sum()) == 150
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        told = dict(zip(row[0:6:2], row[1:6:2], strict=True))
        assert len(told) == 3 and all(10 <= noise < 15 for noise in row[6:13])
        assert [wanted[i] for i in (13, 15, 17)] == [told[row[i]] for i in (13, 15, 17)]


def test_same_seed_same_weights():
    runs = []
    for _ in range(2):
        set_seed(2)
        model = LayeredModel(24, 8, [Recurrent("lstm", 8)])
        runs.append(train_recall(model, [2, 5], 6))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("call", [
    lambda: Recurrent("lstm", 4)(torch.zeros(2, 4)), lambda: Recurrent("lstm", 4)(torch.zeros(2, 3, 5)),
    lambda: Recurrent("lstm", 4)(torch.zeros(2, 0, 4)), lambda: LayeredModel(5, 4, [])(torch.tensor([[5]])),
    lambda: draw_recall(3, 9), lambda: draw_recall(-1), lambda: next(iter(draw_windows(torch.arange(5), 10))),
    lambda: next(iter(draw_windows(torch.rand(500), 10))), lambda: held_out_loss(nn.Identity(), torch.arange(5), 10),
    lambda: match_width(lambda d: nn.Linear(d, d), 10), lambda: GatedConvolution(4)(torch.zeros(4)),
])
def test_bad_input_is_refused_with_words(call):
    with pytest.raises(InputError, match="Allowed"):
        call()


def test_bad_shapes_are_refused_with_words():
    with pytest.raises(SettingsError, match="rnn, lstm, gru"):
        Recurrent("elman", 4)
    with pytest.raises(SettingsError):
        GatedConvolution(4, 0)


def test_a_loss_that_is_no_number_stops_the_training():
    model = LayeredModel(24, 8, [Recurrent("rnn", 8)])
    nn.init.constant_(model.embedding.weight, float("nan"))
    with pytest.raises(InputError, match="step 1"):
        train_briefly(model, [draw_recall(2)] * 3, 3)
