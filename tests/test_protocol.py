"""The engine behind the service: shared steps, unchanged texts, pages that come back, threads that end."""

import concurrent.futures
import json
import random
import socket
import threading
import time
from dataclasses import replace

import openai
import pytest
from sample_models import build_decoder, build_tokenizer
from test_deployment import Parrot, client_of, eventually, opened

from llmbook.admission import Refusal
from llmbook.core import InputError
from llmbook.engine import Engine, EngineSettings
from llmbook.generation import Sampling, chat_ids, complete, describe_logprobs, stream
from llmbook.protocol import ChatOrder, DecoderWriter, Service, TextOrder, parse_order, plan_engine

PROMPTS = ["Return the sum", "Open a file", "日本語", "naïve lines", "Return the sum of a list", "“quoted”", "🙂🙂", "a"]
GREEDY = {"max_tokens": 24, "logprobs": None}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_decoder(len(tokenizer)).double()  # a tie in double precision is not met by chance


@pytest.fixture()
def writer(model, tokenizer):
    made = DecoderWriter(model, tokenizer)
    yield made
    made.close()


def engines() -> int:
    """Threads of engines that live."""
    return sum(thread.name == "engine" for thread in threading.enumerate())


def text_of(writer, prompt, options=GREEDY, cancelled=lambda: False):
    return "".join(part.text for part in writer.write(writer.encode(prompt), options, cancelled))


def hold(engine: Engine, party: int) -> list[int]:
    """Let the engine begin when so many wait; returns how many requests read in each step, as it grows."""
    widths, step = [], engine.step

    def held():
        if not widths and len(engine.waiting) < party:
            time.sleep(0.001)
            told, engine._told = engine._told, []  # who leaves hears of it
            return told
        events = step()
        widths.append(len(engine.work))
        return events

    engine.step = held
    return widths


def started(writer) -> Engine:
    """The engine of a writer, begun with one token."""
    text_of(writer, "a", GREEDY | {"max_tokens": 1})
    return writer.engine


def opened_writer(writer, **options):
    return opened(Service(writer), requests_per_minute=10_000, tokens_per_day=10**9, **options)


def alone(model, tokenizer, prompt, **options):
    return complete(model, tokenizer, prompt, Sampling(**{"max_tokens": 24} | options)).text


# ---- texts ----


def test_concurrent_texts_are_those_of_one_by_one_decoding(model, tokenizer):
    """Hundreds of requests of many kinds, a third of which leave early, in an engine with far too few pages."""
    writer = DecoderWriter(model, tokenizer, EngineSettings(pages=14, page_size=8, streams=6, step_tokens=24, waiting=100))
    rng, kinds = random.Random(0), (
        {}, {}, {"temperature": 0.9, "seed": 5}, {"presence_penalty": 1.5, "frequency_penalty": -0.5},
        {"stop": ("e",)}, {"repetition_penalty": 1.4},
    )
    jobs = [(rng.choice(PROMPTS), rng.choice(kinds), rng.choice((99, 99, rng.randrange(4)))) for _ in range(240)]
    expected = {}
    for prompt, kind, _ in jobs:
        if (prompt, str(kind)) not in expected:
            expected[prompt, str(kind)] = alone(model, tokenizer, prompt, **kind)

    def ask(job):
        prompt, kind, leave = job
        said = []
        for part in writer.write(writer.encode(prompt), GREEDY | kind, lambda: len(said) >= leave):
            said.append(part)
        return "".join(part.text for part in said), said[-1].finish_reason if said else None

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, jobs))
    for (prompt, kind, leave), (text, reason) in zip(jobs, answers, strict=True):
        whole = expected[prompt, str(kind)]
        assert text == whole if reason else leave < 99 and whole.startswith(text)
    assert sum(reason is None for _, reason in answers) > 20 and writer.statistics()["num_preemptions_total"] > 0
    assert eventually(lambda: not writer.engine.busy) and writer.statistics()["kv_cache_usage_perc"] == 0
    writer.close()


