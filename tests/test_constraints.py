"""Constrained text is read by others: Python's own readers judge it, for models that write nonsense by themselves."""

import builtins
import json
import re

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings as budget, strategies as st

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.core import InputError, ResourceError, set_seed
from llmbook.constraints import Constraint, ForcedText, Walk
from llmbook.generation import LeanDecoder, complete, gather_pieces, stream
from llmbook.sampling import Sampling
from llmbook.speculation import Guard, PromptLookup, speculate
from llmbook.tokenization import end_tokens, train_tokenizer

TEXT = ['{"name": "Ada", "born": 1815}', "Yes, no 🙂 naïve “quoted” 日本語", "[1, 2, 3.5e-2] true false null"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT * 3, 380)


@pytest.fixture(scope="module")
def models(tokenizer):
    """Random models; one has more rows than the tokenizer has tokens, as published models do."""
    found = []
    for seed, extra in ((1, 0), (2, 0), (3, 20)):
        set_seed(seed)
        shape = DecoderSettings(len(tokenizer) + extra, 2, 32, 4, 2, 64, 512)
        decoder = Decoder(shape).eval()
        with torch.no_grad():
            for weight in decoder.parameters():
                weight.mul_(8 if weight.ndim == 2 else 1)
        found.append(LeanDecoder.of(decoder))
    return found


letters = st.sampled_from(
    ["a", "b", "Z", "7", "é", "🙂", "日", r"\d", r"\w", "[a-f0-9]", "[^x]", r"\.", " ", '"', "-", r"\s", r"[\d.]"])
patterns = st.recursive(
    letters, lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda x: f"({'|'.join(x)})"),
        st.tuples(inner, st.sampled_from(["?", "{1,3}", "{2}", "*", "+"])).map(lambda x: f"(?:{x[0]}){x[1]}"),
    ), max_leaves=8,
)
quick = budget(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(pattern=patterns, which=st.integers(0, 2), seed=st.integers(0, 99), heat=st.sampled_from([0.0, 1.0, 3.0]))
def test_patterns_are_matched(models, tokenizer, pattern, which, seed, heat):
    constraint = Constraint.regex(pattern)
    sampling = Sampling(max_tokens=150, temperature=heat, seed=seed)
    done = complete(models[which], tokenizer, [40], sampling, constraint.start(tokenizer))
    if done.finish_reason == "stop":
        assert re.fullmatch(pattern, constraint.read(done)), done
    else:
        assert len(done.tokens) == 150


simple = st.one_of(
    st.just({"type": "null"}), st.just({"type": "boolean"}), st.just({"type": "string", "maxLength": 6}),
    st.tuples(st.integers(-50, 50), st.integers(0, 900)).map(
        lambda x: {"type": "integer", "minimum": x[0], "maximum": x[0] + x[1]}),
    st.just({"type": "number", "minimum": -2, "maximum": 7.5}), st.just({"type": "string", "pattern": r"^\d{2,3}-\w$"}),
    st.lists(st.one_of(st.text("ab\"\\é🙂\n", max_size=4), st.integers(-5, 5), st.none(), st.booleans()),
             min_size=1, max_size=3).map(lambda x: {"enum": x}),
    st.sampled_from(["date", "time", "uuid", "ipv4"]).map(lambda x: {"type": "string", "format": x}),
)
names = st.sampled_from(["a", "pattern", "é", "two words", "q\"", "z9"])
schemas = st.recursive(
    simple, lambda inner: st.one_of(
        st.tuples(st.dictionaries(names, inner, min_size=1, max_size=3), st.booleans()).map(
            lambda x: {"type": "object", "properties": x[0], "additionalProperties": False,
                       "required": sorted(x[0]) if x[1] else []}),
        st.tuples(inner, st.integers(0, 2)).map(
            lambda x: {"type": "array", "items": x[0], "minItems": x[1], "maxItems": x[1] + 1}),
        st.lists(inner, min_size=2, max_size=2).map(lambda x: {"anyOf": x}),
    ), max_leaves=5,
)


@quick
@given(schema=schemas, which=st.integers(0, 2), seed=st.integers(0, 99), heat=st.sampled_from([0.0, 1.0]), spaces=st.booleans())
def test_answers_fit_their_schema(models, tokenizer, schema, which, seed, heat, spaces):
    constraint = Constraint.json_schema(schema, spaces)
    sampling = Sampling(max_tokens=300, temperature=heat, seed=seed)
    done = complete(models[which], tokenizer, [40], sampling, constraint.start(tokenizer))
    if done.finish_reason == "length":
        with pytest.raises(InputError, match="cut after 300"):
            constraint.read(done)
        return
    value = constraint.read(done)
    kind = jsonschema.Draft202012Validator
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)
    if not spaces:
        assert done.text == json.dumps(value, separators=(",", ":"), ensure_ascii=False) or re.search(r"\\|\d[.eE]", done.text)


