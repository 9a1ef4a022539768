"""Pictures and captions beyond the page: losses against transformers with gradients, resume, own sources, bad input."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmbook.core import CorruptFileError, InputError, SettingsError
from llmbook.optimisation import TrainSettings
from llmbook.pictures import (
    FORMS,
    PAINTS,
    TextImage,
    TextImageModel,
    TextImageSettings,
    Thing,
    classify,
    cut_patches,
    draw_exam,
    draw_pairs,
    draw_pictures,
    draw_scene,
    embed_pictures,
    embed_prompts,
    invent_scene,
    load_pictures,
    match_loss,
    mix_captions,
    number_captions,
    recall_pairs,
    save_pictures,
    score_exam,
)
from llmbook.tokenization import train_tokenizer
from llmbook.training import train


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(draw_pairs(np.random.default_rng(0), 500)[1], 360)


def build(tokenizer, **shape) -> TextImageModel:
    torch.manual_seed(0)
    small = {"vocabulary": len(tokenizer), "width": 32, "hidden": 48, "space": 16, "depth": 1}
    return TextImageModel(TextImageSettings(**small | shape))


def draw_vectors(n: int, d: int, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Vectors of any length that want gradients, and the same at length one."""
    torch.manual_seed(seed)
    known = [torch.randn(n, d, requires_grad=True) for _ in range(2)]
    return known, [F.normalize(vectors, dim=1) for vectors in known]


def same_with_gradients(mine: torch.Tensor, theirs: torch.Tensor, known: list[torch.Tensor]) -> None:
    torch.testing.assert_close(mine, theirs)
    both = (torch.autograd.grad(loss, known, retain_graph=True) for loss in (mine, theirs))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_scenes_are_decided_by_their_generator():
    for seed in range(20):
        one, other = (draw_pairs(np.random.default_rng(seed), 5, 0.5) for _ in range(2))
        assert np.array_equal(one[0], other[0]) and one[1] == other[1]
    without = [(c, f) for c in PAINTS for f in FORMS if (c, f) != ("red", "ring")]
    chance = np.random.default_rng(0)
    scenes = [invent_scene(chance, 2, without) for _ in range(20)]
    assert {(t.colour, t.form) for scene in scenes for t in scene} == {("red", "ring")}
    assert all(a.corner % 2 == 0 and b.corner % 2 == 1 for a, b in scenes)


