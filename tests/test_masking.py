"""Masked language modelling beyond its page: properties, transformers' words and losses, processes."""

import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.architecture import Encoder, EncoderSettings
from llmbook.bridge import save_model, to_transformers
from llmbook.core import InputError, SettingsError
from llmbook.masking import MaskedLanguage, Masking, Neighbours, choose_masking, fill_gaps
from llmbook.masking import find_continuations, group_words, guess_hidden, mask_tokens
from llmbook.masking import pseudo_perplexity, reserve_tokens
from llmbook.optimisation import TrainSettings
from llmbook.tokenization import encode_plain, train_tokenizer
from llmbook.training import load_checkpoint, train

TEXT = [
    "The quick (brown) fox_jumps over 12 lazy dogs; don't ask why.\n\n  Indented_text follows: x=3.5\n",
    "Programming languages differ: interpreters, compilers, half-open intervals [a, b).\n",
] * 5
MASKING = Masking(63, 64, special=(0, 1, 2))
SHAPE = EncoderSettings(64, 2, 32, 2, 48, 16)
SETTINGS = TrainSettings(steps=8, precision="float32", device="cpu", checkpoint_every=4)


def tokens() -> np.ndarray:
    "A stream with something to learn, with special tokens in it."
    return (np.cumsum(np.random.default_rng(0).integers(1, 4, 4000)) % 63).astype(np.uint16)


def learn(folder, how=SETTINGS, **options):
    "Train the tiny encoder in a folder."
    torch.manual_seed(1)
    model = Encoder(SHAPE)
    objective = MaskedLanguage(tokens(), 16, 8, MASKING, **options)
    return model, train(model, objective, how, folder, watch_every=4)


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(0.01, 0.99), hidden=st.floats(0, 1), rest=st.floats(0, 1), seed=st.integers(0, 2**31),
    special=st.sets(st.integers(0, 30), max_size=20), t=st.integers(1, 40),
)
def test_only_ordinary_tokens_are_chosen_and_drawn(rate, hidden, rest, seed, special, t):
    masking = Masking(31, 32, tuple(special), rate, hidden, (1 - hidden) * rest)
    ids = np.random.default_rng(seed).integers(0, 32, (4, t))
    seen, chosen = mask_tokens(ids, masking, np.random.default_rng(seed))
    again, _ = mask_tokens(ids, masking, np.random.default_rng(seed))
    assert (seen == again).all() and (seen[~chosen] == ids[~chosen]).all()
    assert not np.isin(ids[chosen], [*special, 31]).any()
    assert not (set(seen[chosen].tolist()) - {31}) & special


def test_shares_are_those_asked_for():
    masking, ids = Masking(999, 1000, rate=0.3, hidden=0.5, replaced=0.3), np.full((200, 500), 7)
    seen, chosen = mask_tokens(ids, masking, np.random.default_rng(0))
    fates = np.array([(seen[chosen] == 999).mean(), (~np.isin(seen[chosen], (7, 999))).mean()])
    assert abs(chosen.mean() - 0.3) < 0.01 and np.abs(fates - [0.5, 0.3]).max() < 0.015
    drawn = seen[chosen & (seen != 7) & (seen != 999)]
    assert len(set(drawn)) > 950 and drawn.max() == 998 and np.bincount(drawn).max() < 40


def test_words_are_runs_of_letters():
    tokenizer = reserve_tokens(train_tokenizer(TEXT, 300))
    tables = find_continuations(tokenizer)
    for text in TEXT[:2]:
        ids = np.array(encode_plain(tokenizer, [text]))
        words = group_words(ids, tables)
        groups = [tokenizer.decode(ids[0][words[0] == first]) for first in np.unique(words)]
        assert "".join(groups) == text
        lettered = [group.strip(" ([_'") for group in groups if re.search("[a-zA-Z]", group)]
        assert [re.sub("[^a-zA-Z]", "", word) for word in lettered] == re.findall("[a-zA-Z]+", text)


def test_letters_of_several_bytes_stay_in_their_word():
    texts = ["naïve café déjà‑vu, élève à l'école: été. " * 4] * 4
    tokenizer = reserve_tokens(train_tokenizer(texts, 264))  # hardly more than bytes
    ids = np.array(encode_plain(tokenizer, ["été élève"]))
    words = group_words(ids, find_continuations(tokenizer))[0]
    assert [tokenizer.decode(ids[0][words == first]) for first in np.unique(words)] == ["été", " ", "élève"]


