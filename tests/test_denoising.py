"""Denoising beyond its page: every text comes back, T5's lengths and losses, writing as transformers does."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmbook.architecture import EncoderDecoder, EncoderDecoderSettings
from llmbook.bridge import to_transformers
from llmbook.core import InputError, SettingsError
from llmbook.denoising import Denoising, FutureNgrams, FutureStreams, Gap, Marks, SpanCorruption
from llmbook.denoising import choose_marks, count_spans, cut_gaps, draw_spans, fill_spans
from llmbook.denoising import find_sentence_ends, fit_lengths, infill, infill_text, look_near
from llmbook.denoising import pad_rows, permute_sentences, replace_spans, reserve_sentinels
from llmbook.denoising import score_by_length, score_infilling, write_greedily
from llmbook.losses import shift_right, token_losses
from llmbook.optimisation import TrainSettings
from llmbook.tokenization import encode_plain, train_tokenizer
from llmbook.training import train

MARKS = Marks(start=0, end=1, padding=0, sentinels=tuple(range(79, 59, -1)))
SHAPE = EncoderDecoderSettings(80, 2, 2, 32, 2, 48)
SETTINGS = TrainSettings(steps=6, precision="float32", device="cpu", checkpoint_every=3)


def tokens() -> np.ndarray:
    "A stream with something to learn."
    return (2 + np.cumsum(np.random.default_rng(0).integers(1, 4, 4000)) % 58).astype(np.uint16)


def build(**options) -> EncoderDecoder:
    "A tiny model with weights that differ from zero everywhere."
    torch.manual_seed(0)
    return EncoderDecoder(replace(SHAPE, **options)).eval()


@settings(max_examples=150, deadline=None)
@given(t=st.integers(2, 150), rate=st.floats(0.01, 0.99), mean=st.floats(1, 9), seed=st.integers(0, 2**31))
def test_inputs_and_targets_give_the_text_back(t, rate, mean, seed):
    chance, spans = np.random.default_rng(seed), count_spans(t, rate, mean)
    assume(spans[1] <= len(MARKS.sentinels))
    text = chance.integers(2, 60, (3, t))
    hidden = draw_spans(3, t, spans, chance)
    assert (hidden.sum(1) == spans[0]).all() and not hidden[:, 0].any() and hidden[:, -1].all()
    assert (np.diff(hidden.astype(int), axis=1) == 1).sum(1).tolist() == [spans[1]] * 3
    read, written = (replace_spans(text, cut, MARKS.sentinels) for cut in (hidden, ~hidden))
    assert read.shape[1] == t - spans[0] + spans[1] and written.shape[1] == sum(spans)
    for row, inputs, targets in zip(text, read, written, strict=True):
        assert fill_spans([*inputs, 1], [*targets, 1], MARKS) == row.tolist()
        used = [token for token in inputs.tolist() if token >= 60]
        assert used == list(MARKS.sentinels[: len(used)]) == [i for i in targets.tolist() if i >= 60]


def reference_lengths(inputs: int, density: float, mean: float) -> tuple[int, int]:
    "T5's `random_spans_helper`, restated: tokens of text, and of targets."
    def lengths(n: int) -> tuple[int, int]:
        noise = int(round(n * density))
        spans = int(round(noise / mean))
        return n - noise + spans + 1, noise + spans + 1

    n = inputs
    while lengths(n + 1)[0] <= inputs:
        n += 1
    return n, lengths(n)[1]


def test_lengths_are_those_of_t5():
    assert fit_lengths(512) == (568, 512, 114), "T5's published sizes"
    for context in (*range(32, 300), 512, 1024):
        for density, mean in ((0.15, 3.0), (0.3, 3.0), (0.15, 8.0)):
            text, read, written = fit_lengths(context, density, mean)
            assert (text, written) == reference_lengths(context, density, mean) and read <= context


def test_gaps_are_drawn_as_t5_draws_them():
    def segment(total: int, count: int, chance: np.random.Generator) -> np.ndarray:
        "T5's way: shuffle as many ones as borders among the places, count between them."
        first = chance.permutation(np.arange(total - 1) < count - 1)
        return np.bincount(np.concatenate([[0], first.cumsum()]))

    chance, n, spans = np.random.default_rng(0), 24, count_spans(24, 0.3, 2.0)
    theirs = np.zeros((4000, n), bool)
    for row in theirs:
        kept, cut = segment(n - spans[0], spans[1], chance), segment(spans[0], spans[1], chance)
        lengths = np.stack([kept, cut], 1).ravel()
        row[:] = np.repeat(np.arange(len(lengths)) % 2, lengths)
    ours = draw_spans(4000, n, spans, chance)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 4 * np.sqrt(0.5 / 4000)
    pairs = [Counter(map(bytes, rows)).most_common(1)[0][1] for rows in (ours, theirs)]
    assert max(pairs) < 60, "no pattern is preferred"


@settings(max_examples=150, deadline=None)
@given(t=st.integers(1, 120), rate=st.floats(0, 1), mean=st.floats(0.5, 9), seed=st.integers(0, 2**31))
def test_infilling_keeps_its_budget_and_the_order(t, rate, mean, seed):
    text = np.arange(t)
    read = infill_text(text, rate, mean, 999, np.random.default_rng(seed))
    kept = read[read != 999]
    assert len(kept) == t - round(rate * t) and (np.diff(kept) > 0).all()
    assert not ((read[1:] == 999) & (read[:-1] == 999)).any(), "masks do not stand side by side"


def test_span_lengths_follow_poisson():
    lengths = []
    for seed in range(300):
        read = infill_text(np.arange(400), 0.3, 3.0, -1, np.random.default_rng(seed))
        before, after = np.append(-2, read)[:-1], np.append(read[1:], 400)
        inner = (read == -1) & (before != -2) & (after != 400)
        lengths += (after[inner] - before[inner] - 1).tolist()
    shares = np.bincount(lengths, minlength=12)[:8] / len(lengths)
    poisson = np.exp(-3.0) * np.array([3.0**k / np.prod(np.arange(1, k + 1)) for k in range(8)])
    assert np.abs(shares - poisson).max() < 0.015


def test_sentences_are_only_shuffled():
    texts = ["One is here. Two comes then! Is three numpy.all? Yes.\n\nA list: a.b, c."] * 3
    tokenizer = train_tokenizer(texts, 300)
    ends, ids = find_sentence_ends(tokenizer), np.array(encode_plain(tokenizer, texts[:1])[0])
    seen = {tokenizer.decode(permute_sentences(ids, ends, np.random.default_rng(i))) for i in range(60)}
    assert len(seen) > 20
    for text in seen:
        assert sorted(text) == sorted(texts[0]) and "numpy.all" in text and "a.b, c." in text


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"gated": False, "tied": True}])
@pytest.mark.parametrize("kind", [SpanCorruption, Denoising])
def test_loss_and_gradients_are_those_of_t5(options, kind):
    ours, objective = build(**options), kind(tokens(), 40, 4, MARKS)
    theirs, part = to_transformers(ours), objective.batch(3)
    theirs.config.pad_token_id = theirs.config.decoder_start_token_id = MARKS.padding
    loss = objective.loss(ours, part)
    mask = part.get("mask", torch.ones_like(part["ids"], dtype=torch.bool)).long()
    other = theirs(input_ids=part["ids"], attention_mask=mask, labels=part["targets"]).loss
    assert loss.item() == pytest.approx(other.item(), abs=1e-5)
    loss.backward(), other.backward()
    sums = [sum(p.grad.square().sum().item() for p in model.parameters()) for model in (ours, theirs)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)


def test_writing_is_what_t5_generates():
    ours, rows = build(), [[5, 9, 79, 30, 1], [8, 8, 8, 1], [40, 79, 22, 11, 2, 3, 1]]
    ids = pad_rows(rows, MARKS.padding)
    mask = ids != 0
    written = write_greedily(ours, ids, MARKS, mask, limit=9)
    theirs = to_transformers(ours).generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=9, do_sample=False, num_beams=1,
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    for read, row, other in zip(rows, written, theirs[:, 1:].tolist(), strict=True):
        assert row == (other[: other.index(1)] if 1 in other else other)
        alone = [MARKS.start]
        for _ in row:  # without a cache, and without the other rows
            alone.append(int(ours(torch.tensor([read]), torch.tensor([alone]))[0, -1].argmax()))
        assert alone[1:] == row


def test_future_tokens_by_hand():
    model, objective = FutureStreams(build(), 3), SpanCorruption(tokens(), 40, 4, MARKS)
    part, weights = objective.batch(0), (1.0, 0.5, 0.25)
    part["targets"][1, -4:] = -100
    loss = FutureNgrams(objective, weights).loss(model, part)
    written, whole = shift_right(part["targets"], 0, 0), 0.0
    for later, (states, weight) in enumerate(zip(model(part["ids"], written), weights, strict=True)):
        shares = (states @ model.output_weight.T).log_softmax(-1)
        for row, targets in enumerate(part["targets"].tolist()):
            for place in range(len(targets) - later):
                if targets[place + later] >= 0:
                    whole -= weight * shares[row, place, targets[place + later]].item()
    assert loss.item() == pytest.approx(whole / int((part["targets"] >= 0).sum()), abs=1e-4)


def test_one_token_ahead_is_the_ordinary_loss():
    model = build()
    for objective in (SpanCorruption(tokens(), 40, 4, MARKS), Denoising(tokens(), 40, 4, MARKS)):
        part = objective.batch(1)
        future = FutureNgrams(objective, (1.0,)).loss(FutureStreams(model, 1), part)
        assert future.item() == pytest.approx(objective.loss(model, part).item(), abs=1e-5)


@pytest.mark.parametrize("name", ["spans", "denoising", "future"])
def test_two_runs_and_pieces_are_equal(tmp_path, name):
    objective = {"spans": SpanCorruption, "denoising": Denoising, "future": SpanCorruption}[name](
        tokens(), 24, 6, MARKS)
    models = []
    for folder, size in (("one", 0), ("two", 0), ("pieces", 4)):
        model, how = build(), replace(SETTINGS, micro_batch=size)
        if name == "future":
            model = FutureStreams(model, 2)
            for stream in model.streams:
                stream[1].gate_up.weight.data.fill_(0.01)
            train(model, FutureNgrams(objective), how, tmp_path / folder)
        else:
            train(model, objective, how, tmp_path / folder)
        models.append(dict(model.named_parameters()))
    for key, weight in models[0].items():
        assert torch.equal(weight, models[1][key]) and torch.allclose(weight, models[2][key], atol=1e-3)


def test_parts_weigh_by_their_targets():
    model, objective = build(), Denoising(tokens(), 24, 6, MARKS)
    batch = objective.batch(0)
    for row, cut in enumerate((3, 9, 1, 0, 20, 5)):
        batch["targets"][row, 24 - cut :] = -100
    for aim, learner in ((objective, model), (FutureNgrams(objective), FutureStreams(model, 2))):
        whole, parts = aim.loss(learner, batch), 0.0
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
            part = {name: values[rows] for name, values in batch.items()}
            parts = parts + aim.loss(learner, part) * aim.count(part) / aim.count(batch)
        torch.testing.assert_close(parts, whole)


def test_a_tokenizer_gets_sentinels_like_t5s():
    tokenizer = train_tokenizer(["some words to learn from, some more words"], 270)
    grown = reserve_sentinels(tokenizer, 5)
    marks = choose_marks(grown)
    assert len(grown) == len(tokenizer) + 5 and marks.sentinels == tuple(range(len(grown) - 1, len(tokenizer) - 1, -1))
    assert grown.convert_ids_to_tokens(marks.sentinels[0]) == "<extra_id_0>"
    assert marks.end != tokenizer.eos_token_id, "the end of a document may stand in a text"


def test_gaps_come_back_and_scores_count_them():
    gaps = cut_gaps(tokens(), 50, 32)
    assert all(len(g.left) + len(g.span) + len(g.right) == 32 and g.span for g in gaps)
    assert gaps == cut_gaps(tokens(), 50, 32) != cut_gaps(tokens(), 50, 32, seed=1)
    perfect = score_infilling([g.span for g in gaps], gaps)
    assert perfect == {"exact": 1.0, "tokens": 1.0}
    half = score_infilling([[7, 9], [1]], [Gap((1,), (7, 8), (2,)), Gap((1,), (1,), (2,))])
    assert half == {"exact": 0.5, "tokens": 2 / 3}
    spans = infill(build(), gaps[:5], MARKS, limit=4)
    assert len(spans) == 5 and all(len(span) <= 4 for span in spans)


def test_scores_by_length_add_up_to_the_whole():
    gaps = cut_gaps(tokens(), 200, 32)
    guesses = [gap.span if i % 3 else (59,) for i, gap in enumerate(gaps)]
    scores = score_by_length(guesses, gaps, 3)
    counts = Counter(min(len(gap.span), 3) for gap in gaps)
    whole = sum(scores[name] * counts[n] for n, name in ((1, "1"), (2, "2"), (3, "3+"))) / len(gaps)
    assert scores["exact"] == score_infilling(guesses, gaps)["exact"] == pytest.approx(whole)
    assert np.isnan(score_by_length([(1,)], [Gap((1,), (1,), (1,))], 2)["2+"])


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_heads_begin_at_their_neighbours_left_and_right_by_turns(heads):
    model = EncoderDecoder(replace(SHAPE, heads=heads, width=48))
    look_near(model)
    nearest = model.bias(9)[:, 4].argmax(-1).tolist()  # where each head looks from place 4 of 9
    assert nearest == ([3, 5] * heads)[:heads] or heads == 1 and nearest[0] in (3, 5)
    assert (model.decoder_bias(9)[:, 8].diff(dim=-1) > 0).all()
    if heads == 1:
        assert torch.equal(model.bias(9)[0, 4, :4], model.bias(9)[0, 4, 5:].flip(0)), "one head, both sides"


def test_a_whole_text_is_cut_where_it_is_likeliest():
    model, gaps = build(), cut_gaps(tokens(), 6, 24)
    spans = infill(model, gaps, MARKS, limit=5, whole=True)
    for gap, span in zip(gaps, spans, strict=True):
        read, new, nats = torch.tensor([[*gap.left, 79, *gap.right, 1]]), [], []
        for _ in range(6):
            row = torch.tensor([[*gap.left, *new, *gap.right[:4]]])
            nats.append(token_losses(model(read, shift_right(row, 0, 0)), row).sum().item())
            new.append(int(model(read, torch.tensor([[0, *gap.left, *new]]))[0, -1].argmax()))
            if new[-1] == MARKS.end:
                break
        written = [token for token in new[:5] if token != MARKS.end]
        assert list(span) == written[: 1 + int(np.argmin(nats[1 : len(written) + 1]))]
    with pytest.raises(InputError, match="left sides of different lengths"):
        infill(model, [Gap((1, 2), (3,), (4,)), Gap((1,), (3,), (4,))], MARKS, whole=True)


@pytest.mark.parametrize("action, said", [
    (lambda: count_spans(10, 0.0), "rate 0.0"), (lambda: count_spans(10, 1.0), "rate 1.0"),
    (lambda: count_spans(10, float("nan")), "rate nan"), (lambda: count_spans(10, 0.15, 0.5), "mean 0.5"),
    (lambda: count_spans(1), "1 tokens"), (lambda: fit_lengths(2), "context = 2"),
    (lambda: SpanCorruption(tokens(), 512, 2, MARKS), "28 gaps in 568 tokens, 20 sentinels"),
    (lambda: SpanCorruption(tokens()[:60], 64, 2, MARKS), "60 tokens of text"),
    (lambda: Denoising(tokens(), 32, 2, MARKS, infill=1.0), "infill = 1.0"),
    (lambda: Denoising(tokens(), 32, 2, MARKS, infill=0.0), "some damage"),
    (lambda: Denoising(tokens(), 32, 2, MARKS, delete=-0.1), "delete = -0.1"),
    (lambda: Marks(0, 1, 0, (1, 2)), "different ids"), (lambda: Marks(0, 1, 0, ()), "one sentinel"),
    (lambda: FutureStreams(build(), 0), "ahead = 0"),
    (lambda: FutureNgrams(SpanCorruption(tokens(), 32, 2, MARKS), (0.0, 1.0)), "the first above 0"),
    (lambda: FutureNgrams(SpanCorruption(tokens(), 32, 2, MARKS), ()), "the first above 0"),
    (lambda: reserve_sentinels(None, 0), "0 sentinels"), (lambda: cut_gaps(tokens()[:10], 3), "10 tokens"),
    (lambda: choose_marks(train_tokenizer(["a word, a word, a word"], 270)), "without sentinels"),
])
def test_errors_say_what_was_given(action, said):
    with pytest.raises((InputError, SettingsError), match=re.escape(said)):
        action()


def test_streams_and_weights_have_to_match():
    part = (objective := SpanCorruption(tokens(), 32, 2, MARKS)).batch(0)
    with pytest.raises(InputError, match="2 weights"):
        FutureNgrams(objective).loss(FutureStreams(build(), 3), part)


def test_losses_of_the_writer_are_token_losses():
    model, objective = build(), SpanCorruption(tokens(), 32, 4, MARKS)
    part = objective.batch(0)
    written = shift_right(part["targets"], MARKS.start, MARKS.padding)
    by_token = token_losses(model(part["ids"], written), part["targets"])
    assert objective.loss(model, part).item() == pytest.approx(by_token.mean().item(), abs=1e-5)
