"""What tokenizers cost: counts by hand, any tokenizer, planted tokens, and refusals."""

import io
import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbook import comparison as c
from llmbook.core import InputError, SettingsError
from llmbook.subwords import PieceList, WordPiece, list_pieces, train_wordpiece
from llmbook.tokenization import BytePairs, train_bpe, train_tokenizer
from llmbook.unigram import Unigram, export_tokenizer, train_unigram

DRAW = random.Random(5)
NAMES = "rio casa ponte livro água pão canção leitura viagem número campo jardim mañana corazón niño".split()
VERBS = "lê abre fecha guarda procura encontra escreve ouve espera cuenta sueña mira".split()


def talk(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    part = lambda: f"A {draw.choice(NAMES)} {draw.choice(VERBS)} o {draw.choice(NAMES)}, às {draw.randrange(24)} horas."
    return [" ".join(part() for _ in range(draw.randrange(2, 6))) for _ in range(count)]


LEARN, OTHER = talk(200, 0), talk(30, 1)
BYTES = PieceList(list_pieces([], "byte"), "byte")


class Every:
    "The least that a tokenizer can be: a letter is its code point."

    def encode(self, text):
        return [ord(letter) for letter in text]


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(LEARN, 400)


@pytest.fixture(scope="module")
def piece():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LEARN), model_writer=model, vocab_size=120, minloglevel=3, hard_vocab_limit=False,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


# one face


def test_every_kind_of_tokenizer_is_taken(bpe, piece):
    unigram = Unigram(train_unigram(LEARN, 400))
    pairs = [
        (bpe, bpe.backend_tokenizer), (BytePairs(train_bpe(LEARN, 400)), bpe), (unigram, export_tokenizer(unigram)),
    ]
    for one, other in pairs:
        assert c.encode_all(one, OTHER) == c.encode_all(other, OTHER)
        assert c.AnyTokenizer(one).size == c.AnyTokenizer(other).size
    assert c.encode_all(piece, OTHER) == [piece.encode(text) for text in OTHER]
    table = c.compare_tokenizers({"sp": piece, "least": Every(), "ours": unigram}, {"talk": OTHER})
    row = {r["tokenizer"]: r for r in table.rows}
    assert row["sp"]["vocabulary"] == piece.get_piece_size() and row["sp"]["comes back"] == 1
    assert row["least"]["vocabulary"] == "" and row["least"]["comes back"] == ""
    assert row["least"]["tokens"] == sum(map(len, OTHER))


def test_what_a_file_says_about_padding_and_special_tokens_is_set_aside(bpe):
    other = train_tokenizer(LEARN, 400)
    back = other.backend_tokenizer
    back.enable_truncation(3, stride=1)
    back.enable_padding(length=9, pad_id=1, pad_token="<|pad|>")
    back.post_processor = library.processors.TemplateProcessing("<|user|> $A", special_tokens=[("<|user|>", 3)])
    assert c.encode_all(other, OTHER) == c.encode_all(bpe, OTHER)
    assert back.truncation["max_length"] == 3 and back.padding["length"] == 9
    with pytest.raises(InputError):
        c.encode_all(other, ["\ud800"])
    assert back.truncation["stride"] == 1


def test_the_text_of_a_special_token_is_text(bpe):
    ids = c.encode_all(bpe, ["a <|end|> b"])[0]
    assert bpe.convert_tokens_to_ids("<|end|>") not in ids and c.decode_ids(bpe, ids) == "a <|end|> b"


def test_an_added_token_comes_back_and_counts(bpe):
    assert c.decode_ids(bpe, [0]) == "<|endoftext|>"


# measures


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=30), st.sampled_from([0, 0.5, 1, 2, 2.5, 3, 40, math.inf]))
def test_renyi_efficiency_is_its_formula(counts, alpha):
    p = np.array(counts) / sum(counts)
    with np.errstate(all="ignore"):
        entropy = {1: -(p * np.log2(p)).sum(), math.inf: -np.log2(p.max())}.get(alpha)
        entropy = np.log2((p**alpha).sum()) / (1 - alpha) if entropy is None else entropy
    found = c.renyi_efficiency(counts, alpha)
    assert found == pytest.approx(entropy / np.log2(len(counts)), rel=1e-6)
    assert -1e-12 <= found <= 1 + 1e-12
    assert found == pytest.approx(c.renyi_efficiency(Counter(dict(enumerate(counts))), alpha))
    assert c.renyi_efficiency(counts, alpha, 2 * len(counts)) <= found


