"""Subwords on what a page should not carry: the library's cuts on any words, ties, long words, bad input."""

import itertools
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_texts import FOREIGN, TOPICS

from llmbook.core import InputError, SettingsError
from llmbook.subwords import (
    SIMPLE,
    UNKNOWN_WORD,
    PieceList,
    WordPiece,
    find_unknown,
    list_pieces,
    read_bytes,
    spell_bytes,
    train_wordpiece,
)
from llmbook.tokenization import SPECIAL_TOKENS


@pytest.fixture(scope="module")
def ours():
    return WordPiece(train_wordpiece([*TOPICS, FOREIGN], 2000))


@pytest.fixture(scope="module")
def library(ours):
    from tokenizers import Tokenizer, models, pre_tokenizers

    found = Tokenizer(models.WordPiece(ours.ids, unk_token=UNKNOWN_WORD))
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return found


@pytest.mark.parametrize("kind", list(SIMPLE))
def test_simple_pieces_share_one_interface_and_count_what_they_do_not_know(kind):
    tokenizer = PieceList(list_pieces(TOPICS, kind, 500), kind)
    ids = tokenizer.encode(FOREIGN)
    unknown = find_unknown(tokenizer, [FOREIGN])
    assert all(0 <= i < len(tokenizer) == len(tokenizer.tokens) for i in ids)
    assert ids.count(tokenizer.unknown) == unknown.total()
    assert (unknown.total() == 0) == (kind == "byte")
    assert len(tokenizer) <= 500 and tuple(tokenizer.tokens[:6]) == SPECIAL_TOKENS
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


@given(st.binary(max_size=200))
def test_bytes_come_back_through_their_names(data):
    text = data.decode("utf-8", "surrogateescape")
    assert read_bytes(spell_bytes(text)).encode("utf-8", "surrogateescape") == data
    tokenizer = PieceList(list_pieces([], "byte"), "byte")
    assert tokenizer.decode(tokenizer.encode(text)).encode("utf-8", "surrogateescape") == data


def test_library_cuts_real_words_alike(ours, library):
    for line in "\n".join([*TOPICS, FOREIGN]).splitlines():
        assert ours.encode(line) == library.encode(line).ids


@given(st.text(alphabet=st.one_of(st.sampled_from("abcdefstinu#[]UNK -_"), st.characters(exclude_categories=["Cs", "Cn"]))))
def test_library_cuts_any_text_alike(ours, library, text):
    assert ours.encode(text) == library.encode(text).ids


@pytest.mark.parametrize("length", [99, 100, 101, 100_000])
def test_long_words_follow_the_stated_rule_and_stay_cheap(ours, library, length):
    for word in ("a" * length, "ab" * (length // 2), "statement" * (length // 9)):
        assert ours.encode(word) == library.encode(word).ids
    assert (ours.encode("a" * length) == [ours.unknown]) == (length > 100)
    patient = WordPiece(ours.tokens, longest_word=10**6)
    assert patient.decode(patient.encode("a" * length)) == "a" * length


def slow(counted, joins, least):
    """Counting again after each join, with the bare ratio."""
    words = {word: [word[0], *("##" + letter for letter in word[1:])] for word in counted}
    tokens = list(dict.fromkeys(piece for word in words.values() for piece in word))
    for _ in range(joins):
        single, pairs = Counter(), Counter()
        for word, times in counted.items():
            for piece in words[word]:
                single[piece] += times
            for pair in itertools.pairwise(words[word]):
                pairs[pair] += times
        place = {token: i for i, token in enumerate(tokens)}
        able = [pair for pair in pairs if pairs[pair] >= least]
        if not able:
            break
        a, b = min(able, key=lambda p: (-pairs[p] / (single[p[0]] * single[p[1]]), place[p[0]], place[p[1]]))
        if (new := a + b[2:]) not in place:
            tokens.append(new)
        for word, pieces in words.items():
            joined = []
            for piece in pieces:
                if joined[-1:] == [a] and piece == b:
                    joined[-1] = new
                else:
                    joined.append(piece)
            words[word] = joined
    return tokens


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=12), st.integers(1, 3))
def test_few_letters_and_many_ties_learn_what_counting_again_learns(words, least):
    counted = Counter(words)
    text = " ".join(itertools.chain.from_iterable([word] * times for word, times in counted.items()))
    found = train_wordpiece([text], 400, "ratio", least)[7:]
    assert found == slow(counted, len(found) + 50, least)[: len(found)] or found == slow(counted, 400, least)


def test_vocabulary_has_the_wanted_size_and_no_double():
    tokens = train_wordpiece(TOPICS, 1500)
    assert len(tokens) == len(set(tokens)) == 1500


def test_gain_is_worth_more_than_the_ratio():
    text = TOPICS[-1] + TOPICS[-2]
    length = {score: len(WordPiece(train_wordpiece(TOPICS[:-2], 1500, score)).encode(text)) for score in ("gain", "ratio")}
    assert length["gain"] < 0.8 * length["ratio"]


def test_special_tokens_cannot_be_forged(ours):
    random.seed(0)
    for _ in range(50):
        text = "".join(random.choices([*SPECIAL_TOKENS, " ", "x", "<|", "|>"], k=8))
        assert not set(ours.encode(text)) & set(range(len(SPECIAL_TOKENS)))
        assert re.sub(r"\s", "", ours.decode(ours.encode(text))) == re.sub(r"\s", "", text)


def test_bad_input_says_what_to_do():
    for texts in ([], [""], ["  \n"]):
        with pytest.raises(InputError, match="no text"):
            train_wordpiece(texts)
        with pytest.raises(InputError, match="no text"):
            list_pieces(texts, "word")
    with pytest.raises(SettingsError, match="a vocabulary of 10"):
        train_wordpiece(TOPICS, 10)
    with pytest.raises(SettingsError, match="gain or ratio"):
        train_wordpiece(TOPICS, 1000, "luck")
    with pytest.raises(SettingsError, match="1 or more"):
        train_wordpiece(TOPICS, 1000, "gain", 0)
    with pytest.raises(SettingsError, match="whitespace, word, character, byte"):
        list_pieces(TOPICS, "syllable")
    for tokens in (["a"], ["[UNK]", "a", "a"]):
        with pytest.raises(InputError, match="different tokens"):
            WordPiece(tokens)
    with pytest.raises(InputError, match="half a character"):
        spell_bytes("a\ud83d")