def test_a_word_stays_together_and_ends_at_special_tokens():
    tokenizer = reserve_tokens(train_tokenizer(TEXT, 300))
    tables, end = find_continuations(tokenizer), tokenizer.eos_token_id
    row = np.array([[*encode_plain(tokenizer, ["lazy"])[0], end, *encode_plain(tokenizer, ["dogs"])[0]]])
    words = group_words(row, tables)[0]
    assert words[row[0].tolist().index(end) + 1] == row[0].tolist().index(end) + 1
    ids = np.array(encode_plain(tokenizer, ["".join(TEXT)])).repeat(50, 0)
    words = group_words(ids, tables)
    masking = choose_masking(tokenizer, 0.3)
    seen, chosen = mask_tokens(ids, masking, np.random.default_rng(0), words)
    assert (chosen == np.take_along_axis(chosen, words, 1)).all() and abs(chosen.mean() - 0.3) < 0.03
    hidden = seen == masking.mask
    assert (hidden == np.take_along_axis(hidden, words, 1)).all()


def test_word_pieces_are_grouped_as_transformers_does():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[MASK]", "un", "##like", "##ly", "like", "ly", ",", "real", "##s"]
    model = models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]",
                                        pad_token="[PAD]", unk_token="[UNK]")
    text = "unlikely like ly reals unlike likely real"
    found = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids = np.array([found["input_ids"]])
    theirs, _ = DataCollatorForLanguageModeling._calc_word_ids_and_prob_mask(
        np.array([found["offset_mapping"]]), np.array([found["special_tokens_mask"]]))
    ours = group_words(ids, find_continuations(tokenizer))
    assert (np.unique(ours, return_inverse=True)[1].ravel() == theirs.ravel() - 1).all()
    masking = choose_masking(tokenizer)
    assert masking.mask == 2 and set(masking.special) == {0, 1, 2}


@pytest.mark.parametrize("style", ["bert", "modern"])
def test_loss_and_gradients_are_those_of_transformers(style):
    torch.manual_seed(0)
    ours = Encoder(EncoderSettings(64, 3, 32, 2, 48, 40, style, window=6, global_every=2))
    theirs = to_transformers(ours)
    objective = MaskedLanguage(tokens(), 40, 6, replace(MASKING, rate=0.4))
    for step in range(3):
        part = objective.batch(step)
        loss = objective.loss(ours, part)
        other = theirs(input_ids=part["ids"], labels=part["labels"]).loss
        assert loss.item() == pytest.approx(other.item(), abs=1e-5)
    loss.backward(), other.backward()
    gradients = [sum(p.grad.square().sum().item() for p in model.parameters()) for model in (ours, theirs)]
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)


def test_parts_weigh_by_their_holes():
    torch.manual_seed(0)
    model, objective = Encoder(SHAPE), MaskedLanguage(tokens(), 16, 8, MASKING)
    batch = objective.batch(5)
    counts = [objective.count({name: values[i : i + 1] for name, values in batch.items()}) for i in range(8)]
    assert len(set(counts)) > 1, "rows with different numbers of holes"
    whole = objective.loss(model, batch)
    parts = 0.0
    for rows in (slice(0, 1), slice(1, 3), slice(3, 8)):
        part = {name: values[rows] for name, values in batch.items()}
        parts = parts + objective.loss(model, part) * objective.count(part) / objective.count(batch)
    torch.testing.assert_close(parts, whole)


def test_nothing_chosen_gives_zero_and_no_gradient():
    model, objective = Encoder(SHAPE), MaskedLanguage(tokens(), 16, 2, MASKING)
    part = objective.batch(0)
    part["labels"] = torch.full_like(part["labels"], -100)
    loss = objective.loss(model, part)
    loss.backward()
    assert loss.item() == 0 and objective.count(part) == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_two_runs_and_pieces_are_equal(tmp_path):
    one, first = learn(tmp_path / "one")
    two, second = learn(tmp_path / "two")
    pieces, _ = learn(tmp_path / "pieces", replace(SETTINGS, micro_batch=3))
    assert first["curve"] == second["curve"]
    for a, b, c in zip(one.parameters(), two.parameters(), pieces.parameters(), strict=True):
        assert torch.equal(a, b) and torch.allclose(a, c, atol=1e-3)


