"""Embeddings held against plain loops, scipy, transformers, planted truths and damaged files."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group
from torch.nn import functional as F

from llmbook.core import CorruptFileError, InputError
from llmbook.embeddings import (
    RELATIONS,
    SkipGramSettings,
    WordVectors,
    _blocks_of_text,
    _noise_loss,
    _number_words,
    _window_loss,
    align_spaces,
    conflate,
    contextual_vectors,
    cut_passages,
    cut_words,
    describe_space,
    draw_map,
    find_twins,
    load_word_vectors,
    measure_alignment,
    measure_analogies,
    measure_senses,
    neighbour_agreement,
    plant_twins,
    project_to_plane,
    read_token_vectors,
    remove_common,
    train_skip_gram,
    whiten,
)

DRAW = numpy.random.default_rng(0)
FRUIT, TOOLS = "maçã pera uva figo kiwi".split(), "serra lima torno broca prensa".split()


def planted_texts(count: int = 1500) -> list[list[str]]:
    """Sentences in which fruit stands among eating words and tools among working words."""
    draw = numpy.random.default_rng(3)
    frames = ["como {} madura e doce no almoço", "corto o aço com {} afiada na oficina"]
    return [
        frame.format(draw.choice(words)).split()
        for _ in range(count) for frame, words in zip(frames, (FRUIT, TOOLS), strict=True)
    ]


@pytest.fixture(scope="module")
def space():
    return train_skip_gram(planted_texts(), SkipGramSettings(d=16, epochs=6, batch=256, thin=1.0))


def random_space(n: int, d: int, seed: int, prefix: str = "w") -> WordVectors:
    draw = numpy.random.default_rng(seed)
    return WordVectors([f"{prefix}{i}" for i in range(n)], draw.normal(size=(n, d)))


def test_words_used_alike_become_neighbours(space):
    for words in (FRUIT, TOOLS):
        for word in words:
            found = [name for name, _ in space.neighbours(word, 4)]
            assert set(found) == set(words) - {word}, (word, found)


def test_training_is_repeatable_and_the_seed_counts():
    own = SkipGramSettings(d=8, epochs=1, minimum=1)
    first, second = (train_skip_gram(planted_texts(50), own) for _ in range(2))
    other = train_skip_gram(planted_texts(50), SkipGramSettings(d=8, epochs=1, minimum=1, seed=2))
    assert numpy.array_equal(first.vectors, second.vectors)
    assert not numpy.array_equal(first.vectors, other.vectors)
    assert first.counts.tolist() == sorted(first.counts, reverse=True)


@settings(max_examples=40)
@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 2**31))
def test_blocks_find_the_pairs_that_loops_find(n, window, seed):
    draw = torch.Generator().manual_seed(seed)
    centre, around = torch.randn(2, n, 4, generator=draw, dtype=torch.float64)
    owner = torch.randint(0, 3, (n,), generator=draw).sort().values
    reach = torch.randint(1, window + 1, (n,), generator=draw)
    loss, times = _window_loss(centre, around, owner, reach)
    pairs = [
        (i, j) for i in range(n) for j in range(n)
        if i != j and owner[i] == owner[j] and abs(i - j) <= reach[i]
    ]
    slow = sum((F.softplus(-centre[i] @ around[j]) for i, j in pairs), torch.zeros((), dtype=torch.float64))
    assert torch.allclose(loss, slow)
    assert times.tolist() == [sum(i == k for i, _ in pairs) for k in range(n)]


def test_the_noise_loss_weighs_by_neighbours():
    centre, noise = torch.randn(5, 4), torch.randn(9, 4)
    times = torch.tensor([0.0, 1, 2, 3, 4])
    slow = sum(times[i] * 7 / 9 * F.softplus(centre[i] @ noise[j]) for i in range(5) for j in range(9))
    assert torch.allclose(_noise_loss(centre, times, noise, 7), slow, rtol=1e-4)


def test_every_word_is_read_once_an_epoch_and_texts_stay_apart():
    words, _, ids = _number_words([["a", "b", "c"], [], ["d", "a"]], 1)
    own = SkipGramSettings(epochs=2, batch=2)
    blocks = list(_blocks_of_text(ids, numpy.ones(len(words)), own))
    assert sum(len(block) for block, _, _ in blocks) == 10
    owners = {(words[i], int(owner)) for block, owner, _ in blocks for i, owner in zip(block.tolist(), owner, strict=True)}
    assert owners == {("a", 0), ("b", 0), ("c", 0), ("d", 2), ("a", 2)}


def test_words_keep_their_accents_however_they_are_typed():
    assert cut_words("A\u0301rvore ÁRVORE a\u0303o niño coração") == ["árvore", "árvore", "ão", "niño", "coração"]
    assert cut_words("rot13 x_y e-mail don't 你好") == ["rot", "x", "y", "e-mail", "don't", "你好"]
    assert cut_words("") == []


@settings(max_examples=40)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=8), min_size=1, max_size=9, unique=True),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.sampled_from(["a.txt", "a.vec", "a.safetensors"]),
)
def test_spaces_come_back_from_disk(tmp_path_factory, words, d, seed, name):
    path = tmp_path_factory.mktemp("space") / name
    vectors = numpy.random.default_rng(seed).normal(size=(len(words), d)).astype(numpy.float32)
    WordVectors(words, vectors).save(path)
    loaded = load_word_vectors(path)
    assert loaded.words == words and numpy.array_equal(loaded.vectors, vectors)


def test_counts_survive_and_words_with_spaces_need_safetensors(tmp_path):
    spaced = WordVectors(["a b", "c"], numpy.eye(2), [5, 3])
    with pytest.raises(InputError, match="safetensors"):
        spaced.save(tmp_path / "x.txt")
    assert not (tmp_path / "x.txt").exists()
    spaced.save(tmp_path / "x.safetensors")
    loaded = load_word_vectors(tmp_path / "x.safetensors")
    assert loaded.words == ["a b", "c"] and loaded.counts.tolist() == [5, 3]


@pytest.mark.parametrize("text", ["", "2 3\na 1 2 3\n", "1 2\na 1 x\n", "1 2\na 1 2 3\n", "2 1\na 1\na 2\n", "words\n"])
def test_damaged_files_are_named(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(CorruptFileError, match="x.txt"):
        load_word_vectors(tmp_path / "x.txt")
    (tmp_path / "x.safetensors").write_text(text)
    with pytest.raises(CorruptFileError):
        load_word_vectors(tmp_path / "x.safetensors")


def test_neighbours_and_analogies_leave_the_asked_words_out():
    known = WordVectors(["man", "woman", "king", "queen", "tree"], [[1, 0, 0], [1, 1, 0], [1, 0, 2], [1, 1, 2], [-1, 0, 0]])
    assert known.analogy("man", "woman", "king", 1)[0][0] == "queen"
    assert len(known.neighbours("man", 99)) == 4
    assert known.neighbours(known["man"], 1)[0] == ("man", pytest.approx(1.0))
    found = dict(known.neighbours("king"))
    assert found["queen"] == pytest.approx(5 / 30**0.5)
    zero = WordVectors(["nothing", "x"], [[0, 0], [1, 0]])
    assert zero.neighbours("nothing") == [("x", 0.0)]


def test_analogies_are_counted_right():
    draw = numpy.random.default_rng(1)
    step, bases = draw.normal(size=20), draw.normal(size=(4, 20)) * 3
    known = WordVectors([f"{c}{i}" for i in range(4) for c in "ab"], [v for base in bases for v in (base, base + step)])
    rows = measure_analogies(known, {"step": [(f"a{i}", f"b{i}") for i in range(4)] + [("missing", "b1")], "none": []})
    assert rows[0]["questions"] == 12 and rows[0]["first"] >= 0.9 and rows[0]["in five"] >= rows[0]["first"]
    assert rows[1]["questions"] == 0 and numpy.isnan(rows[1]["first"])


def test_relations_are_well_formed_in_three_languages():
    for language in ("en", "pt", "es"):
        for pairs in RELATIONS[language].values():
            assert len(set(pairs)) == len(pairs)
            assert all(len(pair) == 2 and cut_words(" ".join(pair)) == list(pair) for pair in pairs)


def save_model(folder, kind: str):
    """A tiny model with random weights and a tokenizer of words and pieces."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["[UNK]", "[PAD]", "a", "file", "saw", "cut", "##ting", "the", "open", "##s"]
    tokenizer = Tokenizer(WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    shape = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = {
        "bert": lambda: BertForMaskedLM(BertConfig(**shape, max_position_embeddings=20, initializer_range=0.5)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False, initializer_range=0.5)),
        "tied": lambda: LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, initializer_range=0.5)),
    }[kind]()
    model.eval().save_pretrained(folder)
    return model, names


