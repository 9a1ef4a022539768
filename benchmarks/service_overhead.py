"""What the service adds to a request beyond the engine (goal S1: at most 5 ms, median).

Two sides, interleaved: the same writer called directly, and asked over a socket through every check, with keys,
log and metrics on. The last column is the floor: the web framework alone, answering a constant.
Usage: python benchmarks/service_overhead.py [result.json]
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
from fastapi import FastAPI

from llmbook.admission import KeyStore, ServiceSettings
from llmbook.core import Table
from llmbook.deployment import create_app, serving
from llmbook.monitoring import PrometheusObserver
from llmbook.protocol import Part, Service

ROUNDS, WARM = 400, 40


class Constant:
    """An engine that costs nothing: so many tokens at once."""

    context = 4096

    def encode(self, prompt):
        return [1] * 32

    def write(self, ids, options, cancelled):
        for _ in range(options["max_tokens"] - 1):
            yield Part("word ", 1)
        yield Part("end", 1, "stop")


def timed(function) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def measure() -> list[dict]:
    """Medians of interleaved rounds."""
    folder = Path(tempfile.mkdtemp())
    store = KeyStore(folder / "keys.json")
    key = store.create("bench", requests_per_minute=10**6, tokens_per_day=10**12)
    settings = ServiceSettings(port=0, keys=str(store.path), records=str(folder / "records"))
    app, engine = create_app(Service(Constant()), settings, PrometheusObserver()), Constant()

    async def constant():
        return {"answer": "end"}

    bare = FastAPI()
    bare.add_api_route("/constant", constant, methods=["POST"])
    bare.state.front = app.state.front
    rows = []
    with (
        serving(app, settings) as url,
        serving(bare, ServiceSettings(port=0)) as floor,
        httpx.Client(trust_env=False) as web,
    ):
        headers = {"authorization": f"Bearer {key}"}
        for tokens, stream in ((1, False), (1, True), (64, False), (64, True)):
            body = {"model": "llmbook-chat", "prompt": "a question", "max_tokens": tokens, "stream": stream}

            def ask(body=body):
                response = web.post(f"{url}/v1/completions", json=body, headers=headers)
                assert response.status_code == 200, response.text

            direct = lambda n=tokens: list(engine.write(engine.encode(""), {"max_tokens": n}, lambda: False))
            least = lambda body=body: web.post(f"{floor}/constant", json=body)
            rounds = [(timed(direct), timed(ask), timed(least)) for _ in range(ROUNDS)][WARM:]
            engine_ms, service_ms, floor_ms = map(statistics.median, zip(*rounds, strict=True))
            ninetieth = statistics.quantiles([service for _, service, _ in rounds], n=10)[-1]
            rows.append(
                {
                    "tokens": tokens,
                    "stream": "yes" if stream else "no",
                    "engine [ms]": engine_ms,
                    "service [ms]": service_ms,
                    "p90 [ms]": ninetieth,
                    "added [ms]": service_ms - engine_ms,
                    "framework alone [ms]": floor_ms,
                }
            )
    return rows


if __name__ == "__main__":
    rows = measure()
    print(Table(rows, f"median of {ROUNDS - WARM} interleaved rounds, client included, one connection"))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(rows, indent=1))
