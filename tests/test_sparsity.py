"""Sparse, compressed and linear attention: equal to the masked or written-out form in every shape a decoder may ask for."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.attention import naive_attention
from llmbook.bridge import to_transformers
from llmbook.core import InputError, SettingsError, set_seed
from llmbook.recurrence import AttentionLayer, LayeredModel, train_recall
from llmbook.sparsity import (
    CompressiveLayer,
    Compressor,
    FixedSparse,
    LinearAttention,
    ScanLayer,
    SlidingWindow,
    StridedSparse,
    fixed_mask,
    reconstruction_loss,
    saved_bytes,
    scan_chunked,
    scan_parallel,
    scan_recurrent,
    sliding_mask,
    strided_mask,
)

KERNELS = {
    "window 1": (SlidingWindow(1), lambda t, s: sliding_mask(t, s, 1)),
    "window 5": (SlidingWindow(5), lambda t, s: sliding_mask(t, s, 5)),
    "strided 4": (StridedSparse(4), lambda t, s: strided_mask(t, s, 4)),
    "strided 7": (StridedSparse(7), lambda t, s: strided_mask(t, s, 7)),
    "fixed 4": (FixedSparse(4), lambda t, s: fixed_mask(t, s, 4)),
    "fixed 6, 3": (FixedSparse(6, 3), lambda t, s: fixed_mask(t, s, 6, 3)),
}


def test_masks_are_the_definitions():
    for i, j in itertools.product(range(30), range(30)):
        d = i - j
        assert sliding_mask(30, 30, 4)[i, j] == (0 <= d < 4)
        assert sliding_mask(30, 30, 4, False)[i, j] == (abs(d) < 4)
        assert strided_mask(30, 30, 5)[i, j] == (d >= 0 and (d < 5 or d % 5 == 0))
        assert fixed_mask(30, 30, 5, 2)[i, j] == (d >= 0 and (i // 5 == j // 5 or j % 5 in (3, 4)))
    for mask in (lambda t, s: sliding_mask(t, s, 4), lambda t, s: strided_mask(t, s, 5), lambda t, s: fixed_mask(t, s, 5)):
        assert torch.equal(mask(3, 30), mask(30, 30)[-3:])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("t,s,kv,padding", [
    (33, 33, 4, "none"), (33, 33, 2, "end"), (33, 33, 1, "rows"), (1, 33, 4, "none"), (1, 33, 2, "end"), (6, 33, 2, "end"),
    (2, 2, 4, "none"), (24, 24, 4, "head"), (12, 33, 4, "none"),
])
def test_blocks_equal_the_mask(name, t, s, kv, padding):
    set_seed(t + s)
    kernel, pattern = KERNELS[name]
    q, k, v = (torch.randn(2, n, length, 6, requires_grad=True) for n, length in ((4, t), (kv, s), (kv, s)))
    masks = {
        "none": None, "end": (torch.arange(s) < torch.tensor([[s], [s // 2]]))[:, None, None],
        "rows": torch.rand(1, 1, t, s) > 0.2, "head": torch.rand(2, 4, 1, s) > 0.2,
    }
    mask = masks[padding]
    whole = pattern(t, s) if mask is None else pattern(t, s) & mask
    ours, theirs = kernel(q, k, v, mask, True), naive_attention(q, k, v, whole)
    assert torch.allclose(ours, theirs, atol=1e-5)
    probe = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * probe).sum(), (q, k, v)) for y in (ours, theirs)), strict=True):
        assert torch.isfinite(a).all() and torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("window,t", [(1, 20), (3, 20), (8, 33), (40, 33)])
def test_window_to_both_sides(window, t):
    q, k, v = torch.randn(3, 2, 4, t, 6)
    for real in (None, (torch.arange(t) < torch.tensor([[t], [t // 2]]))[:, None, None]):
        whole = sliding_mask(t, t, window, False)
        whole = whole if real is None else whole & real
        assert torch.allclose(SlidingWindow(window)(q, k, v, real), naive_attention(q, k, v, whole), atol=1e-5)


@pytest.mark.parametrize("seed,window,kv", [(0, 4, 1), (1, 17, 2), (2, 60, 4)])
def test_decoder_with_a_window_is_mistral(seed, window, kv):
    from transformers import MistralConfig, MistralForCausalLM

    set_seed(seed)
    ours = Decoder(DecoderSettings(90, 3, 48, 4, kv, 80, 64, tied=False), SlidingWindow(window))
    llama = to_transformers(ours)
    config = llama.config.to_dict() | {"model_type": "mistral", "sliding_window": window}
    theirs = MistralForCausalLM(MistralConfig(**config))
    theirs.load_state_dict(llama.state_dict())
    ids = torch.randint(0, 90, (2, 64))
    probe = torch.randn(2, 64, 90)
    (ours(ids) * probe).sum().backward()
    (theirs(ids).logits * probe).sum().backward()
    assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)
    assert torch.allclose(ours.embedding.weight.grad, theirs.model.embed_tokens.weight.grad, atol=1e-3)


def pieces_equal_whole(layer, x, cuts) -> bool:
    state, parts = None, []
    for piece in x.split(cuts, 1):
        y, state = layer(piece, state)
        parts.append(y)
    return torch.allclose(torch.cat(parts, 1), layer(x)[0], atol=1e-5)


@pytest.mark.parametrize("cuts", [[1] * 40, [40], [9, 1, 30], [39, 1], [16, 16, 8]])
@pytest.mark.parametrize("build", [
    lambda: CompressiveLayer(16, 2, 8, 8, 4, 4), lambda: CompressiveLayer(16, 2, 4, 12, 3, 2, "max", True),
    lambda: ScanLayer(16, 2, "linear", 8), lambda: ScanLayer(16, 4, "retention", 5), lambda: ScanLayer(16, 2, "gated", 64),
    lambda: AttentionLayer(16, 2, SlidingWindow(5)), lambda: AttentionLayer(16, 2, StridedSparse(5)),
    lambda: AttentionLayer(16, 2, FixedSparse(5)), lambda: AttentionLayer(16, 2, LinearAttention()),
])
def test_pieces_equal_the_whole(build, cuts):
    set_seed(1)
    assert pieces_equal_whole(build(), torch.randn(2, 40, 16), cuts)


def test_a_window_keeps_a_window():
    layer = AttentionLayer(16, 2, SlidingWindow(5))
    _, (keys, values, length) = layer(torch.randn(1, 40, 16))
    assert keys.shape[2] == values.shape[2] == 5 and length == 40


@pytest.mark.parametrize("kind", ["mean", "max", "conv"])
def test_compressed_memory_has_the_sizes_asked_for(kind):
    layer = CompressiveLayer(16, 2, segment=4, recent=8, compressed=5, rate=2, kind=kind)
    _, past = layer(torch.randn(1, 61, 16))
    assert [part.shape[1] for part in past] == [5, 8, 1] and layer.span == 18
    _, past = layer(torch.randn(1, 14, 16))
    assert [part.shape[1] for part in past] == [2, 8, 2]


def test_compression_by_hand():
    x = torch.tensor([[[1.0], [5.0], [2.0], [0.0]]])
    assert Compressor(1, 2, "mean")(x).flatten().tolist() == [3, 1]
    assert Compressor(1, 2, "max")(x).flatten().tolist() == [5, 2]
    conv = Compressor(1, 2)
    assert conv(x).flatten().tolist() == [3, 1]
    conv.convolve.weight.data = torch.tensor([[[1.0, 10.0]]])
    assert conv(x).flatten().tolist() == [51, 2]


def test_reconstruction_trains_the_compressor_alone():
    set_seed(0)
    layer = CompressiveLayer(16, 2, 8, 8, 4, 4)
    x = torch.randn(2, 40, 16, requires_grad=True)
    y, _ = layer(x)
    layer.auxiliary.backward()
    reached = {name for name, weight in layer.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0}
    assert reached == {"compress.convolve.weight", "compress.convolve.bias"} and x.grad is None
    layer.zero_grad()
    y.sum().backward()
    assert layer.compress.convolve.weight.grad is None or not layer.compress.convolve.weight.grad.any()
    old = torch.randn(1, 8, 16)
    assert reconstruction_loss(layer, torch.randn(1, 8, 16), old, old) == 0


def test_the_past_beyond_the_span_is_gone_and_within_it_is_not():
    set_seed(0)
    layer = CompressiveLayer(16, 2, 4, 4, 2, 2)  # span 8
    x = torch.randn(1, 24, 16)
    for back, seen in ((2, True), (7, True), (15, False)):
        other = x.clone()
        other[:, 23 - back] += 1
        assert bool((layer(x)[0][:, 23] - layer(other)[0][:, 23]).abs().max() > 1e-6) == seen


@pytest.mark.parametrize("fade", [None, 0.0, 0.1, 5.0, 100.0])
@pytest.mark.parametrize("t,chunk", [(1, 4), (16, 4), (37, 8), (37, 64), (37, 1)])
def test_three_forms_of_one_scan(t, chunk, fade):
    set_seed(t)
    q, k = torch.randn(2, 2, 3, t, 5, requires_grad=True)
    v, start = torch.randn(2, 3, t, 6), torch.randn(2, 3, 5, 6)
    decay = None if fade is None else -fade * torch.rand(2, 3, t)
    loop, end = scan_recurrent(q, k, v, decay, start)
    pieces, last = scan_chunked(q, k, v, decay, start, chunk)
    assert torch.allclose(pieces, loop, atol=1e-4) and torch.allclose(last, end, atol=1e-4)
    assert torch.allclose(scan_parallel(q, k, v, decay), scan_recurrent(q, k, v, decay)[0], atol=1e-4)
    a, b = (torch.autograd.grad(y.sum(), k, retain_graph=True)[0] for y in (loop, pieces))
    assert torch.isfinite(b).all() and torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("groups,heads,size", [(1, 4, 8), (2, 4, 3)])
def test_scan_is_mamba2(groups, heads, size):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    set_seed(groups)
    x, steps = torch.randn(2, 45, heads, 6, requires_grad=True), torch.rand(2, 45, heads)
    speed, b, c = -torch.rand(heads) * 4, torch.randn(2, 45, groups, size), torch.randn(2, 45, groups, size)
    theirs, state = mamba2_chunk_scan(x, steps, speed, b, c, chunk_size=16, return_final_states=True)
    wide = lambda y: y.repeat_interleave(heads // groups, 2).transpose(1, 2)
    values, decay = (x * steps[..., None]).transpose(1, 2), (steps * speed).transpose(1, 2)
    ours, last = scan_chunked(wide(c), wide(b), values, decay, chunk=8)
    assert torch.allclose(ours.transpose(1, 2), theirs, atol=1e-4) and torch.allclose(last.mT, state, atol=1e-4)
    found, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs))
    assert torch.allclose(found, wanted, atol=1e-3)


def test_linear_attention_with_padding_equals_the_text_without_it():
    q, k, v = torch.randn(3, 2, 4, 30, 6)
    real = (torch.arange(30) < 20).expand(2, 1, 1, 30)
    for causal in (True, False):
        padded = LinearAttention(chunk=7)(q, k, v, real, causal)[:, :, :20]
        assert torch.allclose(padded, LinearAttention()(q[:, :, :20], k[:, :, :20], v[:, :, :20], None, causal), atol=1e-5)
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    assert torch.allclose(LinearAttention()(q, k, v), weights / weights.sum(-1, keepdim=True) @ v, atol=1e-5)


@pytest.mark.parametrize("kernel", [SlidingWindow(6), StridedSparse(6), FixedSparse(6), LinearAttention()])
def test_decoders_with_every_kernel_look_back_only_and_learn(kernel):
    set_seed(0)
    model = Decoder(DecoderSettings(30, 2, 32, 2, 1, 48, 64), kernel)
    ids = torch.randint(0, 30, (2, 50))
    changed = ids.clone()
    changed[:, 30:] = 7
    assert torch.allclose(model(ids)[:, :30], model(changed)[:, :30], atol=1e-5)
    losses = train_recall(model, [0], 40)
    assert losses[-1] < losses[0]


def test_bytes_grow_as_promised():
    def kept(kernel, t):
        q, k, v = (torch.randn(1, 1, t, 8, requires_grad=True) for _ in range(3))
        return saved_bytes(lambda: kernel(q, k, v, None, True))

    assert kept(naive_attention, 1024) > 3.5 * kept(naive_attention, 512)
    for kernel in (SlidingWindow(16), LinearAttention(chunk=16)):
        assert kept(kernel, 1024) < 2.2 * kept(kernel, 512)
    assert kept(StridedSparse(32), 1024) < kept(naive_attention, 1024) / 4
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: x.exp()) == 400 and saved_bytes(lambda: x * x) == 400


def test_compressive_layer_learns_recall_through_its_memory():
    set_seed(0)
    layer = CompressiveLayer(32, 2, 4, 4, 16, 2, through=True)
    losses = train_recall(LayeredModel(24, 32, [layer]), [0, 4], 30)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("call", [
    lambda: SlidingWindow(0), lambda: StridedSparse(0), lambda: FixedSparse(4, 5), lambda: FixedSparse(4, 0),
    lambda: CompressiveLayer(16, 2, 8, 12), lambda: CompressiveLayer(16, 2, 9, 9, 4, 2), lambda: CompressiveLayer(16, 3),
    lambda: Compressor(4, 2, "median"), lambda: ScanLayer(16, 3), lambda: ScanLayer(16, 2, "s4"),
])
def test_bad_settings_are_refused_with_words(call):
    with pytest.raises(SettingsError, match="Allowed"):
        call()


@pytest.mark.parametrize("call", [
    lambda q: StridedSparse(4)(q, q, q), lambda q: LinearAttention()(q, q, q, torch.ones(9, 9, dtype=torch.bool)),
    lambda q: CompressiveLayer(16, 2)(q), lambda q: ScanLayer(16, 2)(torch.zeros(1, 3, 8)),
])
def test_bad_input_is_refused_with_words(call):
    with pytest.raises(InputError, match="Allowed"):
        call(torch.randn(1, 2, 9, 16))