@pytest.mark.parametrize("kind", ["bert", "llama", "tied"])
def test_token_vectors_are_those_of_the_model(tmp_path, kind):
    model, names = save_model(tmp_path, kind)
    inputs, outputs = read_token_vectors(tmp_path)
    assert inputs.words == outputs.words == names, "rows without a token are left out"
    assert numpy.array_equal(inputs.vectors, model.get_input_embeddings().weight.detach().numpy()[: len(names)])
    assert numpy.array_equal(outputs.vectors, model.get_output_embeddings().weight.detach().numpy()[: len(names)])
    assert numpy.array_equal(inputs.vectors, outputs.vectors) == (kind != "llama"), "BERT and tied models share one table"


def test_a_model_without_a_head_has_no_output_table(tmp_path):
    model, _ = save_model(tmp_path, "bert")
    model.bert.save_pretrained(tmp_path)
    inputs, outputs = read_token_vectors(tmp_path)
    assert outputs is None and len(inputs) == 10


def test_contextual_vectors_average_the_pieces_of_a_word(tmp_path):
    model, _ = save_model(tmp_path, "bert")
    found = contextual_vectors(tmp_path, ["The saw cutting", "open the file", "cutting the saw"], "cutting")
    for row, (ids, pieces) in zip(found, (([7, 4, 5, 6], [2, 3]), ([5, 6, 7, 4], [0, 1])), strict=True):
        with torch.no_grad():
            states = model.bert(torch.tensor([ids])).last_hidden_state[0]
        assert numpy.allclose(row, states[pieces].mean(0).numpy(), atol=1e-5)
    llama, _ = save_model(tmp_path, "llama")
    table = contextual_vectors(tmp_path, ["the saw", "saw the saw"], "saw", layer=0)
    assert numpy.allclose(table, llama.get_input_embeddings().weight[4].detach().numpy(), atol=1e-6)
    last = contextual_vectors(tmp_path, ["the saw", "saw the saw"], "saw")
    assert len(last) == 3 and not numpy.allclose(last[0], last[1], atol=1e-3)


