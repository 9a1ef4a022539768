"""The engine under load: thousands of requests must get the tokens that each would get alone."""

import contextlib
import dataclasses
import random
import threading
from functools import partial

import pytest
import torch
from sample_models import build_decoder, build_tokenizer

from llmbook.bridge import load_decoder
from llmbook.core import InputError, ResourceError, SettingsError, set_seed
from llmbook.engine import Engine, EngineSettings, EngineThread
from llmbook.generation import LeanDecoder, Sampling, complete, next_logits, score_states, stream
from llmbook.quantization import to_int8
from llmbook.tokenization import end_tokens

build = partial(
    build_decoder, sharpness=10, width=16, heads=2, key_value_heads=1, hidden=24, context=64
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return LeanDecoder.of(build(len(tokenizer)).double())  # a tie in double precision is not met by chance


def invent(rng: random.Random, tokenizer, shared: list[list[int]]) -> tuple[list[int], Sampling]:
    """A request of any kind; many begin alike, some are equal."""
    ids = rng.choice(shared)[: rng.choice((0, 6, 13, 26))]
    ids = ids + [rng.randrange(6, len(tokenizer)) for _ in range(rng.randint(0 if ids else 1, 8))]
    kinds = (
        {}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"repetition_penalty": 1.3},
        {"temperature": 1.2, "top_k": 12, "no_repeat_ngram": 2}, {"stop": ("e", "st")}, {"min_p": 0.05, "temperature": 1.0},
    )
    count, logprobs = rng.randint(1, 18), rng.choice((0, 0, 0, 2))
    return ids, Sampling(max_tokens=count, seed=rng.randrange(40), logprobs=logprobs, **rng.choice(kinds))


def check(engine: Engine) -> None:
    """No page is lost, none lent twice, rows equal pages."""
    pool, rows = engine.pool, engine.running
    held = [sum(page in r.pages for r in rows) for page in range(engine.settings.pages)]
    assert held == pool.holders and set(pool.free) == {page for page, times in enumerate(held) if not times}
    for row, request in enumerate(rows):
        pages = engine.cache.pages[:, request.pages].transpose(1, 2).flatten(2, 3)
        assert torch.equal(pages[:, :, : request.read], engine.cache.rows[:, row, :, : request.read])


@pytest.mark.parametrize("seed, settings, count", [
    (0, EngineSettings(16, 4, 6, 12, 10_000), 700),  # far too few pages
    (1, EngineSettings(12, 8, 4, 5, 10_000), 500),  # tiny steps
    (2, EngineSettings(60, 1, 12, 64, 10_000), 500),  # pages of one token
    (3, EngineSettings(200, 3, 20, 48, 10_000), 800),  # room enough
])
def test_thousands_of_requests_get_their_own_tokens(model, tokenizer, seed, settings, count):
    rng = random.Random(seed)
    shared = [[rng.randrange(6, len(tokenizer)) for _ in range(26)] for _ in range(3)]
    engine, asked, got, alone = Engine(model, tokenizer, settings), {}, {}, {}
    cancelled, number = set(), 0
    while len(asked) < count or engine.busy:
        for _ in range(rng.choice((0, 0, 1, 1, 2, 5)) if len(asked) < count else 0):
            ids, sampling = invent(rng, tokenizer, shared)
            number = engine.submit(ids, sampling, salt=rng.choice(("", "", "b")))
            asked[number], got[number] = (tuple(ids), sampling), []
        if asked and rng.random() < 0.05:
            victim = rng.randint(max(1, number - 12), number)
            if engine.cancel(victim):
                cancelled.add(victim)
        for event in engine.step():
            assert event.error is None
            got[event.request].append(event.piece)
        assert sum(tokens for *_, tokens in engine.work) <= settings.step_tokens
        if rng.random() < 0.05:
            check(engine)
    check(engine)
    assert len(engine.pool.free) == settings.pages
    totals = engine.statistics()
    assert totals["prefix_cache_hits"] > 0 and (seed == 3 or totals["num_preemptions_total"] > 0)
    assert totals["generation_tokens_total"] == sum(p.token is not None for pieces in got.values() for p in pieces)
    for number, request in asked.items():
        if request not in alone:
            alone[request] = list(stream(model, tokenizer, *request))
        pieces, expected = got[number], alone[request]
        if number in cancelled:
            assert pieces[-1].finish_reason == "cancelled"
            pieces = pieces[:-1]
            expected = expected[: len(pieces)]
        assert [(p.text, p.token, p.finish_reason) for p in pieces] == [(p.text, p.token, p.finish_reason) for p in expected]
        assert [p.logprob for p in pieces] == pytest.approx([p.logprob for p in expected])


