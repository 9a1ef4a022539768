"""Losses beyond their page: any shape, half precision, extremes, wrong input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.core import InputError
from llmbook.losses import (
    bits_per_byte,
    causal_cross_entropy,
    choose_chunk,
    chunked_loss,
    denoising_cross_entropy,
    diffusion_cross_entropy,
    diffusion_weights,
    masked_cross_entropy,
    perplexity_of,
    shift_right,
    token_losses,
    weighted_cross_entropy,
)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40), v=st.integers(2, 70), chunk=st.none() | st.integers(1, 50), seed=st.integers(0, 2**16),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]), z_loss=st.sampled_from([0.0, 0.01]), masked=st.booleans(),
)
def test_chunked_equals_torch(n, v, chunk, seed, smoothing, z_loss, masked):
    torch.manual_seed(seed)
    states, weight = torch.randn(n, 8, requires_grad=True), torch.randn(v, 8, requires_grad=True)
    labels = torch.randint(0, v, (n,))
    if masked:
        labels[1:] = labels[1:].where(torch.rand(n - 1) < 0.5, -100)
    logits = states @ weight.T
    one = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    one = one + z_loss * logits.logsumexp(-1)[labels != -100].square().mean()
    two = causal_cross_entropy(states, weight, labels, chunk, smoothing=smoothing, z_loss=z_loss)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(loss * 0.7, (states, weight)) for loss in (one, two)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_wanted_gradient(frozen):
    inputs = [torch.randn(6, 4, requires_grad=frozen != 0), torch.randn(9, 4, requires_grad=frozen != 1)]
    labels = torch.randint(0, 9, (6,))
    causal_cross_entropy(*inputs, labels).backward()
    trained = inputs[1 - frozen]
    expected = torch.autograd.grad(F.cross_entropy(inputs[0] @ inputs[1].T, labels), trained)[0]
    torch.testing.assert_close(trained.grad, expected)
    assert inputs[frozen].grad is None


def test_without_gradients_and_of_batches():
    states, weight, labels = torch.randn(2, 5, 4), torch.randn(9, 4, requires_grad=True), torch.randint(0, 9, (2, 5))
    with torch.no_grad():
        loss = causal_cross_entropy(states, weight, labels)
    assert not loss.requires_grad
    expected = F.cross_entropy((states @ weight.T).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(loss, token_losses(states @ weight.T, labels).mean().detach())


def test_a_tied_matrix_gathers_both_gradients():
    weight, ids = torch.randn(9, 4, requires_grad=True), torch.randint(0, 9, (12,))
    for loss in (
        lambda: causal_cross_entropy(weight[ids[:-1]].tanh(), weight, ids[1:], chunk=3),
        lambda: F.cross_entropy(weight[ids[:-1]].tanh() @ weight.T, ids[1:]),
    ):
        weight.grad, before = None, weight.grad
        loss().backward()
    torch.testing.assert_close(weight.grad, before)


def test_huge_logits_stay_finite():
    states = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    weight = torch.eye(2).requires_grad_()
    loss = causal_cross_entropy(states, weight, torch.tensor([0, 0]))
    loss.backward()
    torch.testing.assert_close(loss.item(), 5000.0)
    assert states.grad.isfinite().all() and weight.grad.isfinite().all()


def test_autocast():
    states, weight = torch.randn(64, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (64,))
    exact = torch.autograd.grad(causal_cross_entropy(states, weight, labels), (states, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = causal_cross_entropy(states, weight, labels, chunk=16)
    rough = torch.autograd.grad(loss, (states, weight))
    assert loss.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in rough)
    torch.testing.assert_close(rough, exact, atol=2e-3, rtol=5e-2)


@pytest.mark.parametrize("n", [0, 3])
def test_no_label_gives_zero(n):
    states, weight = torch.randn(n, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = causal_cross_entropy(states, weight, torch.full((n,), -100), smoothing=0.1, z_loss=0.1)
    loss.backward()
    assert loss.item() == 0 and not states.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("v", [256, 4096, 16384, 131072])
def test_chunks_are_flat_in_the_vocabulary(v):
    assert choose_chunk(v) * v <= 2**23


def test_wrong_input():
    states, weight = torch.randn(3, 4), torch.randn(9, 4)
    for labels in ([0, 1, 9], [0, -1, 2], [0, 1], [[0, 1, 2]]):
        with pytest.raises(InputError):
            causal_cross_entropy(states, weight, torch.tensor(labels))
    with pytest.raises(InputError, match="width of the output matrix"):
        causal_cross_entropy(states, torch.randn(9, 5), torch.tensor([0, 1, 2]))
    for conversion in (bits_per_byte, perplexity_of):
        with pytest.raises(InputError):
            conversion(1.0, 0)


def test_other_ignore_index():
    states, weight = torch.randn(4, 4), torch.randn(9, 4)
    labels = torch.tensor([1, 0, 2, 0])
    expected = F.cross_entropy(states @ weight.T, labels, ignore_index=0)
    torch.testing.assert_close(causal_cross_entropy(states, weight, labels, ignore_index=0), expected)


def test_conversions():
    assert bits_per_byte(800 * math.log(2), 100) == pytest.approx(8.0)
    assert perplexity_of(300.0, 100) == pytest.approx(math.e**3)
    assert math.isfinite(perplexity_of(1e9, 1))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 30), v=st.sampled_from([2, 5, 60, 1500]), chunk=st.none() | st.integers(1, 40),
    seed=st.integers(0, 2**16), smoothing=st.sampled_from([0.0, 0.3]), z_loss=st.sampled_from([0.0, 0.01]),
    bias=st.booleans(), size=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_weights_equal_torch(n, v, chunk, seed, smoothing, z_loss, bias, size):
    torch.manual_seed(seed)
    known = [torch.randn(n, 8, requires_grad=True), torch.randn(v, 8, requires_grad=True)]
    known += [torch.randn(v, requires_grad=True)] if bias else []
    labels = torch.randint(0, v, (n,)).where(torch.rand(n) < 0.8, -100)
    weights = size * torch.randn(n) * (torch.rand(n) < 0.8)
    logits = F.linear(*known)
    losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    penalty = z_loss * logits.logsumexp(-1).square() * (labels != -100)
    one = (weights * (losses + penalty)).sum()
    two = weighted_cross_entropy(*known[:2], labels, weights, chunk, -100, smoothing, z_loss, *known[2:])
    torch.testing.assert_close(one, two, atol=1e-5 * size, rtol=1e-4)
    grads = [torch.autograd.grad(loss, known) for loss in (one, two)]
    torch.testing.assert_close(*grads, atol=1e-5 * size, rtol=1e-4)


@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.2, 0.05)])
def test_gradcheck(smoothing, z_loss):
    torch.manual_seed(0)
    states, weight, bias = torch.randn(5, 3).double(), torch.randn(7, 3).double(), torch.randn(7).double()
    known = [x.requires_grad_() for x in (states, weight, bias)]
    labels, weights = torch.tensor([0, 6, -100, 3, 2]), torch.tensor([1.0, -2.0, 1.0, 0.5, 0.0])

    def loss(states, weight, bias):
        return weighted_cross_entropy(states, weight, labels, weights, 2, -100, smoothing, z_loss, bias)

    assert torch.autograd.gradcheck(loss, known, atol=1e-6)
    mean = lambda states, weight, bias: weighted_cross_entropy(
        states, weight, labels, None, 2, -100, smoothing, z_loss, bias)
    assert torch.autograd.gradcheck(mean, known, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [50, 3000])
def test_sixteen_bits(dtype, v):
    torch.manual_seed(0)
    states, weight, labels = torch.randn(4096, 16), 0.1 * torch.randn(v, 16), torch.randint(0, v, (4096,))
    exact = [x.clone().requires_grad_() for x in (states, weight)]
    rough = [x.to(dtype).requires_grad_() for x in (states, weight)]
    weights = torch.rand(4096) / 4096  # so small that fp16 alone would lose the gradients
    for known in (exact, rough):
        weighted_cross_entropy(*known, labels, weights).backward()
    assert all(x.grad.dtype == dtype for x in rough)
    gap = (rough[1].grad.float() - exact[1].grad).norm() / exact[1].grad.norm()
    assert gap < (0.02 if dtype == torch.bfloat16 else 0.01)


def test_a_weight_of_zero_is_no_work():
    seen = []

    def counting(logits, rows):
        seen.append(len(logits))
        return logits.sum(), torch.ones_like(logits)

    chunked_loss(torch.randn(5, 3), torch.randn(4, 3), counting, chunk=2)
    assert seen == [2, 2, 1]
    states = torch.randn(6, 3, requires_grad=True)
    states.data[3:] = math.nan  # rows without weight are not even read
    weights = torch.tensor([1.0, 1, 1, 0, 0, 0])
    loss = weighted_cross_entropy(states, torch.randn(4, 3), torch.zeros(6, dtype=torch.long), weights, chunk=2)
    loss.backward()
    assert loss.isfinite() and states.grad.isfinite().all()


@pytest.mark.parametrize("v", [9, 2000])
def test_every_loss_is_zero_where_nothing_counts(v):
    states, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(v, 4, requires_grad=True)
    bias, ids = torch.randn(v, requires_grad=True), torch.randint(0, v, (2, 3))
    nothing, rates = torch.zeros(2, 3, dtype=torch.bool), torch.tensor([0.5, 1.0])
    for loss in (
        weighted_cross_entropy(states, weight, ids, torch.zeros(2, 3), output_bias=bias),
        masked_cross_entropy(states, weight, ids, nothing, bias),
        denoising_cross_entropy(states, weight, torch.full((2, 3), 5), 5, output_bias=bias),
        denoising_cross_entropy(states, weight, torch.full((2, 3), -100), 5, smoothing=0.1, output_bias=bias),
        diffusion_cross_entropy(states, weight, ids, nothing, rates, output_bias=bias),
        diffusion_cross_entropy(states, weight, ids, ~nothing, rates, nothing, output_bias=bias),
    ):
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, [states, weight, bias]))


def test_shift_right():
    targets = torch.tensor([[5, 6, 7], [8, -100, -100]])
    assert shift_right(targets, 1, 0).tolist() == [[1, 5, 6], [1, 8, 0]]


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 4), v=st.integers(2, 3), seed=st.integers(0, 2**16))
def test_the_bound_of_diffusion_is_tight_for_exact_conditionals(length, v, seed):
    torch.manual_seed(seed)
    joint = torch.rand((v,) * length, dtype=torch.double) + 0.01
    joint /= joint.sum()
    text = torch.randint(0, v, (length,)).tolist()
    total = 0.0
    for code in range(1, 2**length):
        hidden = [i for i in range(length) if code >> i & 1]
        for i in hidden:
            others = [j for j in hidden if j != i]
            marginal = joint.sum(others, keepdim=True) if others else joint
            place = [0 if j in others else slice(None) if j == i else text[j] for j in range(length)]
            table = marginal[tuple(place)]
            total -= math.log(table[text[i]] / table.sum()) * (
                math.factorial(len(hidden) - 1) * math.factorial(length - len(hidden)) / math.factorial(length))
    assert total == pytest.approx(-math.log(joint[tuple(text)]), rel=1e-9)


def test_rates_per_token_and_counted_positions():
    torch.manual_seed(0)
    states, weight, ids = torch.randn(2, 4, 8), torch.randn(30, 8), torch.randint(0, 30, (2, 4))
    masked, rates = torch.rand(2, 4) < 0.5, 0.2 + 0.8 * torch.rand(2, 4)
    counted = torch.tensor([[True, True, True, False], [False, True, True, True]])
    losses = token_losses(states @ weight.T, ids)
    expected = (losses * masked * counted / rates).sum() / 6
    torch.testing.assert_close(diffusion_cross_entropy(states, weight, ids, masked, rates, counted), expected)
    assert diffusion_weights(masked, rates).shape == (2, 4)


def test_wrong_weights_masks_and_rates():
    states, weight, ids = torch.randn(2, 3, 4), torch.randn(9, 4), torch.zeros(2, 3, dtype=torch.long)
    for weights in (torch.ones(3), torch.full((2, 3), math.nan), torch.full((2, 3), math.inf)):
        with pytest.raises(InputError):
            weighted_cross_entropy(states, weight, ids, weights)
    for how in ({"smoothing": 1.1}, {"smoothing": math.nan}, {"z_loss": -1.0}, {"z_loss": math.nan}, {"chunk": 0}):
        with pytest.raises(InputError):
            weighted_cross_entropy(states, weight, ids, **how)
    for marks in (torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool)):
        with pytest.raises(InputError):
            masked_cross_entropy(states, weight, ids, marks)
    everything = torch.ones(2, 3, dtype=torch.bool)
    for rates in ([0.0, 0.5], [math.nan, 0.5], [1.1, 0.5], [0.5]):
        with pytest.raises(InputError):
            diffusion_cross_entropy(states, weight, ids, everything, torch.tensor(rates))
    with pytest.raises(InputError, match="0 to 8"):
        masked_cross_entropy(states, weight, ids + 9, everything)