def test_an_encoder_with_a_decoder_is_read_by_its_encoder(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    save_model(tmp_path, "bert")
    (tmp_path / "model.safetensors").unlink()
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).eval()
    model.save_pretrained(tmp_path)
    found = contextual_vectors(tmp_path, ["the saw"], "saw")
    with torch.no_grad():
        wanted = model.encoder(torch.tensor([[7, 4]])).last_hidden_state[0, 1].numpy()
    assert numpy.allclose(found[0], wanted, atol=1e-5)
    assert read_token_vectors(tmp_path)[0].words[4] == "saw"


def test_what_a_model_cannot_read_is_named(tmp_path):
    save_model(tmp_path, "bert")
    with pytest.raises(InputError, match="cut_passages"):
        contextual_vectors(tmp_path, ["the saw " * 30], "saw")
    with pytest.raises(InputError, match="none of 1"):
        contextual_vectors(tmp_path, ["the saw"], "file")
    with pytest.raises(InputError, match="finite"):
        contextual_vectors(lambda parts: [numpy.full((len(part), 2), numpy.nan) for part in parts], ["the saw"], "saw")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        read_token_vectors(tmp_path)
    with pytest.raises(InputError, match="config.json"):
        read_token_vectors(tmp_path / "nowhere")


def test_conflated_senses_are_in_order_of_appearance():
    passages = [["a", "x", "b"], ["b", "a"], ["x"]]
    mixed, senses = conflate(passages, [("a", "b")])
    assert mixed == [["a|b", "x", "a|b"], ["a|b", "a|b"], ["x"]] and senses == {"a|b": [0, 1, 1, 0]}
    rows = contextual_vectors(lambda parts: [numpy.arange(len(part))[:, None] for part in parts], mixed, "a|b")
    assert rows.ravel().tolist() == [0, 2, 0, 1], "vectors come in the order of the senses"


