"""Tokenization on what a page should not carry: any bytes, long runs, kills, damage, other people's tokenizers."""

import itertools
import json
import os
import random
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_texts import TOPICS

from llmbook import tokenization
from llmbook.core import CorruptFileError, InputError, SettingsError
from llmbook.tokenization import (
    BytePairs,
    DocumentEncoder,
    EncodingSettings,
    TokenizerSettings,
    TokenShard,
    bpe_encode,
    build_tokenizer,
    byte_letters,
    encode_corpus,
    encode_plain,
    load_tokenizer,
    split_words,
    train_textbook_bpe,
    train_bpe,
    train_tokenizer,
)

TEXTS = TOPICS[:30]
STRANGE = "naïve façade Ωmega 日本語 🙂 İstanbul ß ſ '\u017f\u00a0x\u2028y"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*TEXTS, STRANGE], 1200)


@pytest.fixture(scope="module")
def ours():
    return BytePairs(train_bpe([*TEXTS, STRANGE], 1200))


@pytest.fixture
def corpus(tmp_path, tokenizer):
    (tmp_path / "corpus").mkdir()
    parts = {"train": [*TEXTS[:20], "", STRANGE, "<|endoftext|>"], "validation": TEXTS[20:25], "test": TEXTS[25:]}
    for split, texts in parts.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "corpus" / f"{split}.parquet")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokens").mkdir()
    return {name: tmp_path / name for name in ("corpus", "tokenizer")}, tmp_path / "tokens", parts


def reference_merges(texts, size):
    model = json.loads(train_tokenizer(texts, size).backend_tokenizer.to_str())["model"]
    return [tuple(pair) for pair in model["merges"]]


def spelt(merges):
    letters = byte_letters()
    return [tuple("".join(letters[byte] for byte in part) for part in pair) for pair in merges]


@given(st.binary(max_size=300))
def test_any_bytes_come_back(ours, data):
    assert ours.decode(ours.encode(data)) == data


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=120))
def test_any_text_comes_back_from_the_production_tokenizer(tokenizer, text):
    assert tokenizer.decode(encode_plain(tokenizer, [text])[0]) == text


@given(st.lists(st.one_of(st.text(st.characters(max_codepoint=127), max_size=80), st.text(max_size=20)), max_size=5))
def test_remembered_words_give_the_ids_of_the_library(tokenizer, texts):
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    ids, starts = DocumentEncoder(tokenizer).encode(texts)
    expected = [[*row, tokenizer.eos_token_id] for row in encode_plain(tokenizer, texts)]
    assert ids.tolist() == sum(expected, [])
    assert starts.tolist() == [sum(map(len, expected[:i])) for i in range(len(texts))]


@given(st.text(st.characters(max_codepoint=127), max_size=200))
def test_ours_encodes_ascii_as_the_library(tokenizer, ours, text):
    assert "".join(split_words(text)) == text
    assert ours.encode(text) == encode_plain(tokenizer, [text])[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab c", min_size=1, max_size=30), min_size=1, max_size=12), st.integers(1, 60))
def test_few_letters_and_many_ties_learn_the_same_merges(texts, extra):
    if not any(len(word) > 1 for text in texts for word in split_words(text)):
        return
    ours = dict.fromkeys(spelt(train_bpe(texts, 262 + extra)))
    assert set(ours) == set(reference_merges(texts, 262 + extra))


def test_textbook_and_library_and_ours_agree_on_real_text():
    merges = train_bpe(TEXTS, 800)
    assert spelt(merges) == reference_merges(TEXTS, 800)
    assert train_textbook_bpe([w.encode() for w in split_words(TEXTS[3])], 50) == train_bpe(TEXTS[3:4], 312)[:50]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60), max_size=4))
def test_ours_encodes_every_script_as_the_library(tokenizer, ours, texts):
    ids, _ = DocumentEncoder(tokenizer).encode(texts)
    assert ids.tolist() == [i for text in texts for i in [*ours.encode(text), 0]]
    assert [ours.encode(text) for text in texts] == encode_plain(tokenizer, texts)


HOSTILE = [
    "a\u0301\u0323" * 40, "👩\u200d👧\u200d👦🏽❤\ufe0f" * 9, "🇧🇷🇪🇸🏴\U000e0067\U000e007f", "\u00a0\u2003\u3000 \t\u200b\ufeff x",
    "\r\n\n \n\t\r", "<|endoftext|><|end|><|x|>", "'S'ſ'll'LL ’s", "1234567890" * 30, "-=" * 300, "日本語テキスト" * 50,
    "".join(chr(i) for i in range(0x3000) if not 0xD800 <= i < 0xE000 and chr(i).isprintable()),
]  # fmt: skip


