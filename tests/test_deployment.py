"""The service over real sockets: what clients see, what strangers cannot do, what happens when it ends."""

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import numpy
import openai
import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings
from hypothesis import strategies as st

from llmbook.admission import Allowance, Desk, Job, KeyStore, Records, Refusal, ServiceSettings
from llmbook.core import CorruptFileError, InputError, PolicyError, ResourceError, SettingsError
from llmbook.deployment import create_app, open_socket, serving
from llmbook.protocol import ChatOrder, Observer, Part, Service, TextOrder, parse_order


class Parrot:
    """Each letter is a token; `pace` seconds pass before each."""

    context = 500

    def __init__(self, pace: float = 0.0):
        self.pace, self.spoken, self.stopped = pace, 0, threading.Event()

    def encode(self, prompt):
        if isinstance(prompt, list) and (not prompt or isinstance(prompt[0], int)):
            return prompt
        return list(map(ord, prompt if isinstance(prompt, str) else prompt[-1]["content"]))

    def write(self, ids, options, cancelled):
        said = ids[: options["max_tokens"]]
        for i, letter in enumerate(said, 1):
            time.sleep(self.pace)
            if cancelled():
                self.stopped.set()
                return
            self.spoken += 1
            entry = {"token": chr(letter), "logprob": -0.5, "bytes": [letter % 256], "top_logprobs": []}
            reason = None if i < len(said) else "stop" if i == len(ids) else "length"
            yield Part(chr(letter), 1, reason, [] if options["logprobs"] is None else [entry])


def look_up(question, passages):
    raise InputError("a question that nobody can read")


def embed(texts):
    return numpy.array([[len(text), text.count("a")] for text in texts], dtype="float32") / 10


@contextlib.contextmanager
def opened(service=None, observer=None, **options):
    """A running service: its URL, an HTTP client and the front."""
    settings = ServiceSettings(port=0, **options)
    app = create_app(service or Service(Parrot(), look_up, embed, count=len), settings, observer)
    with serving(app, settings) as url, httpx.Client(base_url=url, trust_env=False, timeout=20) as web:
        yield SimpleNamespace(url=url, web=web, front=app.state.front)


def client_of(house, key="none"):
    return openai.OpenAI(
        base_url=f"{house.url}/v1", api_key=key, max_retries=0, http_client=httpx.Client(trust_env=False)
    )


def eventually(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


HELLO = {"model": "llmbook-chat", "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": "llmbook-chat", "prompt": "hello"}


# ---- what clients see ----


@pytest.fixture(scope="module")
def house():
    with opened(requests_per_minute=100_000, tokens_per_day=10**9) as running:
        yield running


def test_completions(house):
    client = client_of(house)
    whole = client.completions.create(model="llmbook-chat", prompt=["hello"], logprobs=1)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("hello", "stop")
    assert whole.choices[0].logprobs.text_offset == [0, 1, 2, 3, 4]
    assert whole.usage.model_dump(include={"prompt_tokens", "completion_tokens"}) == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
    }
    streamed = list(client.completions.create(model="llmbook-chat", prompt="hello", stream=True, logprobs=1))
    assert "".join(chunk.choices[0].text for chunk in streamed) == "hello"
    assert [chunk.choices[0].logprobs.text_offset for chunk in streamed] == [[0], [1], [2], [3], [4]]
    assert {chunk.id for chunk in streamed} == {streamed[0].id}
    ids = client.completions.create(model="llmbook-chat", prompt=[104, 105])
    assert ids.choices[0].text == "hi"


def test_chat_parts_logprobs_and_usage(house):
    client = client_of(house)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(
        model="llmbook-chat",
        messages=messages,
        logprobs=True,
        top_logprobs=2,
        seed=3,
        stop=["\n"],
        temperature=0.5,
        max_completion_tokens=9,
        extra_body={"top_k": 5},
    )
    assert answer.choices[0].message.content == "ab"
    assert [entry.token for entry in answer.choices[0].logprobs.content] == ["a", "b"]
    stream = client.chat.completions.create(
        model="llmbook-chat", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (last.choices, last.usage.prompt_tokens, last.usage.completion_tokens) == ([], 2, 2)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]


