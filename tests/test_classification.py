"""Classification under odd text, odd labels and damaged folders."""

import json
from collections import Counter

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.classification import (
    ClassifierSettings,
    TextClassifier,
    _count_pieces,
    _featurize,
    _hash_pieces,
    _hold_out,
    _loss,
    _named_pieces,
    _soften,
    choose_threshold,
    confidence_gap,
    explain_label,
    precision_recall,
    reliability,
    train_classifier,
)
from llmbook.core import CorruptFileError, InputError, SettingsError, seal

KITCHEN = ["chop the onion", "fry the bread", "corte a cebola", "asse o pão", "pica la cebolla", "hornea el pan"]
WORKSHOP = ["tighten the screw", "drill a hole", "aperte o parafuso", "lixe a tábua", "aprieta el tornillo", "lija la tabla"]
LABELS = ["kitchen"] * 6 + ["workshop"] * 6


@pytest.fixture(scope="module")
def small():
    return train_classifier(KITCHEN + WORKSHOP, LABELS, ClassifierSettings(buckets=2**12))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(max_size=40), min_size=1, max_size=6),
    st.integers(0, 4), st.integers(1, 5), st.integers(0, 3), st.integers(1, 60),
)
def test_array_form_equals_plain_form(texts, words, shortest, more, reads):
    chosen = ClassifierSettings(words=words, shortest=shortest, longest=shortest + more, reads=reads)
    hashes, owners = _hash_pieces(texts, chosen)
    for i, text in enumerate(texts):
        assert Counter(hashes[owners == i].tolist()) == Counter(h for _, h in _named_pieces(text, chosen))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=8))
def test_neighbours_do_not_matter(texts):
    chosen = ClassifierSettings()
    rows, values, offsets = _featurize(texts, chosen)
    for i, text in enumerate(texts):
        alone_rows, alone_values, _ = _count_pieces([text], chosen)
        assert (rows[offsets[i] : offsets[i + 1]] == alone_rows).all()
        assert (values[offsets[i] : offsets[i + 1]] == alone_values).all()


def test_blocks_give_what_one_block_gives():
    texts = [f"text {i} " * (i % 700) for i in range(150)]
    whole, blocks = _count_pieces(texts, ClassifierSettings()), _featurize(texts, ClassifierSettings())
    assert all((a == b).all() for a, b in zip(whole, blocks, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(), max_size=5))
def test_probabilities_are_probabilities(small, texts):
    chance = small.probabilities(texts)
    assert chance.shape == (len(texts), 2) and chance.dtype == numpy.float32
    assert numpy.isfinite(chance).all() and numpy.allclose(chance.sum(1), 1, atol=1e-5)
    assert small.predict(texts) == [small.labels[i] for i in chance.argmax(1)]


def test_gradient_is_that_of_the_loss():
    from llmbook.classification import _learn, _loss, _score, _soften

    texts, classes = ["red round apple"], numpy.array([1])
    chosen = ClassifierSettings(buckets=2**10, epochs=1, learning_rate=1e-3)
    features = _featurize(texts, chosen)
    weights, _ = _learn(features, classes, 3, chosen)
    loss = lambda table: _loss(_soften(_score(features, table, numpy.zeros(3, numpy.float32)), 1.0), classes)
    place, step = (int(features[0][3]), 1), 1e-2
    up, down = numpy.zeros((2, 2**10, 3))
    up[place], down[place] = step, -step
    slope = (loss(up) - loss(down)) / (2 * step)
    assert weights[place] == pytest.approx(-1e-3 * slope, rel=1e-3)


def test_same_seed_same_classifier_and_order_of_names():
    one = train_classifier(KITCHEN + WORKSHOP, LABELS)
    two = train_classifier(KITCHEN + WORKSHOP, LABELS)
    assert (one.weights == two.weights).all() and one.labels == ("kitchen", "workshop")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_texts_calibrate_noisy_labels(seed):
    draw = numpy.random.default_rng(seed)
    truth = draw.integers(0, 2, 4000)
    words = ["".join(map(chr, row)) for row in draw.integers(97, 123, (3000, 5))]  # by them it learns the noise by heart
    texts = [f"{'tea cup' if y else 'iron bar'} {' '.join(draw.choice(words, 12))}" for y in truth]
    noisy = numpy.where(draw.random(4000) < 0.25, 1 - truth, truth)
    model = train_classifier(texts[:2000], [str(y) for y in noisy[:2000]], ClassifierSettings(epochs=8))
    chance, raw = model.probabilities(texts[2000:]), _soften(model.scores(texts[2000:]), 1.0)
    assert model.temperature > 2 and model.measured["texts"] == pytest.approx(1000, abs=3)
    assert model.measured["gap after"] < model.measured["gap before"]
    assert 0.6 < chance.max(1).mean() < 0.85  # one label in four is wrong
    assert confidence_gap(chance, noisy[2000:]) < 0.09 < 0.15 < confidence_gap(raw, noisy[2000:])
    assert _loss(chance, noisy[2000:]) < 0.7 * _loss(raw, noisy[2000:])


