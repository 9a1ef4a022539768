"""Landscapes beyond their page: any model comes back bit for bit, whatever happens on the way."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmbook.core import InputError
from llmbook.landscapes import (
    force_field,
    loss_surface,
    move_weights,
    random_direction,
    restore_weights,
    scale_filters,
    sharpness,
    worst_direction,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(18, 4), nn.LayerNorm(4),
    )


DATA = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module) -> torch.Tensor:
    return model(DATA).square().mean() + model(DATA).logsumexp(1).mean()


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [x.clone() for x in model.state_dict().values()]


def unchanged(model: nn.Module, before: list[torch.Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(model.state_dict().values(), before, strict=True))


def test_nothing_is_left_behind():
    model = network()
    model[0].eval()  # a mixture of modes
    before, modes = bits(model), [module.training for module in model.modules()]
    for look in (lambda: loss_surface(model, loss, 3), lambda: sharpness(model, loss), lambda: worst_direction(model, loss)):
        look()
        assert unchanged(model, before) and [module.training for module in model.modules()] == modes
        assert all(weight.grad is None for weight in model.parameters())


def test_failures_and_interruptions_leave_nothing_behind():
    for error in (ValueError, KeyboardInterrupt):
        model, calls = network(), []

        def failing(model, calls=calls, error=error):
            calls.append(1)
            model[1].running_mean += 1
            if len(calls) == 4:
                raise error
            return loss(model)

        before = bits(model)
        with pytest.raises(error):
            loss_surface(model, failing, 3)
        assert unchanged(model, before) and model.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model = nn.Linear(4, 3).to(dtype)
    data = torch.randn(6, 4).to(dtype)
    before = bits(model)
    surface = loss_surface(model, lambda m: m(data).float().square().mean(), 5)
    assert unchanged(model, before) and surface.losses.isfinite().all()
    assert surface.centre == pytest.approx(model(data).float().square().mean().item(), rel=1e-6)


def test_a_tied_matrix_moves_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert len(random_direction(model)) == 1
    before = bits(model)
    loss_surface(model, lambda m: m(torch.ones(1, 4)).square().mean(), 3)
    assert unchanged(model, before) and model[1].weight is model[0].weight


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_scales_that_change_nothing_change_nothing_here(scale, seed):
    torch.manual_seed(seed)
    data = torch.randn(8, 4).double()
    one = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    other = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    other[0].weight.data, other[2].weight.data = scale * one[0].weight.data, one[2].weight.data / scale
    of = lambda model: model(data).square().mean()
    surfaces = [loss_surface(model, of, 3, seed=seed).losses for model in (one, other)]
    torch.testing.assert_close(*surfaces, rtol=1e-5, atol=1e-8)
    assert sharpness(other, of) == pytest.approx(sharpness(one, of), rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_sharpness_of_a_quadratic(seed):
    torch.manual_seed(seed)
    half = torch.randn(3, 3).double()
    matrix, model = half @ half.T, nn.Linear(3, 1, bias=False).double()
    of = lambda model: (model.weight @ matrix @ model.weight.T).sum() / 2
    place = model.weight.detach()[0]
    gradient = matrix @ place
    step = 0.05 * gradient / gradient.norm()
    expected = ((place + step) @ matrix @ (place + step) - place @ matrix @ place) / 2
    assert sharpness(model, of, adaptive=False) == pytest.approx(expected.item(), rel=1e-6)
    direction = worst_direction(model, of, adaptive=False)
    torch.testing.assert_close(direction[0][0], gradient / gradient.norm())


def test_flat_and_endless_places():
    model = nn.Linear(3, 1)
    flat = lambda model: model(torch.zeros(1, 3)).sum() * 0
    assert sharpness(model, flat) == 0
    surface = loss_surface(model, flat, 3)
    assert surface.losses.eq(0).all() and "<svg" in surface._repr_html_()
    wild = loss_surface(model, lambda m: m.weight.sum() / 0 * (m.weight.sum() > 0), 3)
    assert wild.losses.isinf().any() and not wild.losses.isnan().any()
    line = loss_surface(model, lambda m: m.weight.square().sum(), 5, directions=[random_direction(model)])
    assert line.losses.shape == (1, 5) and "<svg" in line._repr_html_()


def test_forces_are_minus_gradients():
    field = force_field(lambda p: p[:, 0].sin() * p[:, 1], (0, 1), (2, 3), 5)
    for i, y in enumerate(field.y.tolist()):
        for j, x in enumerate(field.x.tolist()):
            assert float(field.losses[i, j]) == pytest.approx(math.sin(x) * y, rel=1e-5, abs=1e-6)
            expected = torch.tensor([-math.cos(x) * y, -math.sin(x)])
            torch.testing.assert_close(field.forces[i, j], expected, atol=1e-5, rtol=1e-5)
    assert "<svg" in field._repr_html_() and "<svg" in force_field(lambda p: 0 * p[:, 0])._repr_html_()


def test_moving_and_restoring():
    model = nn.Linear(2, 2)
    before, step = bits(model), random_direction(model, 3)
    with restore_weights(model) as origin:
        move_weights(model, origin, [(0.5, step), (-0.5, step)])
        assert all(torch.allclose(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))
        move_weights(model, origin, [(1.0, step)])
        assert not unchanged(model, before) and not model.training
    assert unchanged(model, before) and model.training
    zero = nn.Linear(2, 2)
    nn.init.zeros_(zero.weight)
    assert not any(part.any() for part in random_direction(zero))


def test_wrong_input():
    model, of = nn.Linear(2, 2), lambda m: m.weight.sum()
    step = random_direction(model)
    for wrong in (
        lambda: loss_surface(model, of, 4), lambda: loss_surface(model, of, 1), lambda: loss_surface(model, of, radius=math.nan),
        lambda: loss_surface(model, of, radius=0.0), lambda: loss_surface(model, of, directions=[]),
        lambda: loss_surface(model, of, directions=[step] * 3), lambda: loss_surface(model, of, directions=[step[:1]]),
        lambda: loss_surface(model, lambda m: m.weight), lambda: loss_surface(model, lambda m: "high"),
        lambda: scale_filters([torch.zeros(3)], model), lambda: sharpness(model, of, -1.0),
        lambda: force_field(lambda p: p), lambda: force_field(lambda p: p[:, 0], (1.0, 0.0)),
        lambda: force_field(lambda p: p[:, 0], steps=1),
    ):
        with pytest.raises(InputError):
            wrong()