def test_message_that_was_received_can_be_sent_back(house):
    client = client_of(house)
    answer = client.chat.completions.create(**HELLO).choices[0].message
    messages = [*HELLO["messages"], answer, {"role": "user", "content": "again"}]
    assert (
        client.chat.completions.create(model="llmbook-chat", messages=messages).choices[0].message.content == "again"
    )


def test_async_client(house):
    import asyncio

    async def ask():
        web = httpx.AsyncClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="x", http_client=web) as client:
            stream = await client.chat.completions.create(**HELLO, stream=True)
            return "".join([chunk.choices[0].delta.content async for chunk in stream])

    assert asyncio.run(ask()) == "hello"


def test_embeddings_in_both_encodings(house):
    client = client_of(house)
    one = client.embeddings.create(model="llmbook-encoder", input="abba")
    two = client.embeddings.create(model="llmbook-encoder", input=["abba", "b"], encoding_format="float")
    assert numpy.allclose(one.data[0].embedding, two.data[0].embedding)
    assert (len(two.data), two.usage.prompt_tokens, one.usage.prompt_tokens) == (2, 5, 4)
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="llmbook-encoder", input="abba", dimensions=7)


def test_error_of_the_index_is_the_clients_fault(house):
    answer = house.web.post("/v1/answers", json={"question": "?"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    with pytest.raises(openai.APIError, match="nobody can read"):
        list(client_of(house).chat.completions.create(**HELLO | {"model": "llmbook-docs"}, stream=True))


def test_models(house):
    client = client_of(house)
    assert client.models.retrieve("llmbook-chat").id == "llmbook-chat"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt/7")


# ---- bad input ----

WRONG = [
    ({"model": 3}, 400, "model"),
    ({"prompt": 3}, 400, "prompt"),
    ({"max_tokens": "9"}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"n": 2}, 400, "n"),
    ({"max_tokens": 5000}, 400, "max_tokens"),
    ({"max_tokens": 499}, 400, "max_tokens"),
    ({"temperature": 2.5}, 400, "temperature"),
    ({"temperature": -1}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"stop": ["a"] * 5}, 400, None),
    ({"stop": ""}, 400, None),
    ({"stop": [1]}, 400, "stop"),
    ({"seed": 0.5}, 400, "seed"),
    ({"seed": 2**70}, 400, "seed"),
    ({"stream": "yes"}, 400, "stream"),
    ({"echo": True}, 400, "echo"),
    ({"best_of": 3}, 400, "best_of"),
    ({"suffix": "x"}, 400, "suffix"),
    ({"logit_bias": {}}, 400, "logit_bias"),
    ({"tools": []}, 400, "tools"),
    ({"prompt": ""}, 400, None),
    ({"prompt": []}, 400, None),
    ({"prompt": ["a", "b"]}, 400, "prompt"),
    ({"prompt": "x" * 600}, 400, None),
    ({"presence_penalty": 2.5}, 400, "presence_penalty"),
    ({"frequency_penalty": -3}, 400, "frequency_penalty"),
    ({"presence_penalty": "1"}, 400, "presence_penalty"),
    ({"model": "llmbook-docs"}, 404, "model"),
    ({"model": "x" * 150}, 404, "model"),
    ({"logprobs": 99}, 400, "logprobs"),
]


@pytest.mark.parametrize("change, status, param", WRONG)
def test_wrong_field(house, change, status, param):
    answer = house.web.post("/v1/completions", json=TEXT | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b"[" * 5000,
        b'{"a":' * 3000,
        b'{"model": "llmbook-chat", "prompt": "\\ud800"}',
        b'{"model": "llmbook-chat", "prompt": "a", "temperature": NaN}',
    ],
)
def test_malformed_body(house, body):
    answer = house.web.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.sampled_from([*TextOrder.model_fields, *ChatOrder.model_fields, "other"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        ),
        max_size=6,
    )
)
def test_no_body_breaks_the_service(house, body):
    for route, base in (("completions", TEXT), ("chat/completions", HELLO)):
        text = json.dumps(base | body).encode("utf-8", "surrogatepass")
        answer = house.web.post(f"/v1/{route}", content=text, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404), answer.text