def test_concurrent_requests_share_steps(model, tokenizer, writer):
    widths = hold(started(writer), party=8)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda prompt: text_of(writer, prompt), PROMPTS))
    assert texts == [alone(model, tokenizer, prompt) for prompt in PROMPTS]
    longest = max(len(complete(model, tokenizer, prompt, Sampling(max_tokens=24)).tokens) for prompt in PROMPTS)
    assert max(widths) == 8 and len(widths) == longest  # prompts fit in the first step, which makes the first tokens


def test_http_streams_share_steps(model, tokenizer, writer):
    """The same through sockets, the front's queue and its workers, with default settings."""
    widths = hold(started(writer), party=8)
    with opened_writer(writer) as house, concurrent.futures.ThreadPoolExecutor(8) as pool:
        client = client_of(house)

        def ask(prompt):
            chunks = client.completions.create(
                model="llmbook-chat", prompt=prompt, max_tokens=24, temperature=0, stream=True
            )
            return "".join(chunk.choices[0].text for chunk in chunks)

        assert list(pool.map(ask, PROMPTS)) == [alone(model, tokenizer, prompt) for prompt in PROMPTS]
    assert max(widths) == 8 and len(widths) <= 24


def test_logprobs_and_penalties(model, tokenizer, writer):
    sampling = Sampling(max_tokens=9, logprobs=3)
    pieces = list(stream(model, tokenizer, writer.encode(PROMPTS[0]), sampling))
    for wanted in (0, 3):
        entries = [
            entry
            for part in writer.write(writer.encode(PROMPTS[0]), {"max_tokens": 9, "logprobs": wanted}, lambda: False)
            for entry in part.logprobs
        ]
        mine = [describe_logprobs(tokenizer, piece) for piece in pieces]
        assert [entry["token"] for entry in entries] == [entry["token"] for entry in mine]
        assert all(abs(a["logprob"] - b["logprob"]) < 1e-5 for a, b in zip(entries, mine, strict=True))
        assert all(len(entry["top_logprobs"]) == wanted for entry in entries)
    with opened_writer(writer) as house:
        ask = lambda **more: client_of(house).completions.create(
            model="llmbook-chat", prompt=PROMPTS[0], max_tokens=24, temperature=0, **more
        ).choices[0].text
        given = {"presence_penalty": 2.0, "frequency_penalty": 1.5}
        assert ask(**given) == alone(model, tokenizer, PROMPTS[0], **given) != ask()


def test_penalties_in_the_range_of_openai():
    body = {"model": "m", "prompt": "a"}
    for name in ("presence_penalty", "frequency_penalty"):
        for value in (-2, 0, 1.5, 2):
            assert parse_order(TextOrder, json.dumps(body | {name: value}).encode()).options()[name] == value
        for value in (-2.01, 2.5, "1", True, []):
            with pytest.raises(Refusal, match=name):
                parse_order(TextOrder, json.dumps(body | {name: value}).encode())
    assert "presence_penalty" not in parse_order(TextOrder, json.dumps(body).encode()).options()
    assert ChatOrder.model_fields["presence_penalty"].annotation == float | None


def test_chat_prompts(writer, tokenizer):
    messages = [{"role": "user", "content": "Return the sum"}]
    assert writer.encode(messages) == chat_ids(tokenizer, messages)
    with pytest.raises(InputError, match="token ids"):
        writer.encode([1, 10**6])


# ---- how much at once ----


