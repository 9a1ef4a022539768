"""Many visitors at once: the service with the engine, against the same service that decodes request by request.

Each side is a whole service on a socket, with the same weights, keys, log and metrics. So many clients stream an answer
at the same time; nobody's prompt begins like another's, so nothing is gained from known beginnings. Shown: tokens per
second over all clients, and time to the first token. `one by one` has one worker, as before the engine; `in threads`
gives each client a worker that decodes for it alone. The sides take turns; medians, and each round's ratio. Client and
service are one process, so the CPU seconds are those of both. Weights are random unless a model folder is given.

    python benchmarks/service_streams.py [--folder MODEL] [--clients 8] [--prompt 32] [--tokens 64] [--rounds 5]
        [--threads 1] [--depth 6] [--width 288] [--vocabulary 32000] [--output FILE.json]
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import torch
from decode_speed import prepare
from engine import measure

from llmbook.admission import KeyStore, ServiceSettings
from llmbook.architecture import count_parameters
from llmbook.core import Table, write_json
from llmbook.deployment import create_app, serving
from llmbook.generation import LeanDecoder, stream
from llmbook.monitoring import PrometheusObserver
from llmbook.protocol import DecoderWriter, Service


class OneByOne(DecoderWriter):
    "The writer without an engine: each request goes through the model alone."

    def _ask(self, ids, sampling, cancelled):
        return stream(self.model, self.tokenizer, ids, sampling, cancelled)


def listen(web: httpx.Client, url: str, tokens: int, key: str, ids: list[int]) -> tuple[int, float]:
    "One client: tokens received, and seconds to the first."
    body = {"model": "llmbook-chat", "prompt": ids, "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}
    start, first, last = time.perf_counter(), None, ""
    with web.stream("POST", f"{url}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                first, last = first or time.perf_counter() - start, line
    made = int(last.partition('"completion_tokens":')[2].partition(",")[0])
    return made, first


def visit(pool: ThreadPoolExecutor, client: Callable, rounds: Iterator[list]) -> tuple[int, list[float]]:
    "All clients of the next round: tokens received, and seconds to the first of each."
    heard = list(pool.map(client, next(rounds)))
    return sum(made for made, _ in heard), [first for _, first in heard]


def main() -> None:
    "Read the command line, measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder")
    for name, value in (("clients", 8), ("prompt", 32), ("tokens", 64), ("rounds", 5), ("threads", 1), ("depth", 6),
                        ("width", 288), ("vocabulary", 32_000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output")
    given = parser.parse_args()
    decoder, tokenizer = prepare(given)
    lean, store = LeanDecoder.of(decoder), KeyStore(Path(tempfile.mkdtemp()) / "keys.json")
    key = store.create("bench", requests_per_minute=10**6, tokens_per_day=10**12)
    drawn = [[torch.randint(6, 260, (given.prompt,)).tolist() for _ in range(given.clients)] for _ in range(given.rounds + 1)]
    writers = {"one by one": (OneByOne(lean, tokenizer), 1), "in threads": (OneByOne(lean, tokenizer), given.clients),
               "engine": (DecoderWriter(lean, tokenizer), 0)}
    with contextlib.ExitStack() as doors, ThreadPoolExecutor(given.clients) as pool:
        web, sides = doors.enter_context(httpx.Client(trust_env=False, timeout=600)), {}
        for name, (writer, workers) in writers.items():
            settings = ServiceSettings(
                port=0, keys=str(store.path), records=str(store.path.parent / name), queue=given.clients, workers=workers
            )
            url = doors.enter_context(serving(create_app(Service(writer), settings, PrometheusObserver()), settings))
            client = partial(listen, web, url, given.tokens, key)
            sides[name] = partial(visit, pool, client, iter(drawn))
        rows = measure(sides, given.rounds)
    count = count_parameters(decoder.settings)
    note = f"{count / 1e6:.1f}M parameters, {given.clients} clients, {given.tokens} tokens each, {given.threads} threads"
    print(Table(rows, note))
    if given.output:
        write_json(given.output, {"settings": vars(given), "parameters": count, "rows": rows})


if __name__ == "__main__":
    main()