def test_paths_methods_and_types(house):
    web = house.web
    assert web.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert web.get("/v1/completions").status_code == 405
    assert web.get("/docs").status_code == 404
    form = web.post("/v1/completions", data={"model": "llmbook-chat"})
    assert (form.status_code, form.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert web.post("/v1/completions", content=b"{}").status_code == 415


def test_body_too_large():
    with opened(body_bytes=1000) as house:
        long = json.dumps(TEXT | {"user": "x" * 3000}).encode()
        headers = {"content-type": "application/json"}
        assert house.web.post("/v1/completions", content=long, headers=headers).status_code == 413
        chunked = house.web.post("/v1/completions", content=iter([long[:500], long[500:]]), headers=headers)
        assert chunked.status_code == 413
        with pytest.raises(openai.APIStatusError, match="1,000 bytes") as caught:
            client_of(house).completions.create(model="llmbook-chat", prompt="y" * 2000)
        assert caught.value.status_code == 413
        assert house.web.post("/v1/completions", json=TEXT).status_code == 200


def test_parse_order_names_the_field():
    with pytest.raises(Refusal, match="unknown field `temprature`") as caught:
        parse_order(TextOrder, json.dumps(TEXT | {"temprature": 1}).encode())
    assert caught.value.code == "unknown_parameter"
    with pytest.raises(Refusal, match=r"messages\.0\.role"):
        parse_order(ChatOrder, b'{"model": "m", "messages": [{"role": "tool", "content": ""}]}')


# ---- who may ----


def test_keys_and_roles(tmp_path):
    store = KeyStore(tmp_path / "keys.json")
    user, admin, reader = store.create("ada"), store.create("root", "admin"), store.create("prometheus", "metrics")
    with opened(keys=str(store.path)) as house:

        def status(path, key=None, header="Bearer {}"):
            headers = {"authorization": header.format(key)} if key else {}
            return house.web.get(path, headers=headers).status_code

        assert [status("/v1/models", key) for key in (user, admin, reader, "wrong", None)] == [
            200,
            200,
            403,
            401,
            401,
        ]
        assert [status("/metrics", key) for key in (user, admin, reader, "wrong", None)] == [403, 200, 200, 401, 401]
        assert status("/v1/models", user, "Basic {}") == 401 and status("/v1/models", user, "bearer {}") == 200
        assert [status(path) for path in ("/health", "/ready", "/")] == [200, 200, 200]
        refused = house.web.post("/v1/completions", content=b"not even json")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        store.revoke("ada")
        assert status("/v1/models", user) == 401
        with pytest.raises(openai.AuthenticationError):
            client_of(house, user).models.list()


def test_key_store(tmp_path):
    path = tmp_path / "keys.json"
    store = KeyStore(path)
    secret = store.create("ada", requests_per_minute=5)
    assert oct(path.stat().st_mode & 0o777) == "0o600" and secret not in path.read_text()
    with pytest.raises(InputError, match="no valid key has"):
        store.create("ada")
    with pytest.raises(InputError, match="role `boss`"):
        store.create("eve", "boss")
    with pytest.raises(InputError, match="no valid key `eve`"):
        store.revoke("eve")
    assert KeyStore(path).find(secret).requests_per_minute == 5
    names = [f"k{i}" for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: KeyStore(path).create(name), names))
    assert {key.name for key in store.keys()} == {"ada", *names}
    path.write_text(path.read_text()[:50])
    with pytest.raises(CorruptFileError):
        KeyStore(path).keys()


def test_open_only_on_this_machine(tmp_path):
    service = Service(Parrot())
    with pytest.raises(PolicyError, match="without keys"):
        create_app(service, ServiceSettings(host="0.0.0.0"))
    with pytest.raises(PolicyError, match="no valid key"):
        create_app(service, ServiceSettings(keys=str(tmp_path / "none.json")))
    with opened() as house:
        rebound = house.web.get("/v1/models", headers={"host": "cats.example:80"})
        assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "host_not_allowed")


def test_headers(house):
    for path in ("/", "/health", "/v1/models", "/nowhere"):
        headers = house.web.get(path, headers={"origin": "https://evil.example"}).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["x-request-id"] and "server" not in headers
        assert not any(name.startswith("access-control") for name in headers)
    preflight = house.web.request(
        "OPTIONS",
        "/v1/completions",
        headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
    )
    assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers


def test_no_stack_trace_for_the_client(caplog):
    class Broken(Parrot):
        def write(self, ids, options, cancelled):
            yield Part("a", 1)
            raise RuntimeError("the password is sesame")

    with opened(Service(Broken())) as house:
        answer = house.web.post("/v1/completions", json=TEXT)
        assert answer.status_code == 500 and "sesame" not in answer.text
        assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
        assert "sesame" in caplog.text
        with pytest.raises(openai.APIError, match="something went wrong"):
            list(client_of(house).completions.create(**TEXT, stream=True))
        assert house.web.get("/ready").status_code == 200


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl command to make a certificate")
def test_tls(tmp_path):
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            key,
            "-out",
            chain,
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ],
        check=True,
        capture_output=True,
    )
    import ssl

    settings = ServiceSettings(port=0, certificate=str(chain), certificate_key=str(key))
    with serving(create_app(Service(Parrot()), settings), settings) as url:
        trust = ssl.create_default_context(cafile=str(chain))
        answer = httpx.get(f"{url}/health", verify=trust, trust_env=False)
    assert url.startswith("https://") and "strict-transport-security" in answer.headers


# ---- how much ----


def test_rate():
    with opened(requests_per_minute=3) as house:
        answers = [house.web.post("/v1/completions", json=TEXT) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert 0 < int(answers[-1].headers["retry-after"]) <= 60
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers[:3]] == ["2", "1", "0"]
        with pytest.raises(openai.RateLimitError):
            client_of(house).completions.create(**TEXT)


def test_daily_budget_survives_a_restart(tmp_path):
    records = str(tmp_path / "records")
    for used in (0, 10):
        with opened(records=records, tokens_per_day=25) as house:
            assert house.front.ledger.spent("local") == used
            answer = house.web.post("/v1/completions", json=TEXT | {"max_tokens": 5})
            assert answer.status_code == 200
    with opened(records=records, tokens_per_day=25) as house:
        answer = house.web.post("/v1/completions", json=TEXT | {"max_tokens": 5})
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "insufficient_quota")
        assert int(answer.headers["retry-after"]) <= 86400


def test_ledger_under_threads():
    ledger = Allowance()

    def use(_):
        with contextlib.suppress(Refusal):
            ledger.reserve("ada", 10, 200)(3)
            return 3
        return 0

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        used = sum(pool.map(use, range(500)))
    assert ledger.spent("ada") == used <= 200


def test_audit_log(tmp_path):
    for prompts in (False, True):
        folder = tmp_path / str(prompts)
        with opened(records=str(folder), record_prompts=prompts) as house:
            house.web.post("/v1/completions", json=TEXT | {"prompt": "my secret"})
            house.web.post("/v1/completions", json=TEXT | {"n": 3})
            house.web.get("/health")
        first, second = map(json.loads, (folder / "audit.jsonl").read_text().splitlines())
        assert (first["status"], first["prompt_tokens"], first["completion_tokens"]) == (200, 9, 9)
        assert (second["status"], second["error"]) == (400, "invalid_value")
        assert ("my secret" in json.dumps(first)) is prompts


def test_records_pass_over_what_is_torn(tmp_path, caplog):
    records = Records(tmp_path)
    records.append("a.jsonl", {"n": 1})
    with open(tmp_path / "a.jsonl", "a") as stream:
        stream.write('[3]\n{"time": 5}\n{"n": ')
    assert [line["n"] for line in records.today("a.jsonl")] == [1]
    records.folder = tmp_path / "gone"
    records.append("a.jsonl", {"n": 2})
    assert "cannot write" in caplog.text


def test_feedback(tmp_path):
    with opened(records=str(tmp_path)) as house:
        answer = house.web.post("/v1/chat/completions", json=HELLO).json()
        rating = {"id": answer["id"], "rating": "up", "comment": "kind"}
        assert house.web.post("/v1/feedback", json=rating).status_code == 200
        assert house.web.post("/v1/feedback", json=rating | {"id": "chatcmpl-0"}).status_code == 404
        assert house.web.post("/v1/feedback", json=rating | {"rating": "great"}).status_code == 400
    kept = json.loads((tmp_path / "feedback.jsonl").read_text())
    assert (kept["id"], kept["rating"], kept["comment"]) == (answer["id"], "up", "kind")