def test_renyi_efficiency_falls_with_the_order():
    found = [c.renyi_efficiency([90, 5, 3, 2], alpha) for alpha in (0, 0.5, 1, 2.5, 10, math.inf)]
    assert found == sorted(found, reverse=True) and found[0] == pytest.approx(1)


@pytest.mark.parametrize("counts, options", [
    ([], {}), ([0, 0], {}), ([1, -1, 3], {}), ([math.nan, 1], {}), ([5], {}), ([1, 2, 3], {"vocabulary": 2}),
    ([1, 2], {"alpha": -1}), ([1, 2], {"alpha": math.nan}),
])
def test_renyi_efficiency_refuses(counts, options):
    with pytest.raises((InputError, SettingsError)):
        c.renyi_efficiency(counts, **options)


def test_counts_by_hand():
    words = PieceList(list_pieces(["um dois três"], "word"), "word")
    assert c.fertility(words, ["um dois", "quatro"]) == 1
    assert c.fertility(Every(), ["um dois", "três"]) == (7 + 4) / 3
    assert c.continued_words(Every(), ["a b cd", "cd"]) == 2 / 4
    assert c.continued_words(words, ["qualquer coisa"]) == 0
    row = c.measure_cost(words, ["um dois", "um quatro"])
    assert row["tokens"] == 4 and row["unknown"] == 1 / 4 and row["comes back"] == 1 / 2
    assert row["vocabulary used"] == 3 / len(words)
    assert row["bytes per token"] == (7 + 9) / 4
    assert c.measure_cost(BYTES, ["ção"])["tokens"] == 5


def test_accents_apart_are_part_of_the_word():
    whole, apart = "ação", "ac\u0327a\u0303o"
    assert c.continued_words(Every(), [f"a {whole} e"]) == c.continued_words(Every(), [f"a {apart} e"]) == 1 / 3


def test_parity_by_hand_and_refusals():
    assert c.parity(Every(), {"en": ["abc", "d"], "pt": ["abcd", "efgh"]}) == {"en": 1, "pt": 2}
    assert c.parity(Every(), {"es": ["ab"], "pt": ["abcd"]}, "pt") == {"es": 0.5, "pt": 1}
    for wrong in ({"pt": ["a"]}, {"en": ["a", "b"], "pt": ["c"]}, {}, {"en": [""], "pt": ["a"]}):
        with pytest.raises(InputError):
            c.parity(Every(), wrong)


def test_pivot_and_table():
    table = c.compare_tokenizers({"a": BYTES, "b": Every()}, {"x": OTHER, "y": LEARN})
    wide = table.pivot("tokens")
    assert wide.columns == ["tokenizer", "x", "y"] and len(wide.rows) == 2
    assert wide.rows[0]["x"] == table.rows[0]["tokens"]
    assert "bytes per token" in repr(table) and "<table>" in table._repr_html_()
    for wrong in ("text", "nothing"):
        with pytest.raises(InputError):
            table.pivot(wrong)
    with pytest.raises(InputError):
        c.compare_tokenizers({}, {"x": OTHER})


@pytest.mark.parametrize("texts", ["a text", [], [""], [None], [3], ["torn \ud83d"]])
def test_bad_texts_are_refused(texts, bpe):
    for measure in (c.fertility, c.continued_words, c.measure_cost, c.encode_all, c.find_unused):
        with pytest.raises(InputError):
            measure(bpe, texts)


def test_what_is_no_tokenizer_is_refused():
    for wrong in ("gpt2", None, 3, object()):
        with pytest.raises(InputError):
            c.measure_cost(wrong, ["a"])


# normalisation


def test_loss_is_conditional_entropy():
    words = ["e"] * 6 + ["é"] * 2 + ["mar"] * 8
    lost = c.measure_loss(c.strip_accents, [" ".join(words)])
    assert lost == pytest.approx(8 / 16 * (0.25 * 2 + 0.75 * math.log2(4 / 3)))
    assert c.measure_loss(str.lower, [" ".join(words)]) == 0


@pytest.mark.parametrize("form", ["as it is", "NFC", "NFD", "tabs for indentation"])
def test_forms_that_can_be_undone_lose_nothing(form):
    assert c.measure_loss(c.NORMAL_FORMS[form], LEARN + ["if x:\n        return ñ\n"]) == 0


@settings(max_examples=40, deadline=None)
@given(st.text(st.sampled_from("aAãÃ e\n\t1²"), min_size=1, max_size=40))
def test_loss_is_never_negative_nor_more_than_all_there_is(text):
    pieces = [found for found in text.replace("\n", " ").split(" ") if found]
    for form in c.NORMAL_FORMS.values():
        lost = c.measure_loss(form, [text])
        assert 0 <= lost <= math.log2(len(text) + 1) * (len(text) + 1) / max(len(pieces), 1)