@pytest.mark.parametrize("count, parts, asked", [(40, 4, 40), (600, 4, 600), (2000, 2, 1000), (4000, 1, 1000), (20_000, 1, 2000)])
def test_few_texts_are_held_out_in_turn(count, parts, asked):
    classes = numpy.arange(count) % 2
    held = _hold_out(classes, ClassifierSettings())
    assert len(held) == parts and sum(held).max() == 1 and sum(held).sum() == pytest.approx(asked, abs=3)
    assert all(part[classes == 0].sum() == part[classes == 1].sum() for part in held)
    assert not _hold_out(classes, ClassifierSettings(held_out=0))
    assert len(_hold_out(classes, ClassifierSettings(held_out=0.5))) == min(parts, 2 if count < 2000 else 1)


def test_what_calibrates_is_learnt_from_unless_it_is_little():
    odd = ["zebra crossing"] * 3
    model = train_classifier(KITCHEN * 3 + WORKSHOP * 3 + odd, LABELS * 3 + ["zoo"] * 3)
    assert model.measured["texts"] >= 30 and model.predict(odd) == ["zoo"] * 3


def test_rare_labels_and_many_labels_are_learnt():
    words = [a + b for a in "ptkbdg" for b in ("amo", "eni", "iru", "ola", "uvo")]
    texts = [f"{words[i % 30]} again {words[i % 30]} {i}" for i in range(600)]
    model = train_classifier(texts, [f"label {i % 30}" for i in range(600)])
    assert model.predict([words[7], words[29]]) == ["label 7", "label 29"]


@pytest.mark.parametrize("texts, labels", [
    ([], []), (["a"], ["x"]), (["a", "b"], ["x", "x"]), (["a", "b"], ["x"]), ("ab", ["x", "y"]), ([1, "b"], ["x", "y"]),
    ([None, "b"], ["x", "y"]),
])
def test_nothing_to_tell_apart_is_refused(texts, labels):
    with pytest.raises(InputError, match="What to do"):
        train_classifier(texts, labels)


@pytest.mark.parametrize("wrong", [
    {"words": -1}, {"words": 0, "longest": 0}, {"shortest": 5}, {"buckets": 1000}, {"epochs": 0}, {"learning_rate": 0.0},
    {"learning_rate": float("nan")}, {"held_out": 0.9}, {"reads": 0},
])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SettingsError, match="out of range"):
        ClassifierSettings(**wrong)


def test_saved_and_read_back_and_refused_when_damaged(small, tmp_path):
    small.save(tmp_path / "c")
    again = TextClassifier.load(tmp_path / "c")
    assert again.settings == small.settings and again.temperature == small.temperature
    assert (again.probabilities(KITCHEN) == small.probabilities(KITCHEN)).all()
    about = tmp_path / "c" / "classifier.json"
    whole = about.read_text()
    about.write_text(whole[:-9])
    with pytest.raises(CorruptFileError, match="changed"):
        TextClassifier.load(tmp_path / "c")
    about.write_text(json.dumps({"labels": ["a", "b"]}))
    seal(tmp_path / "c")  # sealed again by somebody, and still no classifier
    with pytest.raises(CorruptFileError, match="no classifier"):
        TextClassifier.load(tmp_path / "c")
    with pytest.raises(CorruptFileError):
        TextClassifier.load(tmp_path / "nothing")


def test_thresholds_against_counting():
    draw = numpy.random.default_rng(1)
    scores, truth = draw.integers(0, 9, 200) / 9, draw.random(200) < 0.4
    for threshold, precision, recall in zip(*precision_recall(scores, truth), strict=True):
        passes = scores >= threshold
        assert precision == pytest.approx(truth[passes].mean())
        assert recall == pytest.approx((passes & truth).sum() / truth.sum())
    assert choose_threshold([0.9, 0.8, 0.7], [True, False, True], 1.0) == 0.9
    assert choose_threshold([0.9, 0.8], [False, True], 1.0) == float("inf")
    with pytest.raises(InputError, match="at least one of them true"):
        precision_recall([0.1, 0.2], [False, False])


def test_reliability_counts_every_text():
    draw = numpy.random.default_rng(2)
    chance = draw.dirichlet([1, 1, 1], 500)
    confidence, accuracy, count = reliability(chance, draw.integers(0, 3, 500))
    assert count.sum() == 500 and (confidence >= 1 / 3).all() and ((accuracy >= 0) & (accuracy <= 1)).all()


def test_explanation_adds_up(small):
    text = "fry the onion and the pão"
    every = explain_label(small, text, "kitchen", 10**6)
    score = small.scores([text])[0]
    assert sum(share for _, share in every) == pytest.approx(score[0] - score[1] - (small.bias[0] - small.bias[1]), abs=1e-4)
    assert explain_label(small, "", "kitchen") == []