# ---- more than it can serve ----


def test_full_queue():
    with opened(Service(Parrot(0.05)), queue=1) as house, concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: house.web.post("/v1/completions", json=TEXT), range(6)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200, 200, 429, 429, 429, 429]
    full = next(answer for answer in answers if answer.status_code == 429)
    assert full.json()["error"]["code"] == "queue_full" and int(full.headers["retry-after"]) >= 1


def test_many_clients_get_their_own_answer():
    with opened(queue=100, workers=3, requests_per_minute=10_000) as house:

        def ask(number):
            text = f"text number {number}"
            if number % 2:
                return (
                    house.web.post("/v1/completions", json=TEXT | {"prompt": text}).json()["choices"][0]["text"]
                    == text
                )
            stream = client_of(house).completions.create(model="llmbook-chat", prompt=text, stream=True)
            return "".join(chunk.choices[0].text for chunk in stream) == text

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert all(pool.map(ask, range(120)))
        assert eventually(lambda: not house.front.writing.running and not house.front.writing.waiting)


def test_look_up_does_not_wait_for_a_long_text():
    with opened(Service(Parrot(0.1), embed=embed)) as house:
        with house.web.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as stream:
            next(stream.iter_lines())
            answer = house.web.post("/v1/embeddings", json={"model": "llmbook-encoder", "input": "a"})
            assert answer.status_code == 200 and house.front.writing.running


@pytest.mark.parametrize("stream", [True, False])
def test_client_gone_cancels_the_work(stream):
    parrot = Parrot(0.02)
    with opened(Service(parrot)) as house:
        body = json.dumps(TEXT | {"prompt": "x" * 400, "stream": stream, "max_tokens": 90}).encode()
        with socket.create_connection(house.url.removeprefix("http://").split(":")) as line:
            line.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )
            assert eventually(lambda: parrot.spoken > 3)
        assert parrot.stopped.wait(2), "the writer was not told"
        assert parrot.spoken < 40
        assert eventually(lambda: not house.front.writing.running)
        assert eventually(lambda: house.front.ledger.spent("local") == 400 + parrot.spoken)
        assert house.web.post("/v1/completions", json=TEXT).status_code == 200


def test_client_gone_while_waiting_frees_its_place():
    parrot = Parrot(0.05)
    with opened(Service(parrot), queue=1) as house, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(house.web.post, "/v1/completions", json=TEXT | {"prompt": "x" * 20})
        assert eventually(lambda: parrot.spoken)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{house.url}/v1/completions", json=TEXT, timeout=0.2, trust_env=False)
        assert eventually(lambda: not house.front.writing.waiting)
        assert running.result().status_code == 200
        assert parrot.spoken == 20


def test_request_that_takes_too_long():
    with opened(Service(Parrot(0.05)), request_seconds=0.3) as house:
        answer = house.web.post("/v1/completions", json=TEXT | {"prompt": "x" * 40})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        with pytest.raises(openai.APIError, match="too long"):
            list(client_of(house).completions.create(model="llmbook-chat", prompt="x" * 40, stream=True))
        assert eventually(lambda: not house.front.writing.running)


def test_slow_body(monkeypatch):
    import llmbook.deployment

    monkeypatch.setattr(llmbook.deployment.read_body, "__defaults__", (0.2,))
    with opened() as house:
        with socket.create_connection(house.url.removeprefix("http://").split(":")) as line:
            line.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"content-length: 50\r\n\r\n{"
            )
            line.settimeout(5)
            assert b" 408 " in line.recv(100)


# ---- start and stop ----


def test_loading_in_the_background():
    gate = threading.Event()

    def load():
        gate.wait(10)
        return Service(Parrot())

    settings = ServiceSettings(port=0)
    with serving(create_app(load, settings), settings) as url, httpx.Client(base_url=url, trust_env=False) as web:
        assert web.get("/health").status_code == 200
        loading = web.get("/ready")
        assert (loading.status_code, loading.json()["error"]["code"]) == (503, "loading") and loading.headers[
            "retry-after"
        ]
        assert web.post("/v1/completions", json=TEXT).status_code == 503
        gate.set()
        assert eventually(lambda: web.get("/ready").status_code == 200)
        assert web.post("/v1/completions", json=TEXT).status_code == 200


