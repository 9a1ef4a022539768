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
    clip_loss,
    info_nce,
    perplexity_of,
    ranking_loss,
    siglip_loss,
    token_losses,
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
    with pytest.raises(InputError, match="width 4"):
        causal_cross_entropy(states, torch.randn(9, 5), torch.tensor([0, 1, 2]))
    for conversion in (bits_per_byte, perplexity_of):
        with pytest.raises(InputError):
            conversion(1.0, 0)
    with pytest.raises(InputError):
        ranking_loss(torch.randn(3, 4), torch.randn(3, 5))
    with pytest.raises(InputError):
        siglip_loss(torch.randn(3, 4), torch.randn(2, 4), torch.tensor(0.0), torch.tensor(0.0))


def test_other_ignore_index():
    states, weight = torch.randn(4, 4), torch.randn(9, 4)
    labels = torch.tensor([1, 0, 2, 0])
    expected = F.cross_entropy(states @ weight.T, labels, ignore_index=0)
    torch.testing.assert_close(causal_cross_entropy(states, weight, labels, ignore_index=0), expected)


def test_conversions():
    assert bits_per_byte(800 * math.log(2), 100) == pytest.approx(8.0)
    assert perplexity_of(300.0, 100) == pytest.approx(math.e**3)
    assert math.isfinite(perplexity_of(1e9, 1))


def test_contrastive_extremes():
    zeros = torch.zeros(3, 4, requires_grad=True)
    for loss in (
        ranking_loss(zeros, zeros), info_nce(zeros, zeros), clip_loss(zeros, zeros, torch.tensor(3.0)),
        siglip_loss(zeros, zeros, torch.tensor(3.0), torch.tensor(-10.0)),
    ):
        assert loss.isfinite() and torch.autograd.grad(loss, zeros)[0].isfinite().all()
    empty = torch.zeros(0, 4, requires_grad=True)
    assert ranking_loss(empty, empty).item() == 0
    everything = torch.ones(3, 3, dtype=torch.bool)
    assert ranking_loss(torch.randn(3, 4), torch.randn(3, 4), exclude=everything).item() == pytest.approx(0, abs=1e-6)