def test_hostile_texts_come_back_with_the_ids_of_the_library(tokenizer, ours):
    random.seed(1)
    for _ in range(300):
        text = "".join(random.choices(HOSTILE, k=3))
        start = random.randrange(len(text))
        piece = text[start : start + 400]
        assert ours.decode(ours.encode(piece)).decode() == piece
        assert ours.encode(piece) == encode_plain(tokenizer, [piece])[0]
        torn = piece.encode()[1:-1] + random.randbytes(3)
        assert ours.decode(ours.encode(torn)) == torn


def test_long_words_are_encoded_as_by_the_heap(ours):
    random.seed(2)
    for _ in range(200):
        letters = random.choice(["ab", "the an", "-=", "etaoinshrdlu", "é日-a"])
        word = "".join(random.choices(letters, k=random.choice([1, 2, 3, 50, 1500]))).encode()
        word = random.choice([word, random.randbytes(len(word)), word[:1] * len(word)])
        assert ours.long.encode(word) == [ours.ids[part] for part in bpe_encode(word, ours.ranks)]


def test_a_piece_made_by_two_merges_goes_back_to_the_heap():
    joins = [("a", "a"), ("aa", "a"), ("aaa", "a"), ("aaaa", "b"), ("aa", "aa"), ("b", "aa")]
    twice = BytePairs([(left.encode(), right.encode()) for left, right in joins])
    went_back = 0
    for word in map(bytes, itertools.product(b"ab", repeat=9)):
        ids = twice.long.encode(word)
        went_back += ids is None
        assert ids in ([twice.ids[part] for part in bpe_encode(word, twice.ranks)], None)
    assert went_back and twice.long.encode(b"aaaab") is None
    long = b"aaaab" * 10_000
    assert twice.encode_word(long) == [twice.ids[part] for part in bpe_encode(long, twice.ranks)]


@pytest.mark.parametrize("bad", ["a\ud83d", "\ud800"])
def test_half_characters_are_refused_with_advice(tokenizer, ours, bad):
    by_library = lambda text: encode_plain(tokenizer, [text])  # noqa: E731
    by_memory = lambda text: DocumentEncoder(tokenizer).encode([text])  # noqa: E731
    for function in (ours.encode, by_library, by_memory):
        with pytest.raises(InputError, match="half a character"):
            function(bad)
    assert encode_plain(tokenizer, ["<|end|>"])[0][0] > 5  # the tokenizer is as it was


def test_any_number_of_workers_writes_the_same_shards(corpus, tmp_path):
    inputs, output, _ = corpus
    numbers = encode_corpus(EncodingSettings(batch=3, workers=1), inputs, output)
    (tmp_path / "two").mkdir()
    assert encode_corpus(EncodingSettings(batch=5, workers=2), inputs, tmp_path / "two") == numbers
    for path in output.glob("*.*"):
        if path.suffix in (".bin", ".npy"):
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("run", ["a", "-", " ", "\n", "\n ", "é", "ab", "'", "1"])
def test_no_quadratic_worst_case(ours, tokenizer, run):
    text = run * 100_000  # a quadratic encoder would be at it for hours
    assert ours.decode(ours.encode(text)).decode() == text
    assert tokenizer.decode(encode_plain(tokenizer, [text])[0]) == text