def test_drain_is_bounded():
    parrot = Parrot(0.05)
    with opened(Service(parrot), drain_seconds=0.2) as house:
        with pytest.raises(openai.APIError, match="stopping"):
            for i, _ in enumerate(
                client_of(house).completions.create(model="llmbook-chat", prompt="x" * 300, stream=True)
            ):
                if i == 2:
                    threading.Thread(target=house.front.stop, args=(0.2,)).start()
    assert parrot.spoken < 60


def test_desk_drains_and_refuses():
    import asyncio

    async def scene():
        desk = Desk(places=5)
        jobs = [Job(lambda cancelled: ["part"]) for _ in range(4)]
        for job in jobs:
            desk.submit(job)
        done = await asyncio.to_thread(desk.drain, 5)
        with pytest.raises(Refusal) as caught:
            desk.submit(Job(lambda cancelled: []))
        counts = [len([event async for event in job.events()]) for job in jobs]
        return done, caught.value.status, counts

    assert asyncio.run(scene()) == (True, 503, [2, 2, 2, 2])


def test_port_that_is_taken():
    with open_socket(ServiceSettings(port=0)) as door:
        with pytest.raises(ResourceError, match="choose another `port`"):
            open_socket(ServiceSettings(port=door.getsockname()[1]))


SCRIPT = """
import sys, time
from llmbook.deployment import create_app, open_socket, run_service
from llmbook.admission import ServiceSettings
from llmbook.protocol import Part, Service

class Slow:
    context = 100
    def encode(self, prompt): return list(map(ord, prompt))
    def write(self, ids, options, cancelled):
        for i in ids:
            time.sleep(0.1)
            if cancelled(): return
            yield Part(chr(i), 1)
        yield Part("", 0, "stop")

settings = ServiceSettings(port=int(sys.argv[1]), drain_seconds=20)
run_service(create_app(Service(Slow()), settings), settings, print)
print("left in order")
"""


def test_sigterm_finishes_what_runs():
    with open_socket(ServiceSettings(port=0)) as door:
        port = door.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        web = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20)

        def up():
            with contextlib.suppress(httpx.TransportError):
                return web.get("/ready").status_code == 200

        assert eventually(up, 30)
        house = SimpleNamespace(url=f"http://127.0.0.1:{port}")
        text = ""
        for i, chunk in enumerate(
            client_of(house).completions.create(model="llmbook-chat", prompt="to the end", stream=True)
        ):
            text += chunk.choices[0].text
            if i == 1:
                os.kill(process.pid, signal.SIGTERM)
                assert eventually(lambda: web.get("/ready").status_code == 503, 5)
                refused = web.post("/v1/completions", json=TEXT)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert text == "to the end"
        out, error = process.communicate(timeout=20)
        assert (process.returncode, out, error) == (0, f"http://127.0.0.1:{port}\nleft in order\n".encode(), b"")
    finally:
        process.kill()


def test_settings_are_checked():
    for wrong in ({"port": 70_000}, {"queue": -1}, {"workers": -1}, {"drain_seconds": 0}, {"certificate": "a.pem"}):
        with pytest.raises(SettingsError):
            ServiceSettings(**wrong)


# ---- observers, and the chapters below ----


def test_observer_sees_every_request_once():
    seen = []

    class Watch(Observer):
        def request_started(self, ticket):
            seen.append(("started", ticket.operation))

        def finished(self, ticket):
            seen.append(("finished", ticket.finish_reason, ticket.completion_tokens))

        def rejected(self, ticket, refusal):
            seen.append(("rejected", refusal.status))

    with opened(observer=Watch()) as house:
        house.web.post("/v1/completions", json=TEXT | {"max_tokens": 2})
        house.web.post("/v1/completions", json=TEXT | {"n": 9})
        list(client_of(house).chat.completions.create(**HELLO, stream=True))
    assert eventually(lambda: len(seen) == 5)
    assert seen == [
        ("started", "text_completion"),
        ("finished", "length", 2),
        ("rejected", 400),
        ("started", "chat"),
        ("finished", "stop", 5),
    ]