def test_senses_separate_when_they_should_and_only_then():
    draw = numpy.random.default_rng(0)
    senses = draw.integers(0, 2, 200)
    apart = draw.normal(size=(200, 10)) + 4 * senses[:, None] * numpy.eye(10)[0]
    noise = draw.normal(size=(200, 10))
    assert measure_senses(apart, senses)["purity"] > 0.9 and measure_senses(apart, senses)["area"] > 0.65
    assert abs(measure_senses(noise, senses)["area"] - 0.5) < 0.03
    for bad in (senses[:-1], [0] * 200, [2] * 200, [0] * 198 + [1] * 2):
        with pytest.raises(InputError):
            measure_senses(noise, bad)


def test_passages_lose_no_word_but_single_ones():
    texts = [["a"] * 70, ["b"], ["c", "d"]]
    parts = cut_passages(texts, 32)
    assert [len(part) for part in parts] == [32, 32, 6, 2]


@settings(max_examples=25)
@given(st.integers(2, 9), st.integers(0, 2**31))
def test_alignment_equals_scipy_and_finds_a_planted_turn(d, seed):
    draw = numpy.random.default_rng(seed)
    x, y = draw.normal(size=(2, 40, d))
    assert numpy.allclose(align_spaces(x, y), orthogonal_procrustes(x, y)[0])
    turn = ortho_group.rvs(d, random_state=draw)
    for kind in ("orthogonal", "linear"):
        assert numpy.allclose(align_spaces(x, x @ turn, kind), turn)
    found = align_spaces(x, y)
    assert numpy.allclose(found.T @ found, numpy.eye(d))
    fit = lambda kind: numpy.linalg.norm(x @ align_spaces(x, y, kind) - y)
    assert fit("linear") <= fit("orthogonal") + 1e-9, "more freedom fits the anchors no worse"


def test_a_turned_space_agrees_and_is_carried_back():
    a = random_space(300, 12, 1)
    turn = ortho_group.rvs(12, random_state=numpy.random.default_rng(2))
    b = WordVectors(a.words[::-1], (a.vectors @ turn)[::-1])
    assert neighbour_agreement(a, b) > 0.999
    rows = {row["map"]: row for row in measure_alignment(a, b)}
    assert rows["orthogonal"]["others that find themselves"] == 1.0 and rows["orthogonal"]["error on others"] < 1e-9
    assert rows["none"]["others that find themselves"] < 0.1
    other = random_space(300, 12, 3)
    assert neighbour_agreement(a, other) < 0.1
    assert measure_alignment(a, other)[1]["others that find themselves"] < 0.1, "nothing to find, nothing found"


def test_geometry_equals_all_pairs():
    sample = DRAW.normal(size=(90, 6)) + 0.7
    unit = sample / numpy.linalg.norm(sample, axis=1, keepdims=True)
    cosines = unit @ unit.T
    numpy.fill_diagonal(cosines, numpy.nan)
    found = describe_space(sample, numpy.linalg.norm(sample, axis=1), nearest=5)
    assert found["mean cosine of two words"] == pytest.approx(numpy.nanmean(cosines))
    assert found["length against frequency"] == pytest.approx(1.0)
    named = numpy.bincount(numpy.argsort(-numpy.nan_to_num(cosines, nan=-9))[:, :5].ravel(), minlength=90)
    assert found["share of nobody's neighbours"] == pytest.approx((named == 0).mean())
    assert found["skewness of hubs"] == pytest.approx(((named - named.mean()) ** 3).mean() / named.std() ** 3)
    line = describe_space(numpy.outer(numpy.arange(1, 40), [1.0, 2.0]))
    assert line["effective dimensions"] == pytest.approx(1) and line["energy of the common direction"] == pytest.approx(1)


