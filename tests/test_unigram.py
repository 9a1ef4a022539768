"""Unigram on what a page should not carry: any bytes, all cuts counted one by one, the libraries' cuts, long words."""

import itertools
import json
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_texts import FOREIGN, TOPICS

from llmbook.core import InputError, SettingsError
from llmbook.subwords import PieceList, WordPiece, find_unknown, train_wordpiece
from llmbook.tokenization import (
    SPECIAL_TOKENS,
    DocumentEncoder,
    encode_plain,
    load_tokenizer,
    train_tokenizer,
)
from llmbook.unigram import (
    Unigram,
    _Lattice,
    _Letters,
    export_tokenizer,
    import_tokenizer,
    split_spaced,
    train_subwords,
    train_unigram,
)

# code points that no character has yet are left out: which of them are letters differs from library to library
TEXT = st.text(alphabet=st.one_of(st.sampled_from("abestinu \n▁<0x41>#"), st.characters(exclude_categories=["Cs", "Cn"])))
TOY = st.dictionaries(st.text("ab", min_size=1, max_size=4), st.floats(-9, -0.1), min_size=1).map(
    lambda scores: {"a": -2.0, "b": -2.5} | scores
)


@pytest.fixture(scope="module")
def ours():
    return Unigram(train_unigram([*TOPICS, FOREIGN], 2000))


@pytest.fixture(scope="module")
def shipped(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unigram")
    export_tokenizer(ours).save_pretrained(folder)
    return load_tokenizer(folder)


def all_cuts(word):
    longer = ([word[:i], *rest] for i in range(1, len(word)) for rest in all_cuts(word[i:]))
    return [*longer, [word]] if word else [[]]


def chances(scores, word, alpha=1.0):
    found = {tuple(cut): alpha * sum(scores[p] for p in cut) for cut in all_cuts(word) if all(p in scores for p in cut)}
    return found


@given(st.binary(max_size=300))
def test_any_bytes_come_back(ours, data):
    assert ours.decode(ours.encode(data)).encode("utf-8", "surrogateescape") == data


@given(TEXT)
def test_any_text_comes_back_and_the_library_gives_the_same_ids(ours, shipped, text):
    assert ours.decode(ours.encode(text)) == text
    if "▁" not in text:  # the library takes it for a space
        assert encode_plain(shipped, [text])[0] == ours.encode(text)
        assert shipped.decode(ours.encode(text)) == text


@given(TEXT)
def test_without_bytes_neighbours_without_a_piece_are_one_unknown(text):
    small = Unigram({"▁": -1.0, "a": -2.0, "an": -2.5, "s": -3.0}, byte_fallback=False)
    backend = export_tokenizer(small)
    text = text.replace("▁", "")
    assert encode_plain(backend, [text])[0] == small.encode(text)
    assert small.encode(text).count(small.unknown) == find_unknown(small, [text]).total()


@settings(max_examples=60, deadline=None)
@given(TOY, st.text("ab", min_size=1, max_size=8))
def test_viterbi_n_best_and_likelihood_equal_all_cuts(scores, word):
    tokenizer = Unigram({"▁": -1.0} | scores)
    exact = chances(tokenizer.scores, word)
    found = tokenizer.n_best(word, 10_000)
    assert [tuple(cut[1:]) for cut, _ in found if cut[0] == "▁"] and len(found) == len(exact)
    assert sorted(value + 1 for _, value in found) == pytest.approx(sorted(exact.values()), abs=1e-9)
    assert found[0][1] + 1 == pytest.approx(max(exact.values()), abs=1e-9)
    assert sum(tokenizer.scores[p] for p in tokenizer.pieces(word)) == pytest.approx(found[0][1], abs=1e-9)
    total = math.log(sum(map(math.exp, exact.values())))
    assert tokenizer.log_likelihood(word) + 1 == pytest.approx(total, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(TOY, st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=6))
def test_lattice_of_many_words_equals_all_cuts(scores, words):
    words, known = sorted(words, key=len, reverse=True), sorted(scores, key=len, reverse=True)
    used, likelihood = _Lattice(_Letters(words), _Letters(known)).expected(
        np.array([scores[piece] for piece in known]), np.arange(1.0, len(words) + 1)
    )
    expected, total = Counter(), 0.0
    for times, word in enumerate(words, 1):
        exact = {cut: math.exp(value) for cut, value in chances(scores, word).items()}
        total += times * math.log(sum(exact.values()))
        for cut, chance in exact.items():
            for piece in cut:
                expected[piece] += times * chance / sum(exact.values())
    assert likelihood == pytest.approx(total, abs=1e-9)
    assert used.tolist() == pytest.approx([expected[piece] for piece in known], abs=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 4.0])