def test_two_processes_give_the_same_curve(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path / "two")]
    pair = [
        subprocess.Popen(command, env=os.environ | address | {"RANK": str(i), "LOCAL_RANK": str(i)},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in (0, 1)
    ]
    outputs = [process.communicate(timeout=600)[0].decode() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs[0][-3000:]
    model, one = learn(tmp_path / "one")
    two = json.loads(outputs[0].splitlines()[-1])
    losses = [[point["loss"] for point in curve[1:]] for curve in (one["curve"], two["curve"])]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and two["targets"] == one["targets"]
    saved = load_checkpoint(tmp_path / "two")[0]["learner"]
    for name, weight in model.named_parameters():
        assert torch.allclose(saved[f"model.{name}"], weight, atol=2e-3), name


def test_neighbours_count_as_a_dictionary_does():
    stream = np.random.default_rng(2).integers(0, 9, 600)
    counts, text = Neighbours(stream), stream.tolist()
    between = {}
    for left, middle, right in zip(text, text[1:], text[2:], strict=False):
        between.setdefault((left, right), Counter())[middle] += 1
    for (left, right), seen in between.items():
        best = int(counts.guess(np.array([left]), np.array([right]))[0])
        assert seen[best] == max(seen.values())
    assert Counter(text)[int(counts.guess(np.array([77]), np.array([88]))[0])] == max(Counter(text).values())


def test_a_saved_encoder_fills_gaps_in_transformers(tmp_path):
    from transformers import AutoTokenizer, pipeline

    tokenizer = reserve_tokens(train_tokenizer(TEXT, 300))
    torch.manual_seed(0)
    model = Encoder(EncoderSettings(len(tokenizer), 2, 32, 2, 64, 64, "bert")).eval()
    save_model(model, tokenizer, tmp_path)
    reader = AutoTokenizer.from_pretrained(tmp_path)
    assert reader.mask_token_id == tokenizer.mask_token_id
    fill = pipeline("fill-mask", str(tmp_path), tokenizer=reader, top_k=3)
    theirs = fill(f"The quick{tokenizer.mask_token} fox", tokenizer_kwargs={"add_special_tokens": False})
    ids = [*encode_plain(tokenizer, ["The quick"])[0], tokenizer.mask_token_id,
           *encode_plain(tokenizer, [" fox"])[0]]
    ours = fill_gaps(model, ids, tokenizer.mask_token_id)[0]
    assert [guess["token"] for guess in theirs] == [token for token, _ in ours]
    assert [guess["score"] for guess in theirs] == pytest.approx([share for _, share in ours], abs=1e-5)


def test_guesses_do_not_depend_on_the_rows_of_a_pass():
    torch.manual_seed(0)
    model = Encoder(SHAPE).eval()
    one, other = (guess_hidden(model, tokens()[:999], MASKING, rows=rows) for rows in (3, 50))
    assert all(np.allclose(one[name], other[name], atol=1e-5) for name in one)
    assert (one["truth"] != MASKING.mask).all() and len(one["truth"]) == len(one["left"])


@pytest.mark.parametrize("wrong, said", [
    ({"rate": 0}, "rate = 0"), ({"rate": 1}, "rate = 1"), ({"rate": float("nan")}, "rate = nan"),
    ({"hidden": 0.8, "replaced": 0.3}, "at most 1"), ({"hidden": -0.1}, "hidden = -0.1"),
    ({"special": tuple(range(64))}, "all special"), ({"mask": -1}, "mask = -1"),
])
def test_settings_name_what_is_wrong(wrong, said):
    with pytest.raises(SettingsError, match=re.escape(said)):
        replace(MASKING, **wrong)


def test_input_errors_say_what_to_do():
    model = Encoder(SHAPE)
    with pytest.raises(InputError, match="without ordinary tokens"):
        pseudo_perplexity(model, [0, 1], MASKING)
    with pytest.raises(InputError, match="without a mask"):
        choose_masking(train_tokenizer(TEXT, 300))
    with pytest.raises(InputError, match="at least 32 tokens"):
        MaskedLanguage(tokens()[:20], 16, 2, MASKING)
    with pytest.raises(InputError, match="up to 16"):
        fill_gaps(model, [5] * 20 + [63], 63)


if __name__ == "__main__":
    from pathlib import Path

    print(json.dumps(learn(Path(sys.argv[1]))[1]))