def test_the_oldest_always_gets_on(model, tokenizer):
    engine = Engine(model, tokenizer, EngineSettings(6, 4, 5, 8))
    numbers = [engine.submit([7 + i], Sampling(max_tokens=23, temperature=1.0, seed=i)) for i in range(8)]
    ended, steps = [], 0
    while engine.busy:
        ended += [event.request for event in engine.step() if event.piece.finish_reason]
        steps += 1
        assert steps < 2000
    assert sorted(ended) == numbers
    assert engine.statistics()["num_preemptions_total"] > 0


CHANGES = [{}, {"tied": False}, {"key_value_heads": 2}, {"head_width": 32, "rope_base": 5e5}]


@pytest.mark.parametrize("changes", CHANGES)
def test_shapes(tokenizer, changes):
    decoder = build(len(tokenizer), **changes).double()
    prompts = [[7 + i, 9, 30 + i] for i in range(10)]
    each = [Sampling(max_tokens=20, temperature=i % 2, seed=i) for i in range(10)]
    found = Engine(decoder, tokenizer, EngineSettings(60, 4, 10, 32)).run(prompts, each)
    lean = LeanDecoder.of(decoder)
    assert found == [complete(lean, tokenizer, ids, sampling) for ids, sampling in zip(prompts, each, strict=True)]


def single(decoder):
    return LeanDecoder.of(decoder)


def half(decoder):
    return LeanDecoder.of(decoder.bfloat16())


@pytest.mark.parametrize("pack, slack", [(single, 1e-3), (half, 0.5), (to_int8, 0.5)])
def test_number_formats_choose_the_best_up_to_rounding(tokenizer, pack, slack):
    """Where two scores differ by less than rounding, either is right; each choice must be the best, or so near."""
    model = pack(build(len(tokenizer), width=32, hidden=64))
    prompts = [[7 + i, 9, 30 + i] for i in range(12)]
    engine = Engine(model, tokenizer, EngineSettings(90, 4, 12, 32))
    gaps, spread = [], []
    for ids, done in zip(prompts, engine.run(prompts, Sampling(max_tokens=20)), strict=True):
        with torch.inference_mode():
            whole = torch.tensor([[*ids, *done.tokens]])
            logits = score_states(model, model.states(whole)[0])[len(ids) - 1 : -1]
        gaps += (logits.amax(-1) - logits.gather(1, torch.tensor(done.tokens)[:, None])[:, 0]).tolist()
        spread += logits.std(-1).tolist()
    assert max(gaps) < slack < 0.5 * min(spread)
    assert sum(gap == 0 for gap in gaps) > 0.9 * len(gaps)


def test_somebody_elses_folder(tokenizer, tmp_path):
    import transformers

    set_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = [[9, 8, 7 + i] for i in range(6)]
    found = Engine(decoder, tokenizer, EngineSettings(60, 4, 6, 32)).run(prompts, Sampling(max_tokens=12))
    for ids, done in zip(prompts, found, strict=True):
        ids = torch.tensor([ids])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                              eos_token_id=sorted(end_tokens(tokenizer)))
        assert list(done.tokens) == out[0, ids.shape[1] :].tolist()


def test_a_failing_rule_ends_its_own_request(model, tokenizer):
    v = len(tokenizer)
    odd = torch.arange(v) % 2 == 1

    def fail(tokens):
        raise RuntimeError("broken")

    none, many = torch.zeros(v, dtype=torch.bool), torch.ones(v + 999, dtype=torch.bool)
    rules = [fail, *(lambda _, mask=mask: mask for mask in (many, none, [True] * v, odd.float(), odd[None]))]
    engine = Engine(model, tokenizer, EngineSettings(40, 4, 8, 32))
    bad = [engine.submit([7, 8], Sampling(max_tokens=9), allow=rule) for rule in rules]
    good = engine.submit([9, 8], Sampling(max_tokens=9))
    kept = engine.submit([9, 8], Sampling(max_tokens=9), allow=lambda _: odd)
    short = engine.submit([9, 8], Sampling(max_tokens=9), allow=lambda _: odd[:6])  # the rest is not allowed
    events = []
    while engine.busy:
        events += engine.step()
    errors = {event.request: event.error for event in events if event.error}
    assert list(errors) == bad and all(event.piece.finish_reason == "error" for event in events if event.error)
    assert all("allow" in str(errors[number]) for number in bad[1:])
    assert {e.piece.token for e in events if e.request == short} <= {1, 3, 5, None}
    alone = complete(model, tokenizer, [9, 8], Sampling(max_tokens=9)).tokens
    assert tuple(e.piece.token for e in events if e.request == good) == alone
    ids = [9, 8]
    for event in events:
        if event.request == kept:
            with torch.inference_mode():
                expected = next_logits(model, torch.tensor([ids]))[0].masked_fill(~odd, -torch.inf)
            assert event.piece.token == int(expected.argmax())
            ids.append(event.piece.token)
    assert len(engine.pool.free) == 40


