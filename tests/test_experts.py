"""Mixtures: equal to Mixtral in block, losses and whole model, whatever the routing."""

import pytest
import torch
from torch import nn

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.core import InputError, SettingsError, set_seed
from llmbook.experts import (
    Experts,
    MixtureOfExperts,
    balance_loss,
    count_experts,
    from_mixtral,
    route,
    router_z_loss,
    run_grouped,
    run_loop,
    use_experts,
)
from llmbook.recurrence import auxiliary_loss, draw_windows, train_briefly

SHAPE = DecoderSettings(60, 2, 32, 4, 2, 40, 64)


def test_route_by_hand():
    found = route(torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, -9.0]]), 2)
    assert found.chosen[0].tolist() == [1, 2] and set(found.chosen[1].tolist()) == {0, 1}
    assert torch.allclose(found.weights.sum(-1), torch.ones(2)) and torch.allclose(found.weights[1], torch.tensor([0.5, 0.5]))
    single = route(torch.tensor([[0.0, 2.0, 1.0]]), 1)
    assert torch.allclose(single.weights, torch.tensor([[0.0, 2.0, 1.0]]).softmax(-1)[:, 1:2])


@pytest.mark.parametrize("width,hidden", [(12, 20), (13, 20), (12, 7)])
@pytest.mark.parametrize("n,count,k,favour", [(1, 4, 2, 0), (17, 8, 2, 0), (17, 8, 1, 50), (40, 3, 3, 0), (5, 64, 2, 9)])
def test_grouped_equals_the_loop(n, count, k, favour, width, hidden):
    set_seed(n)
    x, logits = torch.randn(n, width, requires_grad=True), torch.randn(n, count)
    experts = Experts(width, hidden, count)
    logits[:, 0] += favour
    logits.requires_grad_()
    found = []
    for run in (run_loop, run_grouped):
        y = run(experts, x, route(logits, k))
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, logits, *experts.parameters()])))
    assert all(torch.isfinite(b).all() and torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", ["grouped", "loop"])
def test_block_is_mixtrals(seed, form):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    set_seed(seed)
    count, k = [(8, 2), (4, 4), (16, 3), (2, 2)][seed]
    config = MixtralConfig(hidden_size=24, intermediate_size=20 + seed, num_local_experts=count, num_experts_per_tok=k)
    theirs, ours = MixtralSparseMoeBlock(config), MixtureOfExperts(24, 20 + seed, count, k, form=form)
    pairs = [(ours.router.weight, theirs.gate.weight), (ours.experts.gate_up, theirs.experts.gate_up_proj),
             (ours.experts.down, theirs.experts.down_proj)]
    for mine, other in pairs:
        nn.init.normal_(other, std=0.3)
        mine.data = other.data.clone()
    x = torch.randn(3, 11, 24, requires_grad=True)
    probe = torch.randn(3, 11, 24)
    mine = torch.autograd.grad((ours(x) * probe).sum(), [x, *(a for a, _ in pairs)])
    other = torch.autograd.grad((theirs(x) * probe).sum(), [x, *(b for _, b in pairs)])
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("count,k", [(8, 2), (4, 1), (5, 5)])
def test_losses_are_the_librarys(count, k):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    set_seed(count)
    logits = (torch.randn(90, count) * 2).requires_grad_()
    ours, theirs = balance_loss(logits, route(logits, k).chosen), load_balancing_loss_func((logits,), count, k)
    assert torch.allclose(ours, theirs, atol=1e-5)
    a, b = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(router_z_loss(logits), router_z_loss_func(logits[None]), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed,count,k", [(0, 8, 2), (1, 3, 3), (2, 5, 2)])
def test_whole_model_is_mixtral(seed, count, k, tied):
    from transformers import MixtralConfig, MixtralForCausalLM

    set_seed(seed)
    theirs = MixtralForCausalLM(MixtralConfig(
        vocab_size=70, hidden_size=32, intermediate_size=28, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1 + seed // 2,
        num_local_experts=count, num_experts_per_tok=k, max_position_embeddings=50, tie_word_embeddings=tied,
    ))
    for weight in theirs.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    ours, ids = from_mixtral(theirs), torch.randint(0, 70, (2, 30))
    assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)
    probe = torch.randn(2, 30, 70)
    (ours(ids) * probe).sum().backward()
    (theirs(ids).logits * probe).sum().backward()
    found = ours.blocks[0].feed_forward.experts.down.grad
    assert torch.allclose(found, theirs.model.layers[0].mlp.experts.down_proj.grad, atol=1e-3)
    theirs.model.norm.weight.data += 1
    assert not torch.allclose(ours(ids), theirs(ids).logits, atol=1e-2), "the weights are a copy"


def test_mixtral_with_a_window_or_one_expert_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    small = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    for other in ({"sliding_window": 4}, {"num_experts_per_tok": 1}):
        with pytest.raises(InputError):
            from_mixtral(MixtralForCausalLM(MixtralConfig(**small, num_local_experts=2, **other)))
    with pytest.raises(InputError, match="mixtral"):
        from_mixtral(LlamaForCausalLM(LlamaConfig(**small)))


@pytest.mark.parametrize("count,k", [(2, 2), (8, 2), (6, 4)])
def test_upcycling_keeps_the_function_and_the_count_is_exact(count, k):
    set_seed(count)
    decoder, ids = Decoder(SHAPE), torch.randint(0, 60, (2, 20))
    before = decoder(ids)
    use_experts(decoder, count, k)
    assert torch.allclose(decoder(ids), before, atol=1e-5)
    assert count_experts(SHAPE, count, k)["total"] == sum(p.numel() for p in decoder.parameters())


def test_only_chosen_experts_get_gradients():
    set_seed(0)
    decoder = use_experts(Decoder(SHAPE), 8, 2)
    decoder(torch.tensor([[3]])).sum().backward()
    for block in decoder.blocks:
        touched = block.feed_forward.experts.down.grad.flatten(1).abs().sum(1) > 0
        assert int(touched.sum()) == 2 and torch.equal(touched, block.feed_forward.load > 0)


def test_losses_are_left_in_training_only_and_reach_the_router():
    set_seed(0)
    decoder = use_experts(Decoder(SHAPE), 4, 2)
    ids = torch.randint(0, 60, (2, 20))
    decoder(ids)
    loss = auxiliary_loss(decoder)
    gradient = torch.autograd.grad(loss, decoder.blocks[0].feed_forward.router.weight)[0]
    assert loss > 0 and gradient.abs().sum() > 0
    decoder.eval()(ids)
    assert auxiliary_loss(decoder) == 0


def test_the_balance_loss_balances():
    set_seed(0)
    text, spread = torch.randint(0, 60, (400,)), {}
    for weight in (0.0, 0.5):
        set_seed(1)
        decoder = use_experts(Decoder(SHAPE), 4, 1, weight, copy=False)
        for block in decoder.blocks:
            block.feed_forward.router.weight.data[0] += 0.3 * torch.randn(32)  # a favourite for half of the directions
        train_briefly(decoder, draw_windows(text, 20, 8), 60)
        decoder(text[:300].view(10, 30))
        spread[weight] = max(block.feed_forward.load.max().item() for block in decoder.blocks)
    assert spread[0.5] < spread[0.0]


@pytest.mark.parametrize("call", [
    lambda: MixtureOfExperts(8, 8, 4, 5), lambda: MixtureOfExperts(8, 8, 4, 0), lambda: MixtureOfExperts(8, 8, form="batched"),
])
def test_bad_settings_are_refused_with_words(call):
    with pytest.raises(SettingsError, match="Allowed"):
        call()


@pytest.mark.parametrize("call", [
    lambda: route(torch.zeros(2, 3, 4), 1), lambda: route(torch.zeros(2, 3), 4), lambda: use_experts(use_experts(Decoder(SHAPE))),
])
def test_bad_input_is_refused_with_words(call):
    with pytest.raises(InputError, match="Allowed"):
        call()