def test_repairs_do_what_their_papers_say():
    sample = DRAW.normal(size=(200, 8)) * [9, 1, 1, 1, 1, 1, 1, 1] + 3
    white = whiten(sample)
    assert numpy.allclose(numpy.cov(white.T), numpy.eye(8)) and numpy.allclose(white.mean(0), 0)
    without = remove_common(sample, 1)
    top = numpy.linalg.svd(sample - sample.mean(0))[2][0]
    assert numpy.allclose(without @ top, 0) and numpy.linalg.matrix_rank(without) == 7
    flat = sample[:, :2] @ DRAW.normal(size=(2, 8))
    assert whiten(flat).shape == (200, 2), "directions without variance are dropped"


def test_twins_are_planted_and_found():
    texts = [["a", "b"] * 50, ["b", "c"]]
    planted = plant_twins(texts, ["b"])
    assert {word for text in planted for word in text} == {"a", "b·1", "b·2", "c"}
    assert [word.split("·")[0] for word in planted[0]] == texts[0]
    known = WordVectors(["b·1", "b·2", "near", "far·1"], [[1, 0], [1, 1], [1, 0.1], [0, 1]])
    assert find_twins(known, ["b", "far", "absent"]).tolist() == [2]


def test_twins_find_each_other_in_a_trained_space():
    words = [*FRUIT, *TOOLS]
    trained = train_skip_gram(plant_twins(planted_texts(), words), SkipGramSettings(d=16, epochs=6, batch=256, thin=1.0))
    ranks = find_twins(trained, words)
    assert len(ranks) == 10 and (ranks <= 9).all(), "all twins are among their own kind"


def test_maps_keep_what_is_flat(space):
    flat = DRAW.normal(size=(30, 2)) @ DRAW.normal(size=(2, 7))
    places, kept = project_to_plane(flat)
    assert kept == pytest.approx(1) and numpy.allclose(numpy.cov(places.T)[0, 1], 0, atol=1e-9)
    drawing = draw_map(space, {"fruta": [*FRUIT, "absent"], "ferramenta": TOOLS})
    assert "maçã" in drawing.svg and "absent" not in drawing.svg


@pytest.mark.parametrize(
    "call",
    [
        lambda: WordVectors([], numpy.zeros((0, 2))),
        lambda: WordVectors(["a", "a"], numpy.eye(2)),
        lambda: WordVectors(["a"], numpy.eye(2)),
        lambda: WordVectors(["a", "b"], [[1, numpy.nan], [0, 1]]),
        lambda: WordVectors(["a", "b"], numpy.eye(2), [1]),
        lambda: random_space(3, 2, 0)["absent"],
        lambda: random_space(3, 2, 0).analogy("w0", "w1", "absent"),
        lambda: train_skip_gram("one text"),
        lambda: train_skip_gram([]),
        lambda: train_skip_gram(["a b c"]),
        lambda: load_word_vectors("no/such/file.txt"),
        lambda: align_spaces(numpy.zeros((3, 2)), numpy.zeros((4, 2))),
        lambda: align_spaces(numpy.zeros((0, 2)), numpy.zeros((0, 2))),
        lambda: align_spaces(numpy.eye(3), numpy.eye(3)[:, :2]),
        lambda: align_spaces(numpy.eye(3), numpy.eye(3), "spiral"),
        lambda: neighbour_agreement(random_space(50, 3, 0), random_space(50, 3, 0, "v")),
        lambda: describe_space(numpy.zeros((5, 3))),
        lambda: describe_space(numpy.full((50, 3), numpy.inf)),
        lambda: whiten(numpy.eye(3)),
        lambda: remove_common(numpy.eye(3), 3),
        lambda: project_to_plane(numpy.zeros((1, 3))),
        lambda: draw_map(random_space(3, 2, 0), {"none": ["absent"]}),
        lambda: conflate([["a"]], [("a", "a")]),
    ],
)
def test_bad_input_is_named(call):
    with pytest.raises(InputError, match="Allowed"):
        call()