def test_samples_follow_the_exact_posterior(alpha):
    tokenizer = Unigram({"▁": -1.0, "a": -1.5, "b": -2.0, "ab": -2.2, "ba": -3.0, "aba": -3.5, "bab": -4.5})
    exact = chances(tokenizer.scores, "ababa", alpha)
    total, draw, count = sum(map(math.exp, exact.values())), np.random.default_rng(1), 6000
    drawn = Counter(tuple(tokenizer.tokens[i] for i in tokenizer.sample("ababa", alpha, draw)[1:]) for _ in range(count))
    assert set(drawn) <= set(exact)
    wanted = {cut: count * math.exp(value) / total for cut, value in exact.items()}
    chi = sum((drawn[cut] - times) ** 2 / times for cut, times in wanted.items() if times > 5)
    cells = sum(times > 5 for times in wanted.values())
    assert chi < cells + 5 * math.sqrt(2 * cells)  # five standard deviations above the mean


def test_infinite_and_large_alpha_give_the_best_cut(ours):
    draw = np.random.default_rng(0)
    for text in (TOPICS[0][:400], FOREIGN, ""):
        assert ours.sample(text, math.inf, draw) == ours.encode(text)
        assert ours.decode(ours.sample(text, 0.1, draw)) == text
    tokenizer = Unigram({"▁": -1.0, "a": -1.0, "aa": -1.5, "b": -1.1})
    assert tokenizer.sample("aabaaab", 1e6, draw)[1:3] == tokenizer.encode("aabaaab")[1:3]


def test_training_is_sound_and_always_the_same(ours):
    assert sum(map(math.exp, ours.scores.values())) == pytest.approx(1, abs=1e-7)
    assert len(ours) <= 2000 and len(ours) > 1990
    assert train_unigram([*TOPICS, FOREIGN], 2000) == ours.scores
    assert max(map(len, ours.scores)) <= 16


def test_a_planted_piece_is_found_and_a_useless_one_is_not():
    draw = np.random.default_rng(0)
    stems, ends = ["kapo", "miru", "tesa", "lovi", "dune"], ["ba", "xil", "gorr"]
    words = [stems[i] + ends[j] for i, j in zip(draw.integers(0, 5, 3000), draw.integers(0, 3, 3000), strict=True)]
    scores = train_unigram([" ".join(words)], 263 + 40)
    assert {"▁" + stem for stem in stems} | set(ends) <= set(scores) or all("▁" + s + e in scores for s in stems for e in ends)
    assert Unigram(scores).encode(" ".join(words[:3]))


def test_vocabulary_goes_out_and_comes_back(ours, shipped):
    again = import_tokenizer(shipped)
    assert again.scores == ours.scores and again.tokens == ours.tokens
    ids, starts = DocumentEncoder(shipped).encode(TOPICS[:5])
    assert ids.tolist() == [i for text in TOPICS[:5] for i in [*ours.encode(text), 0]] and len(starts) == 5
    words = WordPiece(train_wordpiece(TOPICS, 1500), longest_word=50)
    back = import_tokenizer(export_tokenizer(words))
    assert back.tokens == words.tokens and back.longest_word == 50


def test_auto_tokenizer_opens_both_kinds(ours, tmp_path):
    from transformers import AutoTokenizer

    for name, tokenizer in (("unigram", ours), ("wordpiece", WordPiece(train_wordpiece(TOPICS, 1500)))):
        export_tokenizer(tokenizer).save_pretrained(tmp_path / name)
        opened = AutoTokenizer.from_pretrained(tmp_path / name)
        assert opened(TOPICS[3]).input_ids == tokenizer.encode(TOPICS[3])
        assert (opened.bos_token_id, opened.eos_token_id, opened.pad_token_id) == (0, 0, 1)
        assert opened.unk_token_id == tokenizer.unknown == 6
        text = opened.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert text == "<|user|>hi<|end|>"


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_the_library_trains_the_same_kinds(kind):
    found = train_subwords([*TOPICS, FOREIGN], kind, 1200)
    ours = import_tokenizer(found)
    assert 1000 < len(found) == len(ours) <= 1200
    assert encode_plain(found, TOPICS[:4]) == [ours.encode(text) for text in TOPICS[:4]]
    assert list(ours.tokens[:6]) == list(SPECIAL_TOKENS)