def test_not_a_number_stays_with_its_request(tokenizer):
    decoder = build(len(tokenizer), tied=False).double()
    with torch.no_grad():
        decoder.embedding.weight[50] = torch.nan
    lean = LeanDecoder.of(decoder)
    engine = Engine(lean, tokenizer, EngineSettings(30, 4, 3, 32))
    sound = [[9, 8, 7 + i] for i in range(9)]
    expected = {}
    for ids in sound:
        with contextlib.suppress(InputError):  # it wrote the token that has no number itself
            expected[tuple(ids)] = complete(lean, tokenizer, ids, Sampling(max_tokens=9)).tokens
    numbers, poisoned = {}, []
    for i, ids in enumerate(sound):
        drawn = Sampling(max_tokens=12, temperature=i % 2, seed=1)
        poisoned.append(engine.submit([50, 9, 8, 7, 6, 5, 4], drawn))
        numbers[engine.submit(ids, Sampling(max_tokens=9))] = ids
    got, errors = {number: [] for number in numbers}, {}
    while engine.busy:
        for event in engine.step():
            if event.error:
                errors[event.request] = str(event.error)
            elif event.request in got:
                got[event.request].append(event.piece.token)
    clean = {number: expected[tuple(ids)] for number, ids in numbers.items() if tuple(ids) in expected}
    assert len(clean) > 4
    assert all(tuple(got[number]) == tokens for number, tokens in clean.items())
    assert set(errors) == {*poisoned, *numbers} - set(clean) and all("NaN" in words for words in errors.values())
    assert len(engine.pool.free) == 30


def test_impossible_requests_are_refused_at_once(model, tokenizer):
    engine = Engine(model, tokenizer, EngineSettings(4, 4, 2, 8, waiting=1))
    for ids, sampling, words in (
        ([], Sampling(), "empty"), ([7] * 64, Sampling(), "at most 63"), ([10_000], Sampling(), "lacks"),
        ([7] * 10, Sampling(max_tokens=8), "may need 5 pages"),
    ):
        with pytest.raises(InputError, match=words):
            engine.submit(ids, sampling)
    for i in range(3):
        engine.submit([7 + i], Sampling(max_tokens=16))
    with pytest.raises(ResourceError, match="run and 3 wait"):
        engine.submit([7], Sampling(max_tokens=16))
    with pytest.raises(InputError, match="idle"):
        engine.run([[7]])
    engine.abandon()
    assert not engine.busy and len(engine.pool.free) == 4
    fits = engine.run([[7] * 10] * 9, Sampling(max_tokens=7))  # more than the queue holds: `run` waits
    assert len(fits) == 9 and len(set(fits)) == 1
    for name in ("pages", "page_size", "streams", "step_tokens", "waiting"):
        for value in (-1, 1.5, True, "4"):
            with pytest.raises(SettingsError, match=name):
                dataclasses.replace(EngineSettings(), **{name: value})


def test_run_leaves_nothing_behind_when_a_request_fails(model, tokenizer):
    engine = Engine(model, tokenizer, EngineSettings(20, 4, 4, 16))
    with pytest.raises(InputError, match="empty"):
        engine.run([[7], [8], []], Sampling(max_tokens=30))
    assert not engine.busy and len(engine.pool.free) == 20


