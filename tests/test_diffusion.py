"""Masked diffusion: the objective's arithmetic, the bound, uncovering in any order, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.architecture import Encoder, EncoderSettings
from llmbook.core import InputError, SettingsError, set_seed
from llmbook.diffusion import MaskedDiffusion, bound_nats, unmask
from llmbook.losses import diffusion_cross_entropy

MASK = 30


@pytest.fixture(scope="module", params=["modern", "bert"])
def model(request):
    set_seed(0)
    encoder = Encoder(EncoderSettings(31, 2, 16, 2, 24, 24, request.param)).eval()
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return encoder


@pytest.fixture(scope="module")
def rows():
    return MaskedDiffusion(np.random.default_rng(0).integers(0, 30, 4000), 24, 8, MASK, seed=5)


def test_the_loss_is_the_weighted_one_of_the_chapter_of_losses(model, rows):
    part = rows.batch(2)
    states = model.score(model.states(part["ids"]), logits=False)
    whole = diffusion_cross_entropy(
        states, model.output_weight, part["labels"], part["hidden"], part["rates"], output_bias=model.output_bias)
    torch.testing.assert_close(rows.loss(model, part), whole)


def test_halves_of_a_batch_add_up(model, rows):
    part, total = rows.batch(7), 0.0
    for half in (slice(0, 3), slice(3, 8)):
        piece = {name: values[half] for name, values in part.items()}
        total = total + rows.loss(model, piece) * rows.count(piece) / rows.count(part)
    torch.testing.assert_close(rows.loss(model, part), total)


def test_gradients_reach_every_weight(model, rows):
    model.zero_grad()
    rows.loss(model, rows.batch(0)).backward()
    silent = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert silent == []


def test_batches_depend_on_seed_and_step_alone(rows):
    again = MaskedDiffusion(rows.windows.tokens, 24, 8, MASK, seed=5)
    for step in (9, 0, 400):
        one, other = rows.batch(step), again.batch(step)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(rows.batch(1)["hidden"], rows.batch(2)["hidden"])


def test_the_bound_of_a_model_of_frequencies_is_its_cross_entropy():
    shares = torch.tensor([0.5, 0.3, 0.2])

    class Frequencies:
        def states(self, ids):
            return torch.zeros(*ids.shape, 1)

        def score(self, states):
            return shares.log().expand(len(states), 3)

    ids = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 0]])
    truth = -shares.log()[ids].sum(1)
    torch.testing.assert_close(bound_nats(Frequencies(), ids, 9, draws=2000), truth, atol=0.08, rtol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.sampled_from(["sure", "random", "redo"]), st.sampled_from([0.0, 1.0]), st.data())
def test_uncovering_keeps_what_is_given_and_leaves_no_mask(steps, order, temperature, data):
    set_seed(1)
    model = Encoder(EncoderSettings(31, 1, 16, 2, 24, 24)).eval()
    ids = torch.randint(0, 30, (3, 12))
    wanted = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=3, max_size=3)))
    wanted[0, 4] = True
    frames = unmask(model, ids.masked_fill(wanted, MASK), MASK, steps, order, temperature, seed=2, banned=(3, 4))
    assert frames.shape == (steps + 1, 3, 12)
    assert torch.equal(frames[-1][~wanted], ids[~wanted])
    written = frames[-1][wanted]
    assert not torch.isin(written, torch.tensor([MASK, 3, 4])).any()
    hidden = (frames == MASK).sum(2)
    expected = torch.stack([wanted.sum(1)] + [(wanted.sum(1) * (steps - 1 - step)) // steps for step in range(steps)])
    assert torch.equal(hidden, expected)
    if order != "redo":
        assert ((frames[1:] == frames[:-1]) | (frames[:-1] == MASK)).all()


def test_same_seed_same_text(model):
    blank = torch.full((2, 10), MASK)
    assert torch.equal(unmask(model, blank, MASK, 5, seed=3), unmask(model, blank, MASK, 5, seed=3))
    assert not torch.equal(unmask(model, blank, MASK, 5, seed=3)[-1], unmask(model, blank, MASK, 5, seed=4)[-1])


def test_tokens_that_were_sure_can_be_hidden_again(model):
    frames = unmask(model, torch.full((8, 20), MASK), MASK, 10, "redo", seed=1)
    settled = (frames[:-1] != MASK) & (frames[1:] == MASK)
    assert settled.any()


@pytest.mark.parametrize(("change", "error"), [
    ({"order": "best"}, SettingsError), ({"steps": 0}, SettingsError), ({"temperature": -1.0}, SettingsError),
    ({"ids": torch.zeros(2, 5, dtype=torch.long)}, InputError), ({"ids": torch.full((5,), MASK)}, InputError),
])
def test_refusals(model, change, error):
    how = {"ids": torch.full((1, 5), MASK), "mask": MASK} | change
    with pytest.raises(error):
        unmask(model, **how)


def test_refusals_of_the_objective_and_the_bound(model):
    with pytest.raises(SettingsError, match="lowest"):
        MaskedDiffusion(np.arange(100), 8, 2, MASK, lowest=0.0)
    with pytest.raises(InputError, match="draws"):
        bound_nats(model, torch.zeros(1, 4, dtype=torch.long), MASK, draws=0)