def test_plan_grants_whole_contexts_within_the_limit(model):
    shape = model.settings
    page = 2 * shape.depth * shape.key_value_heads * shape.channels * 16 * 8  # bytes, double precision
    whole = -(-shape.context // 16)
    assert plan_engine(model, 4).pages == 4 * whole
    assert plan_engine(model, 400).step_tokens == 400
    assert plan_engine(model, 4, most=3 * whole * page).pages == 3 * whole
    assert plan_engine(model, 4, most=0).pages == whole
    engine = Engine(model, build_tokenizer(), plan_engine(model, 4))
    assert engine.cache.pages.element_size() * engine.cache.pages.numel() == 4 * whole * page


@pytest.mark.parametrize("options, streams, at_once", [({}, 3, 3), ({"workers": 2}, 3, 2)])
def test_front_admits_what_the_engine_serves_then_queues_then_refuses(model, tokenizer, options, streams, at_once):
    writer = DecoderWriter(model, tokenizer, plan_engine(model, streams))
    engine = started(writer)
    hold(engine, party=99)
    with opened_writer(writer, queue=2, drain_seconds=0.1, **options) as house:
        ask = lambda: house.web.post("/v1/completions", json={"model": "llmbook-chat", "prompt": "a", "max_tokens": 5})
        pool = concurrent.futures.ThreadPoolExecutor(at_once + 2)
        answers = [pool.submit(ask) for _ in range(at_once + 2)]
        desk = house.front.writing
        assert eventually(lambda: (len(desk.running), len(desk.waiting)) == (at_once, 2))
        assert eventually(lambda: len(engine.waiting) == at_once)
        refused = ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        del engine.step
        assert [answer.result().status_code for answer in answers] == [200] * (at_once + 2)
        pool.shutdown()


def test_full_engine_is_a_429_and_a_closed_one_a_503(model, tokenizer):
    writer = DecoderWriter(model, tokenizer, replace(plan_engine(model, 1), waiting=0))
    hold(started(writer), party=99)
    with opened_writer(writer, workers=4) as house, concurrent.futures.ThreadPoolExecutor(1) as pool:
        ask = lambda: house.web.post("/v1/completions", json={"model": "llmbook-chat", "prompt": "a", "max_tokens": 5})
        first = pool.submit(ask)
        assert eventually(lambda: writer.engine.waiting)
        full = ask()
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full") and full.headers["retry-after"]
        with pytest.raises(openai.APIError, match="try again"):
            list(client_of(house).completions.create(model="llmbook-chat", prompt="a", stream=True))
        writer.close()
        closed = first.result()
        assert (closed.status_code, closed.json()["error"]["code"]) == (503, "draining") and closed.headers["retry-after"]
        del writer.engine.step
        assert ask().status_code == 200  # the next request starts it again


def test_request_that_can_never_run_is_the_clients_fault(model, tokenizer):
    writer = DecoderWriter(model, tokenizer, EngineSettings(pages=2, page_size=4, streams=2, step_tokens=8))
    with opened_writer(writer) as house:
        ask = lambda prompt, most: house.web.post(
            "/v1/completions", json={"model": "llmbook-chat", "prompt": prompt, "max_tokens": most}
        )
        few, long = ask("a", 40), ask("Return the sum " * 60, 4)
        assert (few.status_code, few.json()["error"]["code"]) == (400, "invalid_value") and "pages" in few.text
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert ask("a", 4).status_code == 200


def test_broken_model_breaks_who_is_there_and_nobody_else(model, tokenizer, caplog):
    writer = DecoderWriter(model, tokenizer)
    engine = started(writer)
    hold(engine, party=2)
    held = engine.step

    def broken():
        if len(engine.waiting) == 2:
            raise RuntimeError("the password is sesame")
        return held()

    engine.step = broken
    with opened_writer(writer) as house, concurrent.futures.ThreadPoolExecutor(2) as pool:
        ask = lambda _: house.web.post("/v1/completions", json={"model": "llmbook-chat", "prompt": "a", "max_tokens": 5})
        answers = list(pool.map(ask, range(2)))
        assert [answer.status_code for answer in answers] == [500, 500] and "sesame" not in answers[0].text
        del engine.step
        assert ask(0).status_code == 200


# ---- who leaves, and what ends ----


def test_who_leaves_while_waiting_for_pages_is_let_go_at_once(model, tokenizer):
    writer = DecoderWriter(model, tokenizer, EngineSettings(pages=8, page_size=8, streams=4, step_tokens=16))
    engine = started(writer)
    hold(engine, party=99)
    gone = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stays = pool.submit(text_of, writer, "a", GREEDY)
        leaves = pool.submit(text_of, writer, "Return the sum", GREEDY, gone.is_set)
        assert eventually(lambda: len(engine.waiting) == 2)
        gone.set()
        assert leaves.result(5) == ""  # no token was made for anybody
        assert len(engine.waiting) == 1 and not stays.done()
        del engine.step
        assert stays.result(20) == alone(model, tokenizer, "a")
    writer.close()


@pytest.mark.parametrize("streamed", [True, False])
def test_client_gone_frees_its_pages(model, tokenizer, writer, streamed):
    engine = started(writer)
    step = engine.step
    engine.step = lambda: (time.sleep(0.02), step())[1]
    with opened_writer(writer) as house:
        body = json.dumps({"model": "llmbook-chat", "prompt": "a" * 10, "stream": streamed, "max_tokens": 80}).encode()
        with socket.create_connection(house.url.removeprefix("http://").split(":")) as line:
            line.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )
            assert eventually(lambda: engine.running and engine.running[0].made > 3)
        assert eventually(lambda: not engine.running and not house.front.writing.running, 2)
        figures = writer.statistics()
        assert figures["kv_cache_usage_perc"] == 0 and figures["generation_tokens_total"] < 60


