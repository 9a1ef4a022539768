"""Sentence encoder and small vectors, held against the libraries that do the same, and against damage."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook.core import CorruptFileError, InputError, SettingsError
from llmbook.compression import (
    CompactVectors,
    cut_vectors,
    hamming_distances,
    places_found,
    quantize_vectors,
    search_binary,
)
from llmbook.encoder import (
    WIDTH_SHARES,
    SentenceEncoderSettings,
    Pooling,
    SentenceEncoder,
    _library_loss,
    build_encoder,
    cut_search_words,
    draw_weights,
    encode_texts,
    grade_pairs,
    load_encoder,
    matryoshka_ranking,
    pool_states,
    rank_right,
    save_encoder,
    spearman_correlation,
    summarise_ranks,
    train_search_tokenizer,
    train_with_sentence_transformers,
)

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


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder of transformers, with random weights: a model without pooling."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for text in TEXTS for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words) + 2, max_position_embeddings=16, **size)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", get_args(Pooling))
@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_equals_sentence_transformers(how, side):
    from sentence_transformers.sentence_transformer.modules import Pooling as Library

    states = torch.randn(4, 6, 8)
    mask = (torch.arange(6) < torch.tensor([[6], [3], [1], [5]])).long()
    mask = mask.flip(1) if side == "left" else mask
    features = {"token_embeddings": states, "attention_mask": mask}
    theirs = Library(8, how)(features)["sentence_embedding"]
    assert torch.allclose(pool_states(states, mask, how), theirs, atol=1e-6)
    assert not pool_states(states, torch.zeros(4, 6), how).any(), "a text without tokens"


@pytest.mark.parametrize("how", get_args(Pooling))
def test_a_folder_of_transformers_is_an_encoder(bert, how):
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    fed = tokenizer(TEXTS[:9], padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**fed).last_hidden_state
    mine = torch.nn.functional.normalize(pool_states(states, fed["attention_mask"], how), dim=1).numpy()
    assert np.abs(encode_texts(load_encoder(bert, how), TEXTS[:9]) - mine).max() < 1e-5
    with pytest.raises(InputError, match="weightedmean"):
        load_encoder(bert, "sum")


def pairs_to_learn():
    return [" ".join(text.split()[1:4]) for text in TEXTS], TEXTS, np.arange(len(TEXTS))


@pytest.mark.parametrize("kind", ["static", "contextual"])
def test_the_library_trains_ours_and_any_other(encoder, bert, tmp_path, kind):
    questions, passages, right = pairs_to_learn()
    model = SentenceEncoder(encoder.tokenizer, encoder.weights[:, :16].clone()) if kind == "static" else load_encoder(bert)
    how = SentenceEncoderSettings(width=16, steps=20, batch=32, learning_rate=0.01)

    def loss():
        vectors = [torch.from_numpy(encode_texts(model, texts)) for texts in (questions, passages)]
        return matryoshka_ranking(*vectors, how.widths, shares=WIDTH_SHARES).item()

    before = loss()
    curve = train_with_sentence_transformers(model, questions, passages, right, how, tmp_path)
    assert [step for step, _ in curve] == list(range(1, 21)) and loss() < 0.8 * before
    with pytest.raises(SettingsError, match="encoder.width = 16"):
        train_with_sentence_transformers(model, questions, passages, right, SentenceEncoderSettings(), tmp_path)


def test_the_loss_of_the_library_on_a_batch_is_ours(encoder):
    from llmbook.encoder import _as_library

    questions, passages, _ = pairs_to_learn()
    how, model = SentenceEncoderSettings(width=32), _as_library(encoder)
    features = [model.preprocess(texts[:20]) for texts in (questions, passages)]
    theirs = _library_loss(model, how)(features, None)
    embed = lambda texts: encoder.embed(*(torch.from_numpy(x) for x in _bags(encoder, texts[:20])))
    mine = matryoshka_ranking(embed(questions), embed(passages), how.widths, None, how.scale, WIDTH_SHARES)
    assert abs(theirs.item() - mine.item()) < 1e-5


def _bags(encoder, texts):
    ids, offsets = encoder.memory.look_up(texts)
    return ids, offsets[:-1]


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=40))
def test_spearman_equals_scipy(pairs):
    from scipy.stats import spearmanr

    a, b = zip(*pairs, strict=True)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert spearman_correlation(a, b) == 0
    else:
        assert abs(spearman_correlation(a, b) - spearmanr(a, b).statistic) < 1e-9


def test_grades_are_what_the_symbols_say():
    symbols = [f"{module}.{name}" for module in ("tea", "cup", "tin.lid") for name in ("a", "b", "c", "c")]
    left, right, grade = grade_pairs(symbols, 50)
    assert sorted(np.unique(grade).tolist()) == [0, 1, 2]
    home = lambda row: symbols[row].rpartition(".")[0]
    for i, j, g in zip(left.tolist(), right.tolist(), grade.tolist(), strict=True):
        same = 2 if symbols[i] == symbols[j] else int(home(i) == home(j))
        assert same == g
    with pytest.raises(InputError, match="two modules"):
        grade_pairs(["alone"])
    for bad in (([1], [1]), ([1, 2], [1, 2, 3]), ([1, np.inf], [1, 2])):
        with pytest.raises(InputError, match="finite numbers"):
            spearman_correlation(*bad)


def test_ndcg_equals_scikit_learn():
    from sklearn.metrics import ndcg_score

    random = np.random.default_rng(3)
    questions, passages, right = random.normal(size=(30, 4)), random.normal(size=(40, 4)), random.integers(0, 40, 30)
    relevant = np.zeros((30, 40))
    relevant[np.arange(30), right] = 1
    mine = summarise_ranks(rank_right(questions, passages, right))["ndcg_10"]
    assert abs(mine - ndcg_score(relevant, questions @ passages.T, k=10)) < 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 40), st.integers(0, 10**6))
def test_bytes_and_bits_are_those_of_sentence_transformers(count, width, seed):
    from sentence_transformers.util.quantization import quantize_embeddings

    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    vectors[:, 0] = 0.25  # a column that never changes
    ranges = np.stack([vectors.min(0), vectors.max(0)])
    assert np.array_equal(quantize_vectors(vectors, "int8").codes, quantize_embeddings(vectors, "int8", ranges=ranges))
    bits = quantize_vectors(vectors, "binary")
    assert np.array_equal(bits.codes, quantize_embeddings(vectors, "ubinary"))
    assert np.array_equal(bits.restore() > 0, vectors > 0) and bits.nbytes == count * -(-width // 8)
    clipped = quantize_vectors(3 * vectors, "int8", ranges)
    assert clipped.codes.min() >= -128 and clipped.codes.max() <= 127


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 10**6))
def test_search_among_bits_is_exhaustive_when_deep(count, width, seed):
    random = np.random.default_rng(seed)
    stored, asked = random.normal(size=(count, width)), random.normal(size=(5, width)).astype(np.float32)
    bits, floats = quantize_vectors(stored, "binary"), quantize_vectors(stored, "float32")
    k = min(7, count)
    scores, rows = search_binary(asked, bits, k, count, floats)
    exact = asked @ floats.codes.T
    assert np.allclose(scores, -np.sort(-exact, axis=1)[:, :k], atol=1e-4)
    assert np.allclose(scores, np.take_along_axis(exact, rows, 1), atol=1e-4)
    signs = search_binary(asked, bits, k, count)[0]
    assert np.allclose(signs, -np.sort(-(asked @ bits.restore().T), axis=1)[:, :k], atol=1e-4)
    codes = quantize_vectors(asked, "binary").codes
    _, near = search_binary(asked, bits, k, k)
    distances = hamming_distances(codes, bits.codes)
    expected = (np.unpackbits(codes, axis=1)[:, None] != np.unpackbits(bits.codes, axis=1)[None]).sum(2)
    assert np.array_equal(distances, expected)
    assert np.array_equal(np.sort(np.take_along_axis(distances, near, 1)), np.sort(distances)[:, :k])


def test_small_vectors_refuse_what_they_cannot_hold():
    vectors = np.eye(4, 8)
    bits = quantize_vectors(vectors, "binary")
    assert len(bits) == 4 and isinstance(bits, CompactVectors)
    assert np.allclose(np.linalg.norm(cut_vectors(vectors + 1, 3), axis=1), 1) and not cut_vectors(np.zeros((1, 8)), 3).any()
    assert len(quantize_vectors(np.zeros((0, 8)), "binary")) == 0
    cases = [
        (quantize_vectors, (vectors, "int4"), "binary"), (quantize_vectors, (vectors[0], "int8"), "per row"),
        (quantize_vectors, (vectors * np.nan, "int8"), "finite"), (quantize_vectors, (vectors[:1], "int8"), "at least 2"),
        (quantize_vectors, (vectors, "int8", vectors[:3]), "(2, 8)"), (cut_vectors, (vectors, 0), "1 to 8"),
        (search_binary, (vectors, bits, 9), "1 to 4"), (search_binary, (vectors[:, :4], bits), "width"),
        (search_binary, (vectors, quantize_vectors(vectors, "int8")), "binary"),
        (search_binary, (vectors, bits, 2, 3, quantize_vectors(vectors[:2], "int8")), "same order"),
        (hamming_distances, (bits.codes, vectors), "uint8"), (places_found, (np.zeros((2, 3)), [1]), "per question"),
    ]
    for function, arguments, words in cases:
        with pytest.raises(InputError) as caught:
            function(*arguments)
        assert words in str(caught.value)


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
    how = SentenceEncoderSettings(vocabulary=400, width=16, steps=15, batch=32, learning_rate=0.02)
    numbers = [build_encoder(how, inputs, tmp_path / name) for name in ("one", "two")]
    assert numbers[0] == numbers[1]
    assert numbers[0]["after"]["ndcg_10"] > numbers[0]["before"]["ndcg_10"]
    assert [numbers[0]["questions"], numbers[0]["passages"], numbers[0]["pairs"]] == [24, 96, 64]
    assert len(numbers[0]["curve"]) == 15 and list(numbers[0]["cut"]) == ["16", "8", "4", "2"]
    json.dumps(numbers)
    a, b = (encode_texts(load_encoder(tmp_path / name), TEXTS) for name in ("one", "two"))
    assert np.array_equal(a, b) and a.dtype == np.float32
    assert np.allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)


def test_corpus_without_pairs_gives_an_untrained_encoder(tmp_path):
    inputs = {"corpus": write_corpus(tmp_path / "corpus", pairs=False)}
    numbers = build_encoder(SentenceEncoderSettings(vocabulary=300, width=16), inputs, tmp_path / "encoder")
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
        build_encoder(SentenceEncoderSettings(), {"corpus": tmp_path}, tmp_path)
    for wrong in ({"width": 12}, {"steps": -1}, {"batch": 1}, {"learning_rate": 0.0}, {"vocabulary": 100}):
        with pytest.raises(SettingsError, match=f"encoder.{next(iter(wrong))}"):
            SentenceEncoderSettings(**wrong)
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