@quick
@given(options=st.lists(st.text("ab 🙂é\"'\\\n/|日", min_size=1, max_size=6), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_choice_is_one_of_its_texts(models, tokenizer, options, seed):
    constraint = Constraint.choice(options)
    done = complete(models[0], tokenizer, [40], Sampling(max_tokens=60, temperature=2.0, seed=seed), constraint.start(tokenizer))
    assert constraint.read(done) in options


@quick
@given(schema=schemas, seed=st.integers(0, 99), heat=st.sampled_from([0.0, 1.0]))
def test_guesses_do_not_change_constrained_text(models, tokenizer, schema, seed, heat):
    constraint = Constraint.json_schema(schema)
    sampling = Sampling(max_tokens=80, temperature=heat, seed=seed, frequency_penalty=0.2)
    plain = complete(models[1], tokenizer, [40], sampling, constraint.start(tokenizer))
    walk = constraint.start(tokenizer)
    forced = ForcedText(walk)
    found = gather_pieces(speculate(models[1], tokenizer, [40], sampling, allow=walk, guesser=forced), 1)
    assert found == plain
    assert forced.tally.kept == forced.tally.guessed or plain.finish_reason == "length"
    lookup = PromptLookup(guard=Guard(99), match=1)
    assert gather_pieces(
        speculate(models[1], tokenizer, [40], sampling, allow=constraint.start(tokenizer), guesser=lookup), 1) == plain


@quick
@given(pattern=patterns, data=st.data())
def test_a_walk_can_go_anywhere_and_back(tokenizer, pattern, data):
    constraint = Constraint.regex(pattern)
    walk, taken = constraint.start(tokenizer), []
    for _ in range(12):
        allowed = walk(taken)
        assert allowed.shape == (len(tokenizer),) and torch.equal(allowed, constraint.start(tokenizer)(taken))
        if data.draw(st.booleans()) and taken:
            taken = taken[: data.draw(st.integers(0, len(taken) - 1))]
            continue
        choices = sorted(set(allowed.nonzero().flatten().tolist()) - end_tokens(tokenizer))
        assume(choices)
        taken = [*taken, data.draw(st.sampled_from(choices))]


def test_special_tokens_never_stand_inside(models, tokenizer):
    walk = Constraint.regex(r"(<\|user\|>|x)+").start(tokenizer)
    ids = tokenizer("x").input_ids
    special = set(tokenizer.all_special_ids)
    assert not special & set(walk([]).nonzero().flatten().tolist())
    assert special & set(walk(ids).nonzero().flatten().tolist()) == end_tokens(tokenizer)
    for seed in range(5):
        sampling = Sampling(max_tokens=100, temperature=2.0, seed=seed)
        done = complete(models[0], tokenizer, [40], sampling, Constraint.regex(r"(<\|user\|>|x){4}").start(tokenizer))
        assert re.fullmatch(r"(<\|user\|>|x){4}", done.text)


def test_rules_of_the_request_cannot_lead_out(models, tokenizer):
    constraint = Constraint.json_schema({"type": "array", "items": {"enum": ["aa"]}, "minItems": 6, "maxItems": 6})
    for changes in ({"no_repeat_ngram": 1}, {"repetition_penalty": 50.0}, {"top_k": 1, "temperature": 1.0},
                    {"frequency_penalty": 2.0}, {"typical_p": 0.1, "temperature": 1.0}, {"min_p": 1.0, "temperature": 1.0}):
        done = complete(models[0], tokenizer, [40], Sampling(max_tokens=200, seed=1, **changes), constraint.start(tokenizer))
        assert constraint.read(done) == ["aa"] * 6


def test_streaming_shows_whole_characters(models, tokenizer):
    allow = Constraint.choice(["日本🙂é"]).start(tokenizer)
    pieces = list(stream(models[0], tokenizer, [40], Sampling(max_tokens=60), allow=allow))
    assert "".join(piece.text for piece in pieces) == "日本🙂é" and not any("�" in piece.text for piece in pieces)


def test_the_end_of_the_room_is_reported(models, tokenizer):
    constraint = Constraint.regex("a{50}")
    done = complete(models[0], tokenizer, [40], Sampling(max_tokens=5), constraint.start(tokenizer))
    assert done.finish_reason == "length" and set(done.text) == {"a"}
    with pytest.raises(InputError, match="cut after 5 tokens"):
        constraint.read(done)
    stopped = complete(models[0], tokenizer, [40], Sampling(stop=("1",)), Constraint.regex("0000001+").start(tokenizer))
    assert stopped.text == "000000"


@pytest.mark.parametrize("make", [
    lambda: Constraint.regex("("), lambda: Constraint.regex(r"(a)\1"), lambda: Constraint.regex(r"a(?=b)"),
    lambda: Constraint.json_schema({"type": "nonsense"}), lambda: Constraint.json_schema({"not": {}}),
    lambda: Constraint.json_schema({"type": {1, 2}}), lambda: Constraint.json_schema(False), lambda: Constraint.choice([]),
    lambda: Constraint.choice("Yes"), lambda: Constraint.choice(["a", ""]), lambda: Constraint.regex(3),
    lambda: Constraint.json_schema("x"),
])
def test_what_cannot_be_followed_is_refused_at_once(make):
    with pytest.raises(InputError):
        make()


def test_a_token_from_outside_the_grammar_is_an_error(tokenizer):
    walk = Constraint.regex("abc").start(tokenizer)
    with pytest.raises(InputError, match="does not allow"):
        walk(tokenizer("x").input_ids)
    assert isinstance(walk, Walk)


def test_compiling_is_done_once(tokenizer):
    from llmbook import constraints

    constraints._open_tokenizer.cache_clear()
    constraints._compile.cache_clear()
    for _ in range(5):
        Constraint.regex("[ab]{3}").start(tokenizer)
    assert constraints._open_tokenizer.cache_info().misses == constraints._compile.cache_info().misses == 1
    one, other = (Constraint.regex("[ab]{3}").start(tokenizer) for _ in range(2))
    one(tokenizer("a").input_ids)
    assert other([]).sum() > 0 and other.taken == []  # requests do not share their place


def test_a_missing_library_says_what_to_install(monkeypatch):
    find = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("llguidance"):
            raise ImportError(name)
        return find(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ResourceError, match="pip install"):
        Constraint.regex("a")


def test_other_peoples_tokenizers():
    """Byte-level BPE as others write it, with an added token that is text."""
    from tokenizers import Tokenizer, decoders, models as kinds, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(kinds.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False))
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    theirs.add_tokens(["Ada🙂"])
    walk = Constraint.choice(["Ada🙂", "日"]).start(theirs)
    assert walk([])[theirs.convert_tokens_to_ids("Ada🙂")]
    set_seed(0)
    model = LeanDecoder.of(Decoder(DecoderSettings(len(theirs), 1, 32, 2, 2, 64, 256)).eval())
    for seed in range(10):
        rule = Constraint.choice(["Ada🙂", "日"]).start(theirs)
        done = complete(model, theirs, [40], Sampling(temperature=2.0, seed=seed), rule)
        assert done.text in ("Ada🙂", "日")


def test_tokenizers_that_cannot_spell_an_answer_say_so():
    from tokenizers import Tokenizer, decoders, models as kinds
    from transformers import PreTrainedTokenizerFast

    def wrap(model, decoder, **special):
        backend = Tokenizer(model)
        backend.decoder = decoder
        return PreTrainedTokenizerFast(tokenizer_object=backend, **special)

    pieces = wrap(kinds.WordPiece({"</s>": 0, "a": 1}, unk_token="a"), decoders.WordPiece(), eos_token="</s>")
    with pytest.raises(InputError, match="byte-level BPE"):
        Constraint.regex("a").start(pieces)
    poor = wrap(kinds.BPE({"</s>": 0, "a": 1}, []), decoders.ByteLevel(), eos_token="</s>")
    with pytest.raises(InputError):
        Constraint.regex("x[yz]").start(poor)([])
    endless = wrap(kinds.BPE({"a": 0}, []), decoders.ByteLevel())
    with pytest.raises(InputError, match="end token"):
        Constraint.regex("a").start(endless)
