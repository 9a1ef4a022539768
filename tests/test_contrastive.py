"""Losses of similarity beyond their page: any shape, half precision, extremes, wrong input, the libraries' own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmbook.contrastive import (
    clip_loss,
    cosine_similarity_loss,
    info_nce,
    margin_loss,
    matryoshka_loss,
    mean_squared_loss,
    ranking_loss,
    siglip_loss,
    triplet_loss,
)
from llmbook.core import InputError


def draw(*shape: int, count: int = 1, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(*shape, requires_grad=True) for _ in range(count)]


def same_with_gradients(mine, theirs, known):
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(loss, known, retain_graph=True) for loss in (mine, theirs)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 8), d=st.integers(1, 9), seed=st.integers(0, 2**16), margin=st.floats(0.1, 5))
def test_equal_to_torch(n, d, seed, margin):
    one, other, third = draw(n, d, count=3, seed=seed)
    same_with_gradients(triplet_loss(one, other, third, margin),
                        nn.TripletMarginLoss(margin, eps=0)(one, other, third), [one, other, third])
    both = torch.rand(n) < 0.5
    if d > 1:  # in one dimension cosines are ±1, on the kinks
        reference = nn.CosineEmbeddingLoss(margin=0.3)(one, other, 2 * both.float() - 1)
        away = 1 - F.cosine_similarity(one, other)
        mine = torch.where(both, away, F.relu(0.7 - away)).mean()  # linear where Hadsell's is squared
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)
        squared = torch.where(both, away.square(), F.relu(0.7 - away).square()).mean() / 2
        same_with_gradients(margin_loss(one, other, both, 0.7), squared, [one, other])
    same_with_gradients(mean_squared_loss(one, other.detach()), F.mse_loss(one, other.detach()), [one])


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 7), extra=st.integers(0, 5), seed=st.integers(0, 2**16), scale=st.floats(0.1, 50))
def test_ranking_equals_the_library(n, extra, seed, scale):
    from sentence_transformers.sentence_transformer.losses import (
        MultipleNegativesRankingLoss,
        MultipleNegativesSymmetricRankingLoss,
    )

    vectors = draw(n, 6, count=3, seed=seed)  # in double: at scale 50 a rounding of float32 is 1e-5
    queries, documents, hard = (x.detach().double().requires_grad_() for x in vectors)
    groups = [queries, documents] + ([hard] if extra else [])
    for theirs, symmetric in ((MultipleNegativesRankingLoss, False), (MultipleNegativesSymmetricRankingLoss, True)):
        reference = theirs(nn.Identity(), scale=scale).compute_loss_from_embeddings(groups, None)
        mine = ranking_loss(queries, torch.cat(groups[1:]), scale, symmetric=symmetric)
        same_with_gradients(mine, reference, groups)


def test_gradcheck_in_double():
    one, other, third = (x.detach().double().requires_grad_() for x in draw(4, 5, count=3))
    exclude = torch.eye(4, dtype=torch.bool).roll(1, 0)
    log_scale, bias = torch.tensor(1.0).double().requires_grad_(), torch.tensor(-2.0).double().requires_grad_()
    for loss in (
        lambda a, b, c: info_nce(a, torch.cat([b, c])),
        lambda a, b, c: ranking_loss(a, b, 5.0, exclude, symmetric=True),
        lambda a, b, c: cosine_similarity_loss(a, b, torch.tensor([0.1, 0.9, -0.5, 0.0])),
        lambda a, b, c: margin_loss(a, b, torch.tensor([1, 0, 0, 1]), 2.5, "euclidean"),
        lambda a, b, c: triplet_loss(a, b, c, 3.0, "cosine"),
        lambda a, b, c: matryoshka_loss(triplet_loss, [a, b, c], [5, 2], [1.0, 0.3]),
    ):
        assert torch.autograd.gradcheck(loss, (one, other, third))
    for loss in (clip_loss, lambda a, b, s: siglip_loss(a, b, s, bias)):
        assert torch.autograd.gradcheck(loss, (one, other, log_scale))


def test_excluding_pairs_removes_their_force():
    queries, documents = draw(5, 4, count=2)
    exclude = torch.zeros(5, 5, dtype=torch.bool)
    exclude[0, 1:] = True  # the first query has no rivals left
    loss = info_nce(queries, documents, 0.1, exclude)
    gradient = torch.autograd.grad(loss, queries)[0]
    assert gradient[0].abs().max() == 0 and gradient[1:].abs().min(1).values.max() > 0
    everything = torch.ones(5, 5, dtype=torch.bool)
    loss = info_nce(queries, documents, 0.1, everything)
    assert loss.item() == 0 and not torch.autograd.grad(loss, queries)[0].any()


def test_extremes_stay_finite():
    zeros, log_scale = torch.zeros(3, 4, requires_grad=True), torch.tensor(4.6)
    for loss in (
        ranking_loss(zeros, zeros), info_nce(zeros, zeros), clip_loss(zeros, zeros, log_scale),
        siglip_loss(zeros, zeros, log_scale, torch.tensor(-10.0)), triplet_loss(zeros, zeros, zeros),
        triplet_loss(zeros, zeros, zeros, 1.0, "cosine"), margin_loss(zeros, zeros, torch.zeros(3), 1.0, "euclidean"),
        cosine_similarity_loss(zeros, zeros, torch.ones(3)), matryoshka_loss(triplet_loss, [zeros] * 3, [4, 1]),
    ):
        assert loss.isfinite() and torch.autograd.grad(loss, zeros)[0].isfinite().all()


def test_sixteen_bits_and_autocast():
    one, other, third = (F.normalize(x.detach(), dim=1).requires_grad_() for x in draw(16, 32, count=3))
    log_scale = torch.tensor(math.log(100.0))
    cases = [
        lambda a, b, c: ranking_loss(a, torch.cat([b, c]), 100.0), lambda a, b, c: clip_loss(a, b, log_scale),
        lambda a, b, c: siglip_loss(a, b, log_scale, torch.tensor(-10.0)), triplet_loss,
        lambda a, b, c: margin_loss(a, b, torch.arange(16) % 2),
        lambda a, b, c: matryoshka_loss(triplet_loss, [a, b, c], [32, 8]),
    ]
    for loss in cases:
        exact = loss(one, other, third)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = loss(one, other, third)
        torch.testing.assert_close(mixed, exact)  # cosines are made in 32 bits whatever the mode
        half = loss(*(x.bfloat16() for x in (one, other, third)))
        assert half.dtype == torch.float32 and half.isfinite()


def test_wrong_input():
    one, other = draw(3, 4, count=2)
    wide, grades, shift = torch.zeros(3, 5), torch.ones(3), torch.tensor(0.0)
    for wrong in (
        lambda: cosine_similarity_loss(one, wide, grades), lambda: cosine_similarity_loss(one, other, 2 * grades),
        lambda: cosine_similarity_loss(one, other, math.nan * grades), lambda: cosine_similarity_loss(one, other, grades[:2]),
        lambda: mean_squared_loss(one, wide), lambda: info_nce(one, wide), lambda: info_nce(one, other[:2]),
        lambda: info_nce(one, other, math.nan), lambda: info_nce(one, other, 0.0),
        lambda: info_nce(one, other, torch.tensor(-1.0)),
        lambda: info_nce(one, other, exclude=torch.zeros(3, 3)), lambda: info_nce(one, other, exclude=torch.zeros(3, 2).bool()),
        lambda: ranking_loss(one, other, math.nan), lambda: ranking_loss(one, other, 0.0), lambda: ranking_loss(one[0], other),
        lambda: clip_loss(one, other[:2], shift), lambda: clip_loss(one, other, torch.tensor(math.nan)),
        lambda: siglip_loss(one, wide, shift, shift), lambda: siglip_loss(one, other, torch.tensor(math.inf), shift),
        lambda: margin_loss(one, other, grades, -1.0), lambda: margin_loss(one, other, 3 * grades),
        lambda: triplet_loss(one, other, wide), lambda: triplet_loss(one, other, one, math.nan),
        lambda: triplet_loss(one, other, one, 1.0, "manhattan"), lambda: matryoshka_loss(ranking_loss, [one, other], []),
        lambda: matryoshka_loss(ranking_loss, [one, other], [0]), lambda: matryoshka_loss(ranking_loss, [one, other], [5]),
        lambda: matryoshka_loss(ranking_loss, [one, other], [4, 2], [1.0]),
    ):
        with pytest.raises(InputError):
            wrong()