def test_deadline_frees_the_pages(writer):
    engine = started(writer)
    step = engine.step
    engine.step = lambda: (time.sleep(0.05), step())[1]
    with opened_writer(writer, request_seconds=0.3) as house:
        answer = house.web.post("/v1/completions", json={"model": "llmbook-chat", "prompt": "a", "max_tokens": 80})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert eventually(lambda: not engine.busy, 2) and writer.statistics()["kv_cache_usage_perc"] == 0


def test_no_thread_is_left_behind(model, tokenizer):
    before, threads = engines(), threading.active_count()
    writer = DecoderWriter(model, tokenizer)
    writer.close()
    assert writer.statistics() == {} and engines() == before
    for _ in range(2):  # a service that was stopped may be served again
        with opened_writer(writer) as house:
            assert engines() == before
            client_of(house).completions.create(model="llmbook-chat", prompt="a", max_tokens=3)
            assert engines() == before + 1
        assert engines() == before
    writer.close()
    assert eventually(lambda: threading.active_count() <= threads)
    assert writer.statistics()["generation_tokens_total"] == 6


def test_drain_finishes_what_the_engine_writes(model, tokenizer, writer):
    engine = started(writer)
    step = engine.step
    engine.step = lambda: (time.sleep(0.01), step())[1]
    with opened_writer(writer) as house, concurrent.futures.ThreadPoolExecutor(4) as pool:
        ask = lambda prompt: house.web.post(
            "/v1/completions", json={"model": "llmbook-chat", "prompt": prompt, "max_tokens": 24, "temperature": 0}
        )
        answers = [pool.submit(ask, prompt) for prompt in PROMPTS[:4]]
        assert eventually(lambda: len(engine.running) == 4)
        assert house.front.stop(20)
        texts = [answer.result().json()["choices"][0]["text"] for answer in answers]
        assert texts == [alone(model, tokenizer, prompt) for prompt in PROMPTS[:4]]
        assert ask("a").status_code == 503 and not engine.busy


def test_nothing_starts_for_who_has_left(writer):
    assert text_of(writer, "a", cancelled=lambda: True) == "" and writer.engine is None


def test_plain_writers_still_write_one_at_a_time():
    parrot = Parrot(0.05)
    with opened(Service(parrot)) as house, concurrent.futures.ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(house.web.post, "/v1/completions", json={"model": "llmbook-chat", "prompt": "abc"}) for _ in range(3)]
        assert not eventually(lambda: len(house.front.writing.running) > 1, 0.3)
        assert [job.result().status_code for job in jobs] == [200] * 3