def test_a_failing_pass_can_be_repeated(model, tokenizer, monkeypatch):
    engine, calls = Engine(model, tokenizer, EngineSettings(30, 4, 4, 16)), [0]
    real = type(model.layers[0].out).__call__

    def sometimes(self, x):
        calls[0] += 1
        if calls[0] % 23 == 0:
            raise MemoryError
        return real(self, x)

    monkeypatch.setattr(type(model.layers[0].out), "__call__", sometimes)
    prompts = [[7 + i, 9, 8, 7, 6, 5] for i in range(6)]
    got = {engine.submit(ids, Sampling(max_tokens=8)): [] for ids in prompts}
    failed = 0
    while engine.busy:
        try:
            for event in engine.step():
                got[event.request].append(event.piece.token)
        except MemoryError:
            failed += 1
    monkeypatch.undo()
    assert failed > 3
    assert [tuple(t) for t in got.values()] == [complete(model, tokenizer, ids, Sampling(max_tokens=8)).tokens for ids in prompts]


def test_figures_add_up(model, tokenizer):
    now = iter(range(10_000))
    engine = Engine(model, tokenizer, EngineSettings(40, 4, 2, 8), clock=lambda: float(next(now)))
    numbers = [engine.submit([7] * 12 + [8 + i], Sampling(max_tokens=6)) for i in range(4)]
    last = {}
    while engine.busy:
        last |= {e.request: e.figures for e in engine.step() if e.figures}
    for number in numbers:
        f = last[number]
        assert f["request_queue_time_seconds"] + f["request_prefill_time_seconds"] == f["time_to_first_token_seconds"]
        assert f["time_to_first_token_seconds"] + f["request_decode_time_seconds"] == f["e2e_request_latency_seconds"]
        assert f["request_prompt_tokens"] == 13 and 1 <= f["request_generation_tokens"] <= 6
    hits = [last[number]["prefix_cache_hits"] for number in numbers]
    assert hits[0] == 0 and hits[2:] == [12, 12]
    totals = engine.statistics()
    assert totals["prefix_cache_hits"] == sum(hits) and totals["prefix_cache_queries"] == totals["prompt_tokens_total"] == 52
    assert totals["num_requests_running"] == totals["num_requests_waiting"] == totals["kv_cache_usage_perc"] == 0


def test_many_threads_share_one_engine(model, tokenizer):
    shop = EngineThread(Engine(model, tokenizer, EngineSettings(30, 4, 4, 16)))
    rng, found, problems = random.Random(4), {}, []
    shared = [[rng.randrange(6, len(tokenizer)) for _ in range(26)] for _ in range(2)]
    asked = [invent(rng, tokenizer, shared) for _ in range(60)]

    def read(i: int) -> None:
        try:
            if i % 5 == 0:  # goes away
                pieces = shop.stream(*asked[i])
                next(pieces)
                pieces.close()
            elif i % 7 == 0:
                pieces = list(shop.stream(*asked[i], cancelled=lambda: True))
                assert pieces[-1].finish_reason
            else:
                found[i] = [(p.token, p.text) for p in shop.stream(*asked[i])]
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(60)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert problems == [] and len(found) > 30
    for i, pieces in found.items():
        assert pieces == [(p.token, p.text) for p in stream(model, tokenizer, *asked[i])]
    with pytest.raises(InputError, match="empty"):
        shop.stream([])
    left = shop.stream([7], Sampling(max_tokens=60, temperature=1.0, seed=1))
    next(left)
    shop.close()
    assert list(left)[-1].finish_reason in ("cancelled", "length", "stop")
    assert not shop.engine.busy and len(shop.engine.pool.free) == 30
    with pytest.raises(ResourceError, match="closed"):
        shop.stream([7])


def test_when_the_model_fails_everybody_hears_of_it(model, tokenizer, monkeypatch):
    engine = Engine(model, tokenizer, EngineSettings(30, 4, 4, 16))
    shop, real, broken = EngineThread(engine), Engine.step, threading.Event()

    def step(self):
        if broken.is_set():
            raise MemoryError("no memory")
        return real(self)

    monkeypatch.setattr(Engine, "step", step)
    streams = [shop.stream([7, i + 8], Sampling(max_tokens=40, temperature=1.0, seed=i)) for i in range(3)]
    [next(pieces) for pieces in streams]
    broken.set()
    for pieces in streams:
        with pytest.raises(MemoryError):
            list(pieces)
    broken.clear()
    expected = complete(model, tokenizer, [7, 9], Sampling(max_tokens=5)).tokens
    assert tuple(p.token for p in shop.stream([7, 9], Sampling(max_tokens=5))) == expected
    shop.close()