def test_template_refuses_an_unknown_role_and_keeps_the_system(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|end|><|user|>hi<|end|><|assistant|>"
    with pytest.raises(Exception, match="allowed: system, user, assistant"):
        tokenizer.apply_chat_template([{"role": "root", "content": "x"}])


def test_auto_tokenizer_opens_the_folder(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened(STRANGE).input_ids == load_tokenizer(tmp_path)(STRANGE).input_ids
    assert (opened.bos_token_id, opened.eos_token_id, opened.pad_token_id) == (0, 0, 1)
    assert opened.convert_tokens_to_ids(list(tokenization.SPECIAL_TOKENS)) == list(range(6))


def test_somebody_elses_tokenizer_encodes_a_corpus():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    other = Tokenizer(models.BPE(unk_token="[UNK]"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=["[UNK]", "</s>"]))
    other = PreTrainedTokenizerFast(tokenizer_object=other, eos_token="</s>")
    ids, starts = DocumentEncoder(other).encode(TEXTS[:3])
    assert ids.tolist() == [i for text in TEXTS[:3] for i in [*other(text).input_ids, 1]]
    assert len(starts) == 3


def test_shards_hold_every_document(corpus, tokenizer):
    inputs, output, parts = corpus
    numbers = encode_corpus(EncodingSettings(batch=7), inputs, output)
    for split, texts in parts.items():
        shard = TokenShard(output, split, tokenizer)
        ends = [*shard.documents[1:], len(shard)]
        found = [tokenizer.decode(shard.tokens[i : j - 1]) for i, j in zip(shard.documents, ends, strict=True)]
        assert found == texts
        assert set(shard.tokens[np.array(ends) - 1]) == {tokenizer.eos_token_id}
        assert shard.bytes == numbers[split]["bytes"] == sum(len(text.encode()) for text in texts)
    forged = shard.tokens[:]
    assert (np.array(TokenShard(output, "train").tokens) == 0).sum() == len(parts["train"])
    assert forged.dtype == np.dtype("<u2") and shard.vocabulary == len(tokenizer)


@pytest.mark.parametrize("name", ["train.bin", "train.documents.npy"])
@pytest.mark.parametrize("damage", ["truncate", "extend", "delete"])
def test_damaged_shards_are_refused_and_mended(corpus, name, damage):
    inputs, output, _ = corpus
    encode_corpus(EncodingSettings(), inputs, output)
    path, whole = output / name, (output / name).read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(whole[:-2] if damage == "truncate" else whole + b"00")
    with pytest.raises(CorruptFileError, match=name):
        TokenShard(output, "train")
    encode_corpus(EncodingSettings(), inputs, output)
    assert path.read_bytes() == whole


def test_resume_keeps_whole_splits_but_not_those_of_another_tokenizer_or_text(corpus, monkeypatch):
    inputs, output, _ = corpus
    written = []
    write = tokenization.write_shard

    def dies_at_test(tokenizer, batches, folder, split, workers):
        if split == "test" and not written.count("test"):
            written.append("test")
            raise KeyboardInterrupt
        written.append(split)
        return write(tokenizer, batches, folder, split, workers)

    monkeypatch.setattr(tokenization, "write_shard", dies_at_test)
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(EncodingSettings(), inputs, output)
    encode_corpus(EncodingSettings(), inputs, output)
    assert written == ["train", "validation", "test", "test"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["new"]}), inputs["corpus"] / "validation.parquet")
    encode_corpus(EncodingSettings(), inputs, output)
    assert written[4:] == ["validation"]
    train_tokenizer(TEXTS, 400).save_pretrained(inputs["tokenizer"])
    encode_corpus(EncodingSettings(), inputs, output)
    assert written[5:] == ["train", "validation", "test"]
    assert TokenShard(output, "train").vocabulary == 400


def test_bad_input_says_what_to_do(corpus, tmp_path, tokenizer):
    inputs, output, _ = corpus
    with pytest.raises(SettingsError, match="262 or more"):
        TokenizerSettings(vocabulary=261)
    with pytest.raises(SettingsError):
        EncodingSettings(batch=0)
    for train in (train_bpe, train_tokenizer):
        with pytest.raises(InputError, match="no text"):
            train([], 300)
    with pytest.raises(InputError, match="no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no meta.json"):
        TokenShard(tmp_path, "train")
    empty = pyarrow.table({"text": pyarrow.array([], "string")})
    pyarrow.parquet.write_table(empty, inputs["corpus"] / "train.parquet")
    with pytest.raises(InputError, match="no text"):
        build_tokenizer(TokenizerSettings(), inputs, output)
    with pytest.raises(InputError, match="training split is empty"):
        encode_corpus(EncodingSettings(), inputs, output)
    with pytest.raises(InputError, match="train.parquet"):
        build_tokenizer(TokenizerSettings(), {"corpus": tmp_path / "nowhere"}, output)


def test_sample_limits_what_is_learnt_from(corpus, tmp_path):
    inputs, _, parts = corpus
    (tmp_path / "small").mkdir()
    numbers = build_tokenizer(TokenizerSettings(300, sample_megabytes=0.02), inputs, tmp_path / "small")
    assert 0 < numbers["sample_bytes"] < sum(len(text) for text in parts["train"]) / 2
    assert numbers["vocabulary"] == 300 and 1 < numbers["bytes_per_token"] < 4


def test_import_is_light():
    heavy = ("torch", "transformers", "tokenizers", "pandas")
    code = f"import sys, llmbook.tokenization; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"


def test_large_vocabularies_take_four_bytes():
    assert tokenization.choose_integer(2**16) == "<u2" and tokenization.choose_integer(2**16 + 1) == "<u4"


def test_memory_of_words_is_bounded(tokenizer):
    encoder = DocumentEncoder(tokenizer)
    encoder.memory.capacity = 50
    random.seed(0)
    for _ in range(20):
        text = "".join(random.choice("abc ") for _ in range(400))
        assert encoder.encode([text])[0].tolist() == [*encode_plain(tokenizer, [text])[0], 0]
        assert len(encoder.memory.known) <= 50