@pytest.mark.parametrize("side", [8, 24, 33])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_lies_where_it_was_put(form, side):
    for corner in range(4):
        picture = draw_scene((Thing(form, "red", "large", corner),), np.random.default_rng(corner), side)
        assert picture.shape == (side, side, 3) and picture.dtype == np.float32 and 0 <= picture.min() <= picture.max() <= 1
        red = picture[..., 0] - picture[..., 1:].mean(-1) > 0.35
        rows, columns = np.nonzero(red)
        assert red.sum() >= 3 and (rows.mean() > side / 2, columns.mean() > side / 2) == (corner // 2 == 1, corner % 2 == 1)


def test_shares_of_wrong_captions():
    captions = [str(i) for i in range(4000)]
    for share in (0.0, 0.3, 1.0):
        mixed = mix_captions(captions, share, np.random.default_rng(0))
        changed = sum(a != b for a, b in zip(captions, mixed, strict=True))
        assert abs(changed / 4000 - share) < 0.03 and sorted(mixed) == sorted(captions)


def test_clip_is_transformers_loss_with_gradients():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    known, (pictures, texts) = draw_vectors(9, 5)
    scale, bias = torch.tensor([2.3], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    mine = match_loss(pictures, texts, scale, bias, torch.eye(9, dtype=torch.bool))
    theirs = image_text_contrastive_loss(texts @ pictures.T * scale.exp())
    same_with_gradients(mine, theirs, [*known, scale])


def test_siglip_is_transformers_model_loss():
    from transformers import SiglipConfig, SiglipModel

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shape | {"vocab_size": 50, "max_position_embeddings": 8, "projection_size": 32}
    library = SiglipModel(SiglipConfig(text_config=text, vision_config=shape | {"image_size": 24, "patch_size": 6})).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        library.logit_scale.fill_(2.0)
        library.logit_bias.fill_(-3.0)
        out = library(torch.randint(0, 50, (6, 8)), torch.rand(6, 3, 24, 24), return_loss=True)
    mine = match_loss(out.image_embeds, out.text_embeds, torch.tensor([2.0]), torch.tensor([-3.0]), torch.eye(6).bool(), "siglip")
    torch.testing.assert_close(mine, out.loss)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_twins_exert_no_force_on_each_other(kind):
    known, (pictures, texts) = draw_vectors(6, 4, seed=3)
    twins = torch.eye(6, dtype=torch.bool)
    twins[1, 4] = twins[4, 1] = True
    scale, bias = torch.tensor([1.5]), torch.tensor([-2.0])
    scores = pictures @ texts.T * math.exp(1.5)
    total = 0.0
    for i in range(6):
        kept = [j for j in range(6) if j == i or not twins[i, j]]
        if kind == "clip":
            total = total - (scores[i, i] - scores[i, kept].logsumexp(0)) / 2 - (scores[i, i] - scores[kept, i].logsumexp(0)) / 2
        else:
            total = total - sum(F.logsigmoid((scores[i, j] - 2) * (1 if i == j else -1)) for j in kept)
    mine = match_loss(pictures, texts, scale, bias, twins, kind)
    same_with_gradients(mine, total / 6, known)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_every_weight_in_training_has_a_gradient(tokenizer, kind):
    model, objective = build(tokenizer), TextImage(draw_pairs, tokenizer, 6, loss=kind)
    train_settings = TrainSettings(steps=2, precision="float32", device="cpu")  # after a step no matrix is zero any more
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(train_settings.steps):
        optimiser.zero_grad()
        objective.loss(model, objective.batch(step)).backward()
        optimiser.step()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    assert objective.loss(model, objective.batch(5)).isfinite() and model.log_scale.item() == pytest.approx(math.log(100))


def test_batches_do_not_depend_on_what_was_drawn_before(tokenizer):
    one, other = (TextImage(draw_pairs, tokenizer, 4, seed=3) for _ in range(2))
    torch.manual_seed(1)
    np.random.seed(1)
    first = one.batch(7)
    other.batch(0)
    again = other.batch(7)
    assert all(torch.equal(first[name], again[name]) for name in first) and one.count(first) == 4
    assert not torch.equal(first["pictures"], one.batch(8)["pictures"])
    different = TextImage(draw_pairs, tokenizer, 4, seed=4).batch(7)
    assert not torch.equal(first["pictures"], different["pictures"])


def test_padding_and_neighbours_change_nothing(tokenizer):
    model = build(tokenizer)
    short, long = "a red ring", "there is a tiny golden hoop at the lower right"
    with torch.no_grad():
        alone, beside = (model.encode_texts(*number_captions(tokenizer, texts, 32))[0] for texts in ([short], [short, long]))
    torch.testing.assert_close(alone, beside)
    pictures, _ = draw_pairs(np.random.default_rng(0), 5)
    torch.testing.assert_close(embed_pictures(model, pictures, rows=2), embed_pictures(model, pictures))


def test_patches_are_squares_row_by_row():
    picture = torch.arange(2 * 12 * 12 * 3).reshape(2, 12, 12, 3).float()
    cut = cut_patches(picture, 4)
    assert cut.shape == (2, 9, 48)
    assert torch.equal(cut[1, 5].reshape(4, 4, 3), picture[1, 4:8, 8:12])


def test_a_killed_training_goes_on_to_the_same_bits(tokenizer, tmp_path):
    settings = TrainSettings(steps=6, precision="float32", device="cpu", checkpoint_every=2)
    objective = TextImage(partial(draw_pairs, wrong=0.3), tokenizer, 8)
    whole = build(tokenizer)
    result = train(whole, objective, settings, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(model):
        stop.calls += 1
        if stop.calls == 5:
            raise Stopped
        return {}

    stop.calls = 0
    with pytest.raises(Stopped):
        train(build(tokenizer), objective, settings, tmp_path / "cut", stop, 1)
    rest = build(tokenizer)
    resumed = train(rest, objective, settings, tmp_path / "cut")
    assert resumed["resumed_from"] == 4 and result["targets"] == resumed["targets"] == 6 * 8
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


def test_colours_are_learnt_from_captions_alone(tokenizer, tmp_path):
    model = build(tokenizer)
    combinations = [(colour, form) for colour in PAINTS for form in FORMS]
    before = score_exam(model, tokenizer, combinations, each=6)
    settings = TrainSettings(steps=80, precision="float32", device="cpu")
    train(model, TextImage(draw_pairs, tokenizer, 24), settings, tmp_path)
    after = score_exam(model, tokenizer, combinations, each=6)
    assert before["colour"] < 0.45 and after["colour"] > 0.7


def test_own_pictures_and_own_shape(tokenizer):
    shape = TextImageSettings(vocabulary=len(tokenizer), side=16, patch=8, width=32, heads=4, depth=1)
    stock, words = np.random.default_rng(0).random((10, 16, 16, 3)), [f"my photograph {i}" for i in range(10)]

    def source(chance, count):
        picked = chance.permutation(10)[:count]
        return stock[picked], [words[i] for i in picked]

    model, objective = TextImageModel(shape), TextImage(source, tokenizer, 4, settings=shape)
    assert objective.loss(model, objective.batch(0)).isfinite()
    chances = classify(model, tokenizer, stock, ["a cat", "a dog", "uma árvore"], ["this is {}"])
    assert chances.shape == (10, 3)
    torch.testing.assert_close(chances.sum(1), torch.ones(10))


def test_recall_counts_equal_captions_as_right(tokenizer):
    model = build(tokenizer)
    pictures, _ = draw_pairs(np.random.default_rng(0), 6)
    same = recall_pairs(model, tokenizer, pictures, ["a ring"] * 6, at=(1, 6))
    assert all(way == {1: 1.0, 6: 1.0} for way in same.values())
    different = recall_pairs(model, tokenizer, pictures, [f"a ring {i}" for i in range(6)], at=(1, 6))
    assert all(way[6] == 1.0 and way[1] < 1.0 for way in different.values())
    texts = embed_prompts(model, tokenizer, [f"a ring {i}" for i in range(6)], ["{}"])
    best = (embed_pictures(model, pictures) @ texts.T).argmax(1)
    assert different["picture to caption"][1] == pytest.approx((best == torch.arange(6)).float().mean().item())


def test_a_folder_keeps_everything_and_tells_damage(tokenizer, tmp_path):
    model = build(tokenizer)
    save_pictures(model, tokenizer, tmp_path / "kept")
    again, its = load_pictures(tmp_path / "kept")
    assert again.settings == model.settings and its("a red ring")["input_ids"] == tokenizer("a red ring")["input_ids"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    weights = tmp_path / "kept" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CorruptFileError):
        load_pictures(tmp_path / "kept")


def test_wrong_input(tokenizer):
    model, chance = build(tokenizer), np.random.default_rng(0)
    good = np.zeros((2, 24, 24, 3), np.float32)
    ask = partial(classify, model, tokenizer)
    for wrong in (
        lambda: invent_scene(chance, 3), lambda: invent_scene(chance, 1, [(c, f) for c in PAINTS for f in FORMS]),
        lambda: Thing("hexagon", "red", "small", 0), lambda: Thing("ring", "red", "small", 4),
        lambda: draw_scene((), chance, 4), lambda: draw_pairs(chance, 0), lambda: draw_pairs(chance, 2, math.nan),
        lambda: draw_pairs(chance, 2, double=2.0), lambda: mix_captions(["a"], 1.5, chance),
        lambda: draw_exam([("pink", "ring")], 1), lambda: draw_exam([], 1), lambda: draw_exam([("red", "ring")], 0),
        lambda: draw_pictures([]), lambda: draw_pictures(good, ["one"]),
        lambda: ask(good[0], ["a ring"]), lambda: ask(good[:, :20], ["a ring"]), lambda: ask(good[:0], ["a ring"]),
        lambda: ask(good + 2, ["a ring"]), lambda: ask(good * math.nan, ["a ring"]),
        lambda: ask(good.astype(np.uint8), ["a ring"]),
        lambda: ask(good, []), lambda: ask(good, "a ring"), lambda: ask(good, ["a ring"], ["no place"]),
        lambda: ask(good, ["a ring"], []), lambda: ask(good, [""], ["{}"]), lambda: ask(good, ["a ring " * 99]),
        lambda: recall_pairs(model, tokenizer, good, ["one"]), lambda: recall_pairs(model, tokenizer, good, ["one", "two"], [3]),
        lambda: TextImage(lambda chance, rows: (good, ["one"]), tokenizer, 2).batch(0),
        lambda: number_captions(tokenizer, "a ring", 32),
    ):
        with pytest.raises(InputError):
            wrong()
    for wrong in (
        lambda: TextImage(draw_pairs, tokenizer, 1), lambda: TextImage(draw_pairs, tokenizer, 4, loss="cosine"),
        lambda: TextImageSettings(side=25), lambda: TextImageSettings(depth=0),
        lambda: TextImageModel(TextImageSettings(heads=3)),
    ):
        with pytest.raises(SettingsError):
            wrong()