def test_normalisations_are_compared_each_with_its_own_vocabulary():
    forms = {"as it is": str, "upper": str.upper, "nothing": lambda text: "x" if text.strip() else text}
    table = c.compare_normalisations(LEARN * 3 + ["y yz"], {"talk": OTHER}, {k: forms[k] for k in ("as it is", "upper")}, 400)
    rows = {row["form"]: row for row in table.rows}
    assert rows["as it is"]["changed"] == rows["as it is"]["bits lost per word"] == 0
    assert rows["upper"]["changed"] == 1
    assert rows["upper"]["tokens per sentence"] < 1.3 * rows["as it is"]["tokens per sentence"], "a vocabulary of its own"


def test_typos():
    assert c.add_typos(OTHER, 0) == OTHER and c.add_typos(OTHER, 0.5) == c.add_typos(OTHER, 0.5)
    assert c.add_typos(OTHER, 0.5, 1) != c.add_typos(OTHER, 0.5, 2)
    before, after = " ".join(OTHER).split(), " ".join(c.add_typos(OTHER, 0.5)).split()
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    long = sum(len(word.strip(",.")) >= 3 and word.strip(",.").isalpha() for word in before)
    assert 0.3 * long < changed < 0.6 * long
    with pytest.raises(SettingsError):
        c.add_typos(OTHER, 1.1)


# unused and untrained tokens


def test_planted_tokens_are_found_and_used_ones_are_not(bpe):
    planted = ["Quxabrol", "Vintarego"]
    strange = train_tokenizer(LEARN + [f" {word}" for word in planted for _ in range(400)], 420)
    rows = {row["token"].strip(): row for row in c.find_unused(strange, LEARN).rows}
    for word in planted:
        assert rows[word]["kind"] == "rare" and rows[word]["count"] == 0
    counts = Counter(itertools.chain.from_iterable(c.encode_all(strange, LEARN)))
    assert {row["id"] for row in rows.values()} <= set(range(len(strange))) - {i for i, n in counts.items() if n}
    more = c.find_unused(strange, LEARN, 5).rows
    assert {row["id"] for row in more} == {i for i in range(len(strange)) if counts[i] <= 5}


def test_kinds_of_unused_tokens(piece):
    words = WordPiece([*train_wordpiece(LEARN, 200), "no way"])
    kinds = {row["token"]: row["kind"] for row in c.find_unused(words, LEARN).rows}
    assert kinds["no way"] == "unreachable" and kinds["[UNK]"] == kinds["<|pad|>"] == "special"
    unigram = Unigram(train_unigram(LEARN, 400))
    for one in (unigram, export_tokenizer(unigram)):
        kinds = {row["token"]: row["kind"] for row in c.find_unused(one, LEARN).rows}
        assert kinds["<0xFF>"] == "byte" and kinds["<|pad|>"] == "special"
    assert c.find_unused(piece, LEARN).rows
    with pytest.raises(InputError):
        c.find_unused(Every(), LEARN)


def model_folder(path, tokenizer, matrices: dict[str, np.ndarray]):
    from safetensors.numpy import save_file

    tokenizer.save_pretrained(path)
    half = len(matrices) > 1
    for i, (name, matrix) in enumerate(matrices.items()):
        save_file({name: matrix.astype(np.float32)}, path / (f"model-{i}.safetensors" if half else "model.safetensors"))
    return path


@pytest.mark.parametrize("where", ["input", "output", "both"])
def test_planted_rows_are_found_in_either_matrix(tmp_path, bpe, where):
    chance, size, width = np.random.default_rng(3), 448, 48
    known = c.surely_unused(bpe, size)
    assert set(range(len(bpe), size)) <= set(known) and len(known) == size - len(bpe) + 13
    planted = [300, 333, 371]
    idle = [*known, *planted]
    inner = chance.normal(0, 0.02, (size, width))
    busy = np.setdiff1d(np.arange(size), idle)
    outer = chance.normal(0, 0.3, (size, width)) + chance.normal(0, 1, width)
    if where != "output":
        inner[busy] += chance.normal(0, 0.05, (len(busy), width))
    if where != "input":
        outer[idle] = chance.normal(0, 0.5, width) + chance.normal(0, 0.02, (len(idle), width))
    matrices = {"model.embed_tokens.weight": inner, "lm_head.weight": outer}
    found = c.find_undertrained(model_folder(tmp_path, bpe, matrices)).rows
    assert {row["id"] for row in found if not row["known"]} == set(planted)
    assert {row["id"] for row in found if row["known"]} == set(known)
    again = c.find_undertrained(tmp_path, unused=known[:5]).rows
    assert set(planted) <= {row["id"] for row in again}


