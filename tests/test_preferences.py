"""Losses of preference against trl's own trainers on a small random Llama, and beyond their page."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.core import InputError
from llmbook.losses import causal_cross_entropy, token_losses, weighted_cross_entropy
from llmbook.preferences import (
    chunked_distillation_loss,
    distillation_loss,
    divergence_estimates,
    dpo_loss,
    group_advantages,
    ipo_loss,
    kto_loss,
    orpo_loss,
    ppo_loss,
    reinforce_loss,
    reward_loss,
    score_completions,
    token_log_probabilities,
)

WORDS = "the cat sat on a mat dog ran far away and now it is good bad".split()
PAIRS = [
    {"prompt": "the cat", "chosen": " sat on a mat", "rejected": " ran", "margin": 0.5},
    {"prompt": "a dog", "chosen": " ran far away", "rejected": " sat and now it is bad", "margin": 0.0},
    {"prompt": "now it is good and the mat", "chosen": " is far", "rejected": " is away on the cat", "margin": 1.5},
    {"prompt": "it", "chosen": " sat", "rejected": " is bad", "margin": -0.2},
]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def llama(seed: int, labels: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
        **({"num_labels": labels} if labels else {}),
    )
    return (LlamaForSequenceClassification if labels else LlamaForCausalLM)(config)


def common(folder) -> dict:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "bf16": False,
        "save_strategy": "no", "gradient_checkpointing": False,
    }


def first_batch(trainer) -> dict:
    return next(iter(trainer.get_train_dataloader()))


def tokens_of(model, ids, attention, completion, temperature=1.0):
    "(b, t - 1) ln P of each token after the first, where it belongs to a completion; and those places."
    states = model.model(ids, attention_mask=attention).last_hidden_state[:, :-1]
    counted = completion[:, 1:].bool()
    labels = ids[:, 1:].masked_fill(~counted, -100)
    return token_log_probabilities(states, model.lm_head.weight, labels, temperature=temperature, chunk=5), counted


def same_step(model, theirs, mine):
    "The losses and their gradients at every parameter agree to 1e-5."
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (mine, theirs)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
    assert any(gradient.abs().max() > 1e-3 for gradient in grads[0]), "the comparison must compare something"


@pytest.mark.parametrize("kind, mean", [("sigmoid", False), ("ipo", True)])
def test_pairs_equal_trl(kind, mean, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(**common(tmp_path), loss_type=kind, beta=0.3)
    data = Dataset.from_list([{k: pair[k] for k in ("prompt", "chosen", "rejected")} for pair in PAIRS])
    model, reference = llama(0), llama(1)
    trainer = DPOTrainer(model, reference, config, train_dataset=data, processing_class=tokenizer)
    batch = first_batch(trainer)
    args = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    tokens, counted = tokens_of(model, *args)
    before, _ = tokens_of(reference, *args)
    if mean:  # trl counts the completion's tokens, so do we
        assert counted.sum(1).equal(batch["completion_mask"].sum(1))
    scores = [score_completions(x, counted, mean).chunk(2) for x in (tokens, before.detach())]
    loss = {"sigmoid": dpo_loss, "ipo": ipo_loss}[kind]
    same_step(model, trainer.compute_loss(trainer.model, batch), loss(*scores[0], *scores[1], beta=0.3))


def test_kto_equals_trl(tokenizer, tmp_path):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    config = KTOConfig(**common(tmp_path), beta=0.4, desirable_weight=1.3, undesirable_weight=0.7)
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"], "label": i % 2 == 0} for i, pair in enumerate(PAIRS)]
    for seed in (0, 5):  # one where the point of reference is above 0, one where it is cut there
        model, reference = llama(seed), llama(1)
        data = Dataset.from_list(rows)
        trainer = KTOTrainer(model, reference, config, train_dataset=data, processing_class=tokenizer)
        batch = first_batch(trainer)
        args = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
        other = batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"]
        (tokens, counted), (before, _) = tokens_of(model, *args), tokens_of(reference, *args)
        (moved, marks), (moved0, _) = tokens_of(model, *other), tokens_of(reference, *other)
        ratios = score_completions(moved, marks) - score_completions(moved0, marks)
        labels = torch.as_tensor(batch["label"], dtype=torch.bool)
        scores = score_completions(tokens, counted), score_completions(before, counted).detach()
        mine = kto_loss(*scores, labels, ratios, 0.4, (1.3, 0.7))
        same_step(model, trainer.compute_loss(trainer.model, batch), mine)


def test_orpo_equals_trl(tokenizer, tmp_path):
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config = ORPOConfig(**common(tmp_path), beta=0.6, max_length=32)
    data = Dataset.from_list([{k: pair[k] for k in ("prompt", "chosen", "rejected")} for pair in PAIRS])
    model = llama(0)
    trainer = ORPOTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    batch = first_batch(trainer)
    scores = []
    for side in ("chosen", "rejected"):
        marks = batch[f"{side}_labels"] != -100
        tokens, counted = tokens_of(model, batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], marks)
        scores.append(score_completions(tokens, counted, mean=True))
    ids, attention = batch["chosen_input_ids"], batch["chosen_attention_mask"]
    states = model.model(ids, attention_mask=attention).last_hidden_state[:, :-1]
    labels = ids.masked_fill(attention == 0, -100)[:, 1:]
    nats = causal_cross_entropy(states, model.lm_head.weight, labels)
    same_step(model, trainer.compute_loss(trainer.model, batch), orpo_loss(*scores, nats, beta=0.6))


@pytest.mark.parametrize("centre, margin", [(None, False), (0.2, False), (0.2, True)])
def test_rewards_equal_trl(centre, margin, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(**common(tmp_path), center_rewards_coefficient=centre)
    keep = ("prompt", "chosen", "rejected", *(["margin"] if margin else []))
    data = Dataset.from_list([{k: pair[k] for k in keep} for pair in PAIRS])
    model = llama(0, labels=1)
    trainer = RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    batch = first_batch(trainer)
    margins = batch.get("margin")
    assert (margins is not None) == margin
    inputs = {k: v for k, v in batch.items() if k != "margin"}
    chosen, rejected = model(**inputs).logits.squeeze(-1).chunk(2)
    mine = reward_loss(chosen, rejected, margins, centre or 0.0)
    same_step(model, trainer.compute_loss(trainer.model, dict(batch)), mine)


@pytest.mark.parametrize("kind, average, unbiased", [("grpo", "sequence", True), ("bnpo", "token", False)])
def test_groups_equal_trl(kind, average, unbiased, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = llama(0)
    model.save_pretrained(tmp_path / "model")
    model = type(model).from_pretrained(tmp_path / "model")
    config = GRPOConfig(
        **common(tmp_path), num_generations=2, max_completion_length=6, beta=0.3, loss_type=kind, temperature=0.8,
        epsilon=0.2, epsilon_high=0.3, use_bias_correction_kl=unbiased,
    )
    given = []

    def reward(completions, **_):
        given.append([float(len(text)) for text in completions])
        return given[-1]

    data = Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS])
    trainer = GRPOTrainer(model, reward, config, train_dataset=data, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    prompts = [{"prompt": PAIRS[i // 2]["prompt"]} for i in range(4)]
    batch = trainer._generate_and_score_completions(prompts)
    advantages = group_advantages(torch.tensor(given[-1]).view(2, 2)).flatten()
    torch.testing.assert_close(batch["advantages"], advantages, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)  # tries of an older policy, ratios on both sides of the clip
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    marks = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)
    tokens, counted = tokens_of(model, ids, attention, marks, temperature=0.8)
    length = batch["completion_ids"].shape[1]
    tokens, counted = tokens[:, -length:], counted[:, -length:]
    old, far = (tokens.detach() + 0.4 * torch.randn(tokens.shape) for _ in range(2))
    batch |= {"advantages": torch.tensor([1.0, -1.0, 0.7, -0.3]), "old_per_token_logps": old, "ref_per_token_logps": far}
    mine = ppo_loss(tokens, old, batch["advantages"], counted, (0.2, 0.3), far, 0.3, "k3", unbiased, average)
    same_step(model, trainer.compute_loss(model, batch), mine)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_equals_trl(reverse, temperature):
    from trl.experimental.gkd import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    torch.manual_seed(0)
    states, weight = torch.randn(2, 7, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    taught, matrix = torch.randn(2, 7, 12), torch.randn(50, 12)
    counted = torch.rand(2, 7) < 0.6
    labels = torch.zeros(2, 7, dtype=torch.long).masked_fill(~counted, -100)
    logits, teacher = states @ weight.T, taught @ matrix.T
    by_gkd = GKDTrainer.generalized_jsd_loss(logits, teacher, labels, beta=float(reverse), temperature=temperature)
    by_chunks = _chunked_divergence_loss(states, taught, weight, matrix, counted, float(reverse), temperature=temperature)[0]
    mine = distillation_loss(logits, teacher, counted, temperature, reverse)
    few = chunked_distillation_loss(states, weight, taught, matrix, counted, temperature, reverse, chunk=3)
    for theirs in (by_gkd, by_chunks):  # trl leaves the square of the temperature out
        for ours in (mine, few):
            torch.testing.assert_close(ours, theirs * temperature**2, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(loss, [states, weight], retain_graph=True) for loss in (by_gkd * temperature**2, mine, few)]
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grads[2], grads[0], atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 12), v=st.sampled_from([3, 40, 1500]), chunk=st.none() | st.integers(1, 9),
    seed=st.integers(0, 2**16), temperature=st.floats(0.3, 3), bias=st.booleans(),
)
def test_tokens_in_chunks_equal_logits(n, v, chunk, seed, temperature, bias):
    torch.manual_seed(seed)
    known = [torch.randn(n, 6, requires_grad=True), torch.randn(v, 6, requires_grad=True)]
    known += [torch.randn(v, requires_grad=True)] if bias else []
    labels = torch.randint(0, v, (n,)).where(torch.rand(n) < 0.7, -100)
    whole = -token_losses(F.linear(*known) / temperature, labels)
    few = token_log_probabilities(*known[:2], labels, *(known[2:] or [None]), temperature, chunk)
    torch.testing.assert_close(few, whole, atol=1e-5, rtol=1e-5)
    pull = torch.randn(n)
    grads = [torch.autograd.grad((x * pull).sum(), known, allow_unused=True, materialize_grads=True) for x in (few, whole)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_gradcheck():
    torch.manual_seed(0)
    double = lambda *shape: torch.randn(*shape).double().requires_grad_()
    states, weight, matrix, taught = double(5, 3), double(7, 3), torch.randn(7, 4).double(), torch.randn(5, 4).double()
    counted, labels = torch.tensor([True, True, False, True, True]), torch.tensor([0, 6, -100, 2, 3])
    for reverse in (False, True):
        distil = lambda s, w, reverse=reverse: chunked_distillation_loss(s, w, taught, matrix, counted, 2.0, reverse, 2)
        assert torch.autograd.gradcheck(distil, (states, weight))
    assert torch.autograd.gradcheck(lambda s, w: token_log_probabilities(s, w, labels, chunk=2), (states, weight))
    good, bad = (-double(4).detach().abs() - 0.1 for _ in range(2))
    known = good.requires_grad_(), bad.requires_grad_()
    flags = torch.tensor([True, False, True, False])
    assert torch.autograd.gradcheck(lambda a, b: orpo_loss(a, b, a.sum()), known)
    assert torch.autograd.gradcheck(lambda a, b: reward_loss(a, b, b.detach() * 0 + 0.4, 0.3), known)
    before = torch.randn(4).double(), torch.randn(4).double()
    assert torch.autograd.gradcheck(lambda a, b: dpo_loss(a, b, *before), known)
    assert torch.autograd.gradcheck(lambda a, b: ipo_loss(a, b, *before), known)
    assert torch.autograd.gradcheck(lambda a: kto_loss(a, before[0], flags, before[1]), known[:1])
    tokens, old = double(3, 4), torch.randn(3, 4).double()
    marks = torch.rand(3, 4) < 0.7
    for average in ("sequence", "token"):
        clipped = lambda x, average=average: ppo_loss(
            x, old, torch.tensor([1.0, -1.0, 0.5]), marks, 0.2, old + 0.1, 0.3, average=average)
        assert torch.autograd.gradcheck(clipped, tokens)


def test_reinforce_is_weighted_cross_entropy():
    torch.manual_seed(0)
    states, weight = torch.randn(3, 4, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    labels, gains = torch.randint(0, 20, (3, 4)), torch.tensor([1.0, -2.0, 0.5])
    counted = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    tokens = token_log_probabilities(states, weight, labels.masked_fill(~counted, -100))
    mine = reinforce_loss(tokens, gains, counted, "token")
    other = weighted_cross_entropy(states, weight, labels, gains[:, None] * counted / counted.sum())
    torch.testing.assert_close(mine, other)
    grads = [torch.autograd.grad(loss, [states, weight]) for loss in (mine, other)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), size=st.floats(0.01, 3))
def test_divergence_estimates_are_right_on_average(seed, size):
    torch.manual_seed(seed)
    policy = torch.randn(4, 9).double().log_softmax(-1)
    reference = (policy + size * torch.randn(4, 9)).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum(-1)
    for kind in ("k1", "k3"):
        mean = (policy.exp() * divergence_estimates(policy, reference, kind)).sum(-1)
        torch.testing.assert_close(mean, exact)
    assert (divergence_estimates(policy, reference, "k3") >= 0).all()
    # the gradient of k2 on samples is that of the divergence itself
    logits = torch.randn(9).double().requires_grad_()
    shares = logits.log_softmax(-1)
    known = torch.autograd.grad((shares.exp() * (shares - reference[0])).sum(), logits, retain_graph=True)[0]
    half = torch.autograd.grad((shares.exp().detach() * divergence_estimates(shares, reference[0], "k2")).sum(), logits)[0]
    torch.testing.assert_close(known, half)


def test_nothing_to_learn_is_zero():
    states, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    nothing, labels = torch.zeros(2, 3, dtype=torch.bool), torch.full((2, 3), -100)
    tokens, none = token_log_probabilities(states, weight, labels), torch.zeros(0, requires_grad=True)
    logits, empty = states @ weight.T, torch.zeros(0, dtype=torch.bool)
    for loss in (
        distillation_loss(logits, torch.randn(2, 3, 9), nothing),
        chunked_distillation_loss(states, weight, states.detach(), weight.detach(), nothing),
        reinforce_loss(tokens, torch.ones(2), nothing), reinforce_loss(tokens, torch.ones(2), nothing, "token"),
        ppo_loss(tokens, tokens.detach() - 1, torch.ones(2), nothing, 0.2, tokens.detach() + 1, 0.5),
        ppo_loss(tokens, tokens.detach(), torch.ones(2), nothing, average="token"),
    ):
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, [states, weight], retain_graph=True))
    for loss in (
        dpo_loss(none, none, none, none), ipo_loss(none, none, none, none), reward_loss(none, none, none, 0.1),
        kto_loss(none, none, empty), orpo_loss(none, none, none.sum()),
    ):
        assert loss.item() == 0 and loss.requires_grad
    assert not group_advantages(torch.full((2, 3), 5.0)).any()


def test_extremes_stay_finite():
    far = torch.tensor([-1e4, 0.0, -1e-30, -50.0], requires_grad=True)
    for loss in (
        dpo_loss(far, far.flip(0), far.detach(), far.detach()), orpo_loss(far, far.flip(0), far.sum() * 0),
        orpo_loss(0 * far, far, far.sum() * 0), kto_loss(far, far.detach() - 1e4, far < -1), reward_loss(far, -far),
        ipo_loss(far, far.flip(0), far.detach(), far.detach()),
    ):
        assert loss.isfinite() and torch.autograd.grad(loss, far)[0].isfinite().all()
    wild = torch.tensor([[-1.0, math.nan, math.inf]], requires_grad=True)
    counted = torch.tensor([[True, False, False]])
    for average in ("sequence", "token"):
        loss = ppo_loss(wild, wild.detach(), torch.ones(1), counted, 0.2, wild.detach(), 0.1, average=average)
        loss = loss + reinforce_loss(wild, torch.ones(1), counted, average)
        assert loss.isfinite() and torch.autograd.grad(loss, wild)[0].isfinite().all()


def test_sixteen_bits_and_autocast():
    torch.manual_seed(0)
    states, weight = torch.randn(64, 16, requires_grad=True), (0.3 * torch.randn(50, 16)).requires_grad_()
    taught, matrix, labels = torch.randn(64, 24), 0.3 * torch.randn(50, 24), torch.randint(0, 50, (64,))
    losses = (
        lambda s, w: token_log_probabilities(s, w, labels, chunk=10).mean(),
        lambda s, w: chunked_distillation_loss(s, w, taught, matrix, chunk=10),
        lambda s, w: distillation_loss(s @ w.T, taught @ matrix.T, reverse=True),
    )
    for loss in losses:
        exact = torch.autograd.grad(loss(states, weight), [states, weight])
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(states, weight)
        rough = torch.autograd.grad(value, [states, weight])
        assert value.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in rough)
        for one, two in zip(rough, exact, strict=True):
            assert (one - two).norm() < 0.03 * two.norm()


def test_wrong_input():
    states, weight, labels = torch.randn(2, 3, 4), torch.randn(9, 4), torch.zeros(2, 3, dtype=torch.long)
    tokens, marks, gains, n = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(2), torch.zeros(4)
    logits = torch.zeros(2, 3, 9)
    for wrong in (
        lambda: token_log_probabilities(states, weight, labels[:1]), lambda: token_log_probabilities(states, weight, labels + 9),
        lambda: token_log_probabilities(states, weight, labels, temperature=math.nan),
        lambda: token_log_probabilities(states, weight, labels, chunk=0), lambda: score_completions(tokens, marks.long()),
        lambda: score_completions(tokens, marks[:1]), lambda: distillation_loss(logits, logits[..., :8]),
        lambda: distillation_loss(logits, logits, temperature=math.nan), lambda: distillation_loss(logits, logits, tokens),
        lambda: chunked_distillation_loss(states, weight, states, weight[:8]),
        lambda: chunked_distillation_loss(states, weight, states[:1], weight),
        lambda: chunked_distillation_loss(states, weight, states, weight, temperature=-1.0),
        lambda: reward_loss(n, n[:2]), lambda: reward_loss(n, n, n[:2]), lambda: reward_loss(tokens, tokens),
        lambda: dpo_loss(n, n, n, n[:1]), lambda: dpo_loss(n, n, n, n, beta=math.nan), lambda: ipo_loss(n, n, n, n, beta=0.0),
        lambda: kto_loss(n, n, n), lambda: kto_loss(n, n[:1], n > 0), lambda: orpo_loss(n, n[:1], n.sum()),
        lambda: orpo_loss(n, n, n.sum(), beta=-1.0), lambda: reinforce_loss(tokens, n, marks),
        lambda: reinforce_loss(tokens, gains, marks[:1]), lambda: reinforce_loss(tokens, gains, marks, "median"),
        lambda: ppo_loss(tokens, tokens[:1], gains, marks), lambda: ppo_loss(tokens, tokens, gains, marks, math.nan),
        lambda: ppo_loss(tokens, tokens, gains, marks, penalty=0.1),
        lambda: ppo_loss(tokens, tokens, gains, marks, 0.2, tokens, 0.1, "k4"),
        lambda: divergence_estimates(tokens, n), lambda: group_advantages(n), lambda: group_advantages(n[:, None]),
    ):
        with pytest.raises(InputError):
            wrong()
