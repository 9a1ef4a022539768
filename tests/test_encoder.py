"""Embeddings held against the libraries they replace, and against damage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.core import CorruptFileError, InputError, SettingsError
from llmbook.encoder import (
    EncoderSettings,
    SentenceEncoder,
    build_encoder,
    cut_search_words,
    draw_weights,
    encode_texts,
    load_encoder,
    matryoshka_ranking,
    rank_right,
    save_encoder,
    summarise_ranks,
    train_search_tokenizer,
)
from llmbook.positions import apply_rotary, rotary_angles, sinusoidal_positions

settings.register_profile("calm", deadline=None)
settings.load_profile("calm")

ROOMS = "kitchen attic cellar garden library stable tower chapel".split()
THINGS = "kettle trunk barrel rake lexicon saddle bell organ".split()
PLACES = list(zip(ROOMS, THINGS, strict=True))
TEXTS = [f"The {thing} number {i} stands in the {room}." for i in range(12) for room, thing in PLACES]
STRANGE = ["", "   ", "...", "naïve Überraschung İstanbul 日本語 🙂", "copyFileObj HTTP_PROXY x86_64"]
STRANGE += ["É" * 300, "a" * 5000]


@pytest.fixture(scope="module")
def encoder():
    tokenizer = train_search_tokenizer([*TEXTS, *STRANGE], 400)
    found = SentenceEncoder(tokenizer, torch.zeros(1, 32))
    found.weights = draw_weights(*found.memory.look_up(TEXTS), tokenizer.get_vocab_size(), 32)
    return found


def write_corpus(folder: Path, pairs: bool = True) -> Path:
    folder.mkdir()
    empty = {"question": [], "document": []}
    for split, texts in (("train", TEXTS[:64]), ("validation", TEXTS[64:72]), ("test", TEXTS[72:])):
        ids = [f"{split}{i}" for i in range(len(texts))]
        rows = {"question": [f"where is the {' '.join(t.split()[1:4])}?" for t in texts], "document": ids}
        for name, columns in ((split, {"id": ids, "text": texts}), (f"pairs-{split}", rows if pairs else empty)):
            table = pyarrow.table({key: pyarrow.array(value, "string") for key, value in columns.items()})
            pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
    return folder


@given(st.text(st.characters(max_codepoint=127), max_size=120))
def test_words_are_cut_as_the_tokenizer_cuts_them(encoder, text):
    ids, _ = encoder.memory.look_up([text])
    assert ids.tolist() == encoder.tokenizer.encode(text, add_special_tokens=False).ids


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.sampled_from([2, 8, 64]), st.floats(10, 1e6), st.integers(0, 3000))
def test_rotary_scores_depend_on_the_distance_alone(t, width, base, shift):
    q, k = torch.randn(2, 1, 1, t, width, dtype=torch.float64)
    scores = []
    for begin in (0, shift):
        cos, sin = rotary_angles(torch.arange(t) + begin, width, base)
        scores.append(apply_rotary(q, cos, sin) @ apply_rotary(k, cos, sin).transpose(-1, -2))
    assert torch.allclose(*scores, atol=5e-2)


def test_rotary_takes_a_row_of_positions_per_text_and_keeps_the_number_format():
    x = torch.randn(2, 4, 5, 8)
    places = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    cos, sin = rotary_angles(places, 8)
    both = apply_rotary(x, cos[:, None], sin[:, None])
    for row in range(2):
        alone = apply_rotary(x[row : row + 1], *rotary_angles(places[row], 8))
        assert torch.allclose(both[row], alone[0])
    assert apply_rotary(x.bfloat16(), cos[0], sin[0]).dtype == torch.bfloat16
    x.requires_grad_()
    apply_rotary(x, cos[:, None], sin[:, None]).square().sum().backward()
    assert torch.allclose(x.grad, 2 * x, atol=1e-5), "turning keeps lengths, so this gradient is 2x"


def test_sinusoidal_positions_equal_the_formula():
    table = sinusoidal_positions(50, 12).double()
    for p in (0, 1, 49):
        for i in range(6):
            angle = torch.tensor(p / 10_000 ** (2 * i / 12), dtype=torch.float64)
            assert torch.allclose(table[p, 2 * i : 2 * i + 2], torch.stack((angle.sin(), angle.cos())), atol=1e-6)


def test_sentence_transformers_opens_the_folder_and_agrees(encoder, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    save_encoder(encoder, tmp_path / "encoder")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "encoder"), device="cpu", local_files_only=True)
    texts = [*TEXTS, *STRANGE]
    assert np.abs(theirs.encode(texts) - encode_texts(encoder, texts)).max() < 1e-5
    assert np.abs(encode_texts(theirs, texts, 8) - encode_texts(encoder, texts, 8)).max() < 1e-5
    theirs.save(str(tmp_path / "theirs"))
    assert np.abs(encode_texts(load_encoder(tmp_path / "theirs"), texts) - encode_texts(encoder, texts)).max() < 1e-6


def test_loss_and_gradient_equal_those_of_sentence_transformers():
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(model=torch.nn.Identity(), scale=20.0)
    pairs = [torch.randn(7, 12, requires_grad=True) for _ in range(2)]
    total = 0
    for width in (12, 6, 3):
        cut = [x[:, :width] for x in pairs]
        for order in (cut, cut[::-1]):
            total = total + loss.compute_loss_from_embeddings(order, None) / 6
    theirs = torch.autograd.grad(total, pairs)
    mine = matryoshka_ranking(*pairs, (12, 6, 3))
    assert torch.allclose(mine, total, atol=1e-5)
    for a, b in zip(torch.autograd.grad(mine, pairs), theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_ranks_equal_a_sort():
    random = np.random.default_rng(0)
    questions, passages = random.normal(size=(20, 4)), random.normal(size=(50, 4))
    right = random.integers(0, 50, 20)
    order = np.argsort(-questions @ passages.T, axis=1)
    expected = [list(row).index(mine) for row, mine in zip(order, right, strict=True)]
    assert rank_right(questions, passages, right).tolist() == expected
    assert rank_right(np.ones((1, 2)), np.ones((5, 2)), np.array([0])).tolist() == [4], "ties count against us"
    assert summarise_ranks(np.zeros(0, int)) == {"ndcg_10": 0.0, "recall_10": 0.0, "first": 0.0}


def test_stage_learns_and_repeats_itself(tmp_path):
    inputs = {"corpus": write_corpus(tmp_path / "corpus")}
    how = EncoderSettings(vocabulary=400, width=16, steps=15, batch=32, learning_rate=0.02)
    numbers = [build_encoder(how, inputs, tmp_path / name) for name in ("one", "two")]
    assert numbers[0] == numbers[1]
    assert numbers[0]["after"]["ndcg_10"] > numbers[0]["before"]["ndcg_10"]
    assert [numbers[0]["questions"], numbers[0]["passages"], numbers[0]["pairs"]] == [24, 96, 64]
    assert len(numbers[0]["curve"]) == 15 and list(numbers[0]["cut"]) == ["16", "8", "4"]
    json.dumps(numbers)
    a, b = (encode_texts(load_encoder(tmp_path / name), TEXTS) for name in ("one", "two"))
    assert np.array_equal(a, b) and a.dtype == np.float32
    assert np.allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)


def test_corpus_without_pairs_gives_an_untrained_encoder(tmp_path):
    inputs = {"corpus": write_corpus(tmp_path / "corpus", pairs=False)}
    numbers = build_encoder(EncoderSettings(vocabulary=300, width=16), inputs, tmp_path / "encoder")
    assert numbers["pairs"] == numbers["questions"] == 0 and numbers["curve"] == []
    assert encode_texts(load_encoder(tmp_path / "encoder"), ["kettle"]).shape == (1, 16)


def test_batches_and_their_size_change_nothing(encoder):
    texts = [*TEXTS, *STRANGE]
    whole = encode_texts(encoder, texts)
    assert np.allclose(whole, encode_texts(encoder, texts, batch=7), atol=1e-6)
    assert np.allclose(whole, np.concatenate([encode_texts(encoder, [text]) for text in texts]), atol=1e-6)
    assert encode_texts(encoder, []).shape == (0, 32)
    assert not encode_texts(encoder, ["", "..."]).any()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "modules.json"])
def test_damaged_folders_are_refused(encoder, tmp_path, name):
    save_encoder(encoder, tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CorruptFileError):
        load_encoder(tmp_path)


def test_bad_input_says_what_to_do(encoder, tmp_path):
    with pytest.raises(InputError, match="modules.json"):
        load_encoder(tmp_path)
    with pytest.raises(InputError, match="list of texts"):
        encode_texts(encoder, "text")
    with pytest.raises(InputError, match="1 to 32"):
        encode_texts(encoder, ["text"], 64)
    with pytest.raises(InputError, match="train.parquet"):
        build_encoder(EncoderSettings(), {"corpus": tmp_path}, tmp_path)
    for wrong in ({"width": 6}, {"steps": -1}, {"batch": 1}, {"learning_rate": 0.0}, {"vocabulary": 100}):
        with pytest.raises(SettingsError, match=f"encoder.{next(iter(wrong))}"):
            EncoderSettings(**wrong)
    save_encoder(SentenceEncoder(encoder.tokenizer, encoder.weights[:10]), tmp_path / "short")
    with pytest.raises(CorruptFileError, match="vectors for"):
        load_encoder(tmp_path / "short")


def test_search_words():
    words = "json dumps sort keys true v 2 10".split()
    assert cut_search_words("json.dumps(sortKeys=True) v2.10") == words


def test_opening_and_encoding_needs_neither_transformers_nor_sentence_transformers(encoder, tmp_path):
    save_encoder(encoder, tmp_path)
    code = (
        "import sys; from llmbook.encoder import load_encoder, encode_texts;"
        f"encode_texts(load_encoder({str(tmp_path)!r}), ['a kettle']);"
        "print([m for m in ('transformers', 'sentence_transformers', 'pandas', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"
