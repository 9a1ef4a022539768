"""Positions held against closed forms, against transformers, and against a task whose answer is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from llmbook.core import InputError, SettingsError
from llmbook.positions import (
    BucketedBias,
    LearnedPositions,
    PositionModel,
    PositionSettings,
    Stretch,
    alibi_bias,
    alibi_slopes,
    apply_rotary,
    bucket_distances,
    compare_positions,
    loss_by_position,
    relative_distances,
    rotary_angles,
    rotary_frequencies,
    shaw_attention,
    shaw_bias,
    sinusoidal_positions,
    stretched_angles,
    train_positions,
)

KINDS = ("none", "sinusoidal", "learned", "shaw", "t5", "rotary", "alibi")
SMALL = PositionSettings(d=32, heads=2, layers=1, trained=16, longest=48, steps=5, batch=4, reach=4)


@settings(max_examples=30)
@given(st.integers(1, 30), st.sampled_from([4, 8, 64]), st.floats(10, 1e6), st.integers(0, 3000))
def test_scores_depend_on_the_distance_alone(t, width, base, shift):
    q, k = torch.randn(2, 1, 1, t, width, dtype=torch.float64)
    scores = []
    for begin in (0, shift):
        cos, sin = rotary_angles(torch.arange(t) + begin, width, base)
        scores.append(apply_rotary(q, cos, sin) @ apply_rotary(k, cos, sin).transpose(-1, -2))
    assert torch.allclose(*scores, atol=5e-2)


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 6), st.integers(0, 2**31))
def test_shaw_equals_the_sum_over_pairs(t, reach, cached, seed):
    draw = torch.Generator().manual_seed(seed)
    s, width = t + cached, 4
    query, key, value = (torch.randn(2, 3, n, width, generator=draw, dtype=torch.float64) for n in (t, s, s))
    tables = torch.randn(2, 2 * reach + 1, width, generator=draw, dtype=torch.float64)
    found = shaw_attention(query, key, value, *tables)
    for i in range(t):
        rows = [max(-reach, min(reach, j - (i + cached))) + reach for j in range(s)]
        scores = [(query[:, :, i] * (key[:, :, j] + tables[0][rows[j]])).sum(-1) for j in range(s)]
        weights = torch.softmax(torch.stack(scores, -1) / width**0.5, -1)
        wanted = sum(weights[..., j, None] * (value[:, :, j] + tables[1][rows[j]]) for j in range(s))
        assert torch.allclose(found[:, :, i], wanted)


def test_shaw_passes_gradients_to_its_tables_and_takes_a_mask():
    query, key, value = torch.randn(3, 1, 2, 6, 4)
    tables = [torch.randn(5, 4, requires_grad=True) for _ in range(2)]
    mask = torch.full((6, 6), -torch.inf).triu(1)
    shaw_attention(query, key, value, *tables, mask).sum().backward()
    assert tables[0].grad[:3].abs().sum() > 0
    assert tables[0].grad[3:].abs().sum() == 0, "distances to the future are masked"
    assert torch.allclose(tables[1].grad.sum(), torch.tensor(2.0 * 6 * 4)), "weights sum to one"


@given(st.integers(1, 40))
def test_alibi_slopes_equal_their_closed_form(heads):
    slopes = alibi_slopes(heads)
    power = 2 ** int(math.log2(heads))
    wanted = [2 ** (-8 * i / power) for i in range(1, power + 1)] + [2 ** (-4 * i / power) for i in range(1, power * 2, 2)]
    assert torch.allclose(slopes, torch.tensor(wanted[:heads]))
    assert len(set(slopes.tolist())) == heads, "no two heads look equally far"


def test_alibi_equals_bloom_and_mpt():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    for heads in (1, 3, 8, 14, 32):
        mask = torch.full((9, 9), -torch.inf).triu(1)
        mine = torch.softmax(alibi_bias(heads, 9) + mask, -1)
        for theirs in (build_alibi_tensor(torch.ones(1, 9), heads, torch.float), build_mpt_alibi_tensor(heads, 9)):
            assert torch.allclose(mine, torch.softmax(theirs + mask, -1), atol=1e-6)


@given(st.sampled_from([4, 8, 32, 64]), st.integers(40, 2000), st.booleans())
def test_buckets_equal_t5_and_never_go_back(buckets, furthest, causal):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-3000, 3001)
    mine = bucket_distances(distances, buckets, furthest, causal)
    assert torch.equal(mine, T5Attention._relative_position_bucket(distances, not causal, buckets, furthest))
    assert mine.min() == 0 and mine.max() == buckets - 1
    assert (mine[:3000].diff() <= 0).all(), "farther never means a nearer bucket"


@settings(max_examples=25)
@given(st.sampled_from([8, 64, 128]), st.floats(1, 64), st.sampled_from([256, 2048, 8192]), st.sampled_from([1e4, 5e5]))
def test_stretching_equals_transformers(width, factor, trained, base):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for kind in ("linear", "yarn", "llama3"):
        rope = {"rope_type": kind, "factor": factor, "rope_theta": base, "original_max_position_embeddings": trained}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config = LlamaConfig(
            hidden_size=width, num_attention_heads=1, head_dim=width,
            max_position_embeddings=int(trained * factor) + 1, rope_parameters=rope,
        )
        speeds, sharper = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        stretch = Stretch(kind, factor, trained)
        assert torch.allclose(rotary_frequencies(width, stretch, base), speeds, rtol=1e-4)
        cos, sin = stretched_angles(torch.arange(5), width, stretch, base)
        angles = torch.arange(5)[:, None] * speeds.repeat(2)
        assert torch.allclose(cos, angles.cos() * sharper, atol=1e-4)
        assert torch.allclose(sin, angles.sin() * sharper, atol=1e-4)


def test_a_factor_of_one_changes_nothing():
    plain = rotary_angles(torch.arange(50), 16)
    for kind in ("none", "linear", "ntk", "yarn", "llama3"):
        for mine, theirs in zip(stretched_angles(torch.arange(50), 16, Stretch(kind)), plain, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_causal_and_read_beyond_their_training(kind):
    torch.manual_seed(0)
    model = PositionModel(kind, 11, SMALL).eval()
    ids = torch.randint(0, 11, (2, 48))
    changed = ids.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 11
    with torch.no_grad():
        first, second = model(ids), model(changed)
    assert torch.allclose(first[:, :30], second[:, :30], atol=1e-5)
    assert not torch.allclose(first[:, 30:], second[:, 30:], atol=1e-3)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "none"])
def test_every_kind_sees_order_in_one_layer(kind):
    torch.manual_seed(0)
    model = PositionModel(kind, 11, SMALL).eval()
    if kind == "t5":
        torch.nn.init.normal_(model.blocks[0].bias.table)
    ids = torch.tensor([[1, 2, 3, 4, 5], [4, 3, 2, 1, 5]])
    with torch.no_grad():
        assert (model(ids)[0, -1] - model(ids)[1, -1]).abs().max() > 1e-4
        blind = PositionModel("none", 11, SMALL).eval()(ids)
    assert torch.allclose(blind[0, -1], blind[1, -1], atol=1e-5)


def test_a_letter_seven_places_back_is_found_by_those_who_can_count():
    """A planted truth: each letter repeats the one seven places before, which only a model that sees distances finds."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 8, (20_000,), generator=draw)
    for start in range(7, len(ids)):
        ids[start] = ids[start - 7] if start % 50 > 6 else ids[start]
    own = PositionSettings(d=32, heads=2, layers=1, trained=32, longest=64, steps=150, batch=16, reach=16, rate=1e-2)
    found = compare_positions(ids, ("none", "shaw"), own)
    assert found["shaw"][16:32].mean() < 0.8 * found["none"][16:32].mean()
    assert found["shaw"][48:].mean() < 0.9 * found["none"][48:].mean(), "and beyond the trained length, too"