def test_special_tokens_and_bytes_cannot_be_forged(ours, shipped):
    for text in ("<|endoftext|><unk><0x41>", "<0x0A>", " <|end|>", "<s></s>"):
        ids = encode_plain(shipped, [text])[0]
        assert ids == ours.encode(text) and not set(ids) & set(range(7))
        assert shipped.decode(ids) == ours.decode(ids) == text


@pytest.mark.parametrize("run", ["a", "-", " ", "\n", "é", "ab", "the", "日"])
def test_no_quadratic_worst_case(ours, run):
    def took(times):
        best = math.inf
        for _ in range(2):
            tokenizer = Unigram(ours.scores)
            started = time.process_time()
            assert tokenizer.decode(tokenizer.encode(run * times)) == run * times
            best = min(best, time.process_time() - started)
        return best

    # ten times the text; a quadratic encoder takes a hundred times as long, in each of three tries
    assert any(took(40_000) < 60 * took(4_000) + 1 for _ in range(3))


def test_a_corpus_with_one_endless_word_is_learnt():
    scores = train_unigram(["x" * 50_000, "ab " * 500, "\n" * 3000], 300)
    assert Unigram(scores).decode(Unigram(scores).encode("ab xx\n\n")) == "ab xx\n\n"


def test_bad_input_says_what_to_do(ours):
    for texts in ([], [""]):
        with pytest.raises(InputError, match="no text"):
            train_unigram(texts)
        for kind in ("unigram", "wordpiece"):
            with pytest.raises(InputError, match="no text"):
                train_subwords(texts, kind)
    with pytest.raises(SettingsError, match="vocabulary"):
        train_unigram(TOPICS, 200)
    with pytest.raises(SettingsError, match="wordpiece, unigram"):
        train_subwords(TOPICS, "bpe")
    for scores in ({}, {"a": math.nan}, {"a": -math.inf}):
        with pytest.raises(InputError, match="no pieces"):
            Unigram(scores)
    for alpha in (-1.0, math.nan):
        with pytest.raises(SettingsError, match="alpha"):
            ours.sample("a", alpha, np.random.default_rng(0))
    with pytest.raises(SettingsError, match="count = 0"):
        ours.n_best("a", 0)
    with pytest.raises(InputError, match="half a character"):
        ours.encode("a\ud83d")
    with pytest.raises(InputError, match="a PieceList"):
        export_tokenizer(PieceList(["[UNK]"]))
    with pytest.raises(InputError, match="other rules"):
        import_tokenizer(train_tokenizer(TOPICS[:5], 300))


def test_cuts_are_those_of_sentencepiece_but_for_ties(ours):
    import sentencepiece
    import sentencepiece.sentencepiece_model_pb2 as model

    proto = model.ModelProto()
    proto.pieces.add(piece="<unk>", score=0, type=2)
    for piece, score in ours.scores.items():
        proto.pieces.add(piece=piece, score=score)
    proto.trainer_spec.model_type, proto.trainer_spec.vocab_size = 1, len(ours.scores) + 1
    proto.normalizer_spec.name, proto.normalizer_spec.add_dummy_prefix = "identity", False
    proto.normalizer_spec.remove_extra_whitespaces = False
    other = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    words = Counter(itertools.chain.from_iterable(map(split_spaced, TOPICS)))
    worth = lambda cut: sum(ours.scores[piece] for piece in cut)  # noqa: E731
    alike = 0
    for word, times in words.items():
        mine, theirs = ours.cut_word(word), other.encode(word, out_type=str)
        alike += times * (mine == theirs)
        assert mine == theirs or worth(mine) == pytest.approx(worth(theirs), abs=1e-4)
    assert alike > 0.999 * words.total()


def test_scores_survive_a_file_exactly(ours, tmp_path):
    export_tokenizer(ours).save_pretrained(tmp_path)
    rows = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert dict(map(tuple, rows[263:])) == ours.scores