def test_distances_do_not_measure_a_row_by_itself():
    rows = np.random.default_rng(0).normal(size=(40, 8))
    far = c.untrained_distances(rows, [1, 2, 3])["distance"]
    assert far[1] == pytest.approx(np.linalg.norm(rows[1] - rows[[2, 3]].mean(0)), rel=1e-5)
    assert far[9] == pytest.approx(np.linalg.norm(rows[9] - rows[[1, 2, 3]].mean(0)), rel=1e-5)


def test_untrained_rows_refuse(tmp_path, bpe):
    rows = np.ones((9, 2))
    some = [1, 2, 3]
    for matrix, unused in ((rows, []), (rows, [1, 2, 9]), (rows, list(range(9))), (rows * np.nan, some), (rows[0], some)):
        with pytest.raises(InputError):
            c.untrained_distances(matrix, unused)
    bpe.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no embeddings"):
        c.find_undertrained(tmp_path)
    with pytest.raises(InputError):
        c.find_undertrained(tmp_path / "nothing")


def test_unused_names_of_bert_are_known():
    named = WordPiece([*list_pieces(["a b"], "word"), "[unused0]", "[unused1]", "<unused_7>", "unused"])
    assert len(c.surely_unused(named, len(named))) == 3


# bits per byte


SMALL = c.PredictorSettings(operations=1.5e9)


def test_bits_of_a_text_are_a_code():
    rows = c.encode_all(BYTES, LEARN[:20])
    weights = c.train_predictor(rows, 263, 3, c.PredictorSettings(operations=3e8))
    import torch

    weights = {name: weight.detach() for name, weight in weights.items()}
    first = c._logits(weights, torch.tensor([[263, 263, 263]])).log_softmax(-1)[0]
    alone = [c.code_lengths(weights, [[i]])[0] for i in (50, 120)]
    for i, bits in zip((50, 120), alone, strict=True):
        then = c._logits(weights, torch.tensor([[263, 263, i]])).log_softmax(-1)[0, 263]
        assert bits == pytest.approx(-float(first[i] + then) / math.log(2), rel=1e-5)
    both = c.code_lengths(weights, [[50], [120], []])
    assert both[:2] == pytest.approx(alone) and both[2] > 0


def test_equal_compute_and_no_text_from_nothing(bpe):
    import torch

    table = c.compare_bits({"BPE": bpe, "bytes": BYTES}, LEARN, OTHER, SMALL)
    for row in table.rows:
        name = {"BPE": len(bpe), "bytes": len(BYTES)}[row["tokenizer"]]
        spent = row["predictions"] * SMALL.multiply_adds(row["window, tokens"], name + 1)
        assert spent == pytest.approx(SMALL.operations, rel=1e-3)
        low, high = map(float, row["95 %"].split("–"))
        assert low < row["bits per byte"] < high and row["bits per byte"] < row["without context"]
        assert table.curves[row["tokenizer"]][-1][1] == pytest.approx(row["bits per byte"])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)  # more than one takes part, whatever the machine has been told
        once, again = (c.compare_bits({"BPE": bpe, "bytes": BYTES}, LEARN, OTHER, SMALL) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert again.rows == once.rows, "the same seed, the same bits"
    assert "svg" in table.draw()._repr_html_()


def test_noise_cannot_be_learnt():
    noise = ["".join(random.Random(i).choices("abcdefgh", k=200)) for i in range(60)]
    row = c.compare_bits({"bytes": BYTES}, noise[:50], noise[50:], SMALL).rows[0]
    assert 3 <= row["bits per byte"] < 3.3, "three bits each; less would be a leak"


def test_bits_refuse(bpe):
    lossy = PieceList(list_pieces(LEARN, "word"), "word")
    with pytest.raises(InputError, match="loses text"):
        c.compare_bits({"words": lossy}, LEARN, OTHER, SMALL)
    with pytest.raises(SettingsError, match="steps"):
        c.compare_bits({"BPE": bpe}, LEARN, OTHER, c.PredictorSettings(operations=10))
    with pytest.raises(InputError):
        c.compare_bits({"BPE": bpe}, LEARN, OTHER[:1], SMALL)
    with pytest.raises(SettingsError):
        c.PredictorSettings(width=0)
    for above, below in (([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([1.0, 2.0], [0.0, 1.0])):
        with pytest.raises(InputError):
            c.resample_ratio(np.array(above), np.array(below))