def test_training_is_repeatable_and_takes_token_ids():
    ids = torch.randint(0, 30, (1200,), generator=torch.Generator().manual_seed(1))
    losses = [loss_by_position(train_positions(ids, "alibi", SMALL), ids, 4) for _ in range(2)]
    assert torch.equal(*losses) and losses[0].shape == (48,) and losses[0].isfinite().all()
    assert set(compare_positions(ids, ("rotary",), SMALL, 4)) == {"rotary", "rotary, linear", "rotary, ntk", "rotary, yarn"}


def test_a_cached_text_gets_the_same_bias():
    bias = BucketedBias(3, causal=True)
    torch.nn.init.normal_(bias.table)
    assert torch.equal(bias(1, 30), bias(30)[:, -1:]) and torch.equal(alibi_bias(3, 4, 30), alibi_bias(3, 30)[:, -4:])
    assert torch.equal(relative_distances(2, 7), relative_distances(7)[-2:])
    table = LearnedPositions(9, 4)
    assert torch.equal(table(2, start=7), table(9)[-2:])


def test_positions_added_twice_as_waves_equal_the_formula():
    table = sinusoidal_positions(60, 10).double()
    for p, i in ((0, 0), (7, 3), (59, 4)):
        assert math.isclose(table[p, 2 * i], math.sin(p / 10_000 ** (2 * i / 10)), abs_tol=1e-6)
        assert math.isclose(table[p, 2 * i + 1], math.cos(p / 10_000 ** (2 * i / 10)), abs_tol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: sinusoidal_positions(4, 5),
        lambda: rotary_angles(torch.arange(3), 7),
        lambda: relative_distances(4, 3),
        lambda: LearnedPositions(0, 4),
        lambda: LearnedPositions(4, 4)(5),
        lambda: LearnedPositions(4, 4)(1, start=-1),
        lambda: shaw_bias(torch.zeros(1, 1, 3, 4), torch.zeros(4, 4)),
        lambda: alibi_slopes(0),
        lambda: bucket_distances(torch.arange(3), 2),
        lambda: bucket_distances(torch.arange(3), 32, 8),
        lambda: compare_positions("", ("none",)),
        lambda: compare_positions(torch.zeros(20_000), ("none",)),
        lambda: compare_positions(torch.zeros(2, 20_000, dtype=torch.long), ("none",)),
    ],
)
def test_bad_input_is_named(call):
    with pytest.raises(InputError, match="Allowed"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: Stretch("cubic", 2.0),
        lambda: Stretch("linear", 0.9),
        lambda: Stretch("linear", math.nan),
        lambda: Stretch("linear", "two"),
        lambda: Stretch("llama3", 2.0, 0),
        lambda: Stretch("llama3", 2.0, 64, slow=4.0),
        lambda: Stretch("yarn", 2.0, 64, sharpness=0.0),
        lambda: rotary_frequencies(64, Stretch("yarn", 2.0, 4)),
        lambda: rotary_frequencies(2, Stretch("ntk", 2.0)),
        lambda: rotary_frequencies(8, base=1.0),
        lambda: PositionModel("spiral", 5),
        lambda: PositionModel("none", 5, PositionSettings(d=30)),
    ],
)
def test_bad_settings_are_named(call):
    with pytest.raises(SettingsError, match="Allowed"):
        call()


def test_biases_fit_the_fused_attention():
    query, key, value = torch.randn(3, 2, 4, 10, 8)
    bias = alibi_bias(4, 10)
    slow = torch.softmax(query @ key.transpose(-1, -2) / 8**0.5 + bias, -1) @ value
    assert torch.allclose(F.scaled_dot_product_attention(query, key, value, attn_mask=bias), slow, atol=1e-6)