def test_observer_can_refuse():
    class Miser(Observer):
        def request_started(self, ticket):
            raise Refusal(429, "insufficient_quota", "no money")

    with opened(observer=Miser()) as house:
        assert house.web.post("/v1/completions", json=TEXT).json()["error"]["type"] == "insufficient_quota"
        eventually(lambda: house.front.ledger.spent("local") == 0)  # settled as the request leaves


def test_decoder_behind_the_service(tmp_path):
    import torch

    from llmbook.architecture import Decoder, derive_decoder
    from llmbook.bridge import save_model
    from llmbook.generation import Sampling, complete
    from llmbook.tokenization import train_tokenizer

    texts = [f"Return the {word} of a number, héllo ✓." for word in ("sum", "root", "name", "part")] * 20
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(0)
    model = Decoder(derive_decoder(1, 300, context=96))
    save_model(model, tokenizer, tmp_path / "model")
    service = Service.load(model=tmp_path / "model")
    expected = complete(model, tokenizer, "Return the", Sampling(max_tokens=12, temperature=0.8, seed=5, logprobs=3))
    with opened(service, workers=2, requests_per_minute=1000) as house:
        client = client_of(house)
        ask = lambda **more: client.completions.create(
            model="llmbook-chat", prompt="Return the", max_tokens=12, temperature=0.8, seed=5, **more
        )
        answer = ask(logprobs=3)
        assert answer.choices[0].text == expected.text == "".join(c.choices[0].text for c in ask(stream=True))
        assert answer.usage.completion_tokens == len(expected.tokens)
        assert answer.usage.prompt_tokens == expected.prompt_tokens
        assert numpy.allclose(answer.choices[0].logprobs.token_logprobs, expected.logprobs, atol=1e-4)
        assert all(len(top) <= 3 for top in answer.choices[0].logprobs.top_logprobs)
        chat = client.chat.completions.create(**HELLO, max_tokens=4, logprobs=True)
        assert chat.choices[0].logprobs.content[0].top_logprobs == []
        with pytest.raises(openai.BadRequestError, match="tokens"):
            client.completions.create(model="llmbook-chat", prompt="number " * 200)
        with pytest.raises(openai.BadRequestError, match="token ids"):
            client.completions.create(model="llmbook-chat", prompt=[1, 999_999])
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda _: ask().choices[0].text, range(16)))
        assert set(texts) == {expected.text}


def test_index_behind_the_service(tmp_path):
    import inspect

    import pandas
    import textwrap

    from llmbook.retrieval import index_documents

    rows = [
        {
            "id": f"textwrap-{name}",
            "text": inspect.getdoc(value),
            "symbol": f"textwrap.{name}",
            "kind": "function",
            "signature": "",
            "source": "Python",
            "module": "textwrap",
            "licence": "PSF-2.0",
            "language": "en",
            "collected": "2026-01-01",
            "sha256": "",
        }
        for name, value in vars(textwrap).items()
        if inspect.isfunction(value) and inspect.getdoc(value)
    ]
    index_documents(pandas.DataFrame(rows)).save(tmp_path / "index")
    service = Service.load(index=tmp_path / "index")
    assert "What does textwrap.fill do?" in service.examples
    question = {"role": "user", "content": "What does textwrap.dedent do?"}
    with opened(service) as house:
        message = client_of(house).chat.completions.create(model="llmbook-docs", messages=[question]).choices[0].message
        first = message.citations[0]
        assert first["symbol"] == "textwrap.dedent" and first["licence"] == "PSF-2.0"
        assert first["quote"] in inspect.getdoc(textwrap.dedent)
        assert message.content.endswith("[1] textwrap.dedent (Python, PSF-2.0)")
        plain = house.web.post("/v1/answers", json={"question": question["content"]}).json()
        assert plain["citations"][0] == first and "[1] textwrap.dedent" not in plain["text"]


def test_comment_after_a_rating_is_not_a_second_rating(tmp_path):
    ratings = []
    observer = Observer()
    observer.feedback = ratings.append
    with opened(observer=observer, records=str(tmp_path)) as house:
        name = house.web.post("/v1/completions", json=TEXT).json()["id"]
        for rating, comment in (("down", ""), ("down", "too short"), ("up", "")):
            house.web.post("/v1/feedback", json={"id": name, "rating": rating, "comment": comment})
    assert ratings == ["down", "up"] and len((tmp_path / "feedback.jsonl").read_text().splitlines()) == 3
