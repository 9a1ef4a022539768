"""Many streams: our engine against `transformers.generate`, and a shared prompt against none; the same weights.

Part 1: requests arrive together. The peer serves them one after another, as its users call it, with a streamer that
notes the first token; the engine serves up to `--streams` at once. Tokens per second over all requests, and the time
from arrival to the first token. Part 2: one request at a time in an engine; nine tenths of each prompt were read
before, or (another salt each) were not. Part 3: the same with eight requests arriving together.
The sides take turns; medians and ranges are shown, and each round's ratio. Weights are random unless a model folder is given.

    python benchmarks/engine.py [--folder MODEL] [--depth 6] [--width 288] [--vocabulary 32000] [--streams 32]
        [--prompt 32] [--tokens 128] [--long 1000] [--rounds 5] [--threads 2] [--output FILE.json]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from decode_speed import prepare

from llmbook.architecture import Decoder, count_parameters
from llmbook.bridge import to_transformers
from llmbook.core import Table, write_json
from llmbook.engine import Engine, EngineSettings
from llmbook.generation import LeanDecoder, Sampling
from llmbook.quantization import to_int8


class First:
    "A streamer of transformers that notes when the first new token came."

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, _: torch.Tensor) -> None:
        self.calls += 1  # the first call brings the prompt
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def generate_side(decoder: Decoder, prompts: list[list[int]], tokens: int) -> Callable[[], tuple[int, list[float]]]:
    "Decode one after another; tokens made, and seconds from the common arrival to each first token."
    from transformers import GenerationConfig

    llama = to_transformers(decoder).eval()
    config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, bos_token_id=None,
                              eos_token_id=None, pad_token_id=0)

    def serve() -> tuple[int, list[float]]:
        start, firsts, made = time.perf_counter(), [], 0
        for ids in prompts:
            given, first = torch.tensor([ids]), First()
            with torch.inference_mode():
                out = llama.generate(given, attention_mask=torch.ones_like(given), generation_config=config, streamer=first)
            made += out.shape[1] - len(ids)
            firsts.append(first.at - start)
        return made, firsts

    return serve


def engine_side(model, tokenizer, prompts: list[list[int]], tokens: int, streams: int) -> Callable[[], tuple[int, list[float]]]:
    "The same in the engine."
    size = 16
    pages = streams * -(-(max(map(len, prompts)) + tokens) // size)

    def serve() -> tuple[int, list[float]]:
        engine = Engine(model, tokenizer, EngineSettings(pages, size, streams, max(256, streams), waiting=len(prompts)))
        for ids in prompts:
            engine.submit(ids, Sampling(max_tokens=tokens))
        firsts, made = [], 0
        while engine.busy:
            for event in engine.step():
                made += event.piece.token is not None
                if event.figures:
                    firsts.append(event.figures["time_to_first_token_seconds"])
        return made, firsts

    return serve


def prefix_side(model, tokenizer, prompts: list[list[int]], together: bool, reuse: bool) -> Callable[[], tuple[int, list[float]]]:
    "Time to the first token where a beginning is known, or is not."
    pages = (len(prompts) + 2) * -(-(len(prompts[0]) + 1) // 16)
    engine = Engine(model, tokenizer, EngineSettings(pages, 16, 32, 256, waiting=len(prompts)))
    rounds = [0]

    def drain() -> list[float]:
        found = []
        while engine.busy:
            found += [event.figures["time_to_first_token_seconds"] for event in engine.step() if event.figures]
        return found

    def serve() -> tuple[int, list[float]]:
        rounds[0] += 1
        engine.submit(prompts[0], Sampling(max_tokens=1), salt=f"{rounds[0]}")
        drain()  # somebody reads the beginning first; not timed
        found: list[float] = []
        for i, ids in enumerate(prompts[1:]):
            engine.submit(ids, Sampling(max_tokens=1), salt=f"{rounds[0]}" if reuse else f"{rounds[0]}.{i}")
            found += [] if together else drain()
        found += drain()
        return len(found), found

    return serve


def measure(sides: dict[str, Callable[[], tuple[int, list[float]]]], rounds: int) -> list[dict]:
    "Every side each round; the first one is the base of the ratios."
    taken: dict[str, list[tuple]] = {name: [] for name in sides}
    for step in range(rounds + 1):
        for name, serve in sides.items():
            cpu, start = time.process_time(), time.perf_counter()
            made, firsts = serve()
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            firsts.sort()
            if step:  # the first round warms up
                spots = [firsts[len(firsts) // 2], firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))]]
                taken[name].append((made / seconds, made / cpu, *spots))
    rows, base = [], next(iter(taken.values()))
    for name, found in taken.items():
        pick = lambda i, found=found: statistics.median(row[i] for row in found)
        ratio = lambda i, found=found: [mine[i] / other[i] for mine, other in zip(found, base, strict=True)]
        rows.append({
            "side": name, "tokens/s": round(pick(0)), "ratio": round(statistics.median(ratio(0)), 2),
            "range": f"{min(ratio(0)):.2f}–{max(ratio(0)):.2f}", "tokens per CPU-s": round(pick(1)),
            "CPU ratio": round(statistics.median(ratio(1)), 2), "first token p50 [s]": round(pick(2), 3),
            "p95 [s]": round(pick(3), 3), "p50 ratio": round(statistics.median(ratio(2)), 3),
            "p50 range": f"{min(ratio(2)):.3f}–{max(ratio(2)):.3f}",
        })
    return rows


def main() -> None:
    "Read the command line, measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder")
    for name, value in (("depth", 6), ("width", 288), ("vocabulary", 32_000), ("streams", 32), ("prompt", 32), ("tokens", 128),
                        ("long", 1000), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output")
    given = parser.parse_args()
    decoder, tokenizer = prepare(given)
    lean, eight = LeanDecoder.of(decoder), to_int8(decoder)
    draw = lambda n: torch.randint(6, 260, (n,)).tolist()
    short = [draw(given.prompt) for _ in range(given.streams)]
    results = {"streams": measure({
        "transformers.generate": generate_side(decoder, short, given.tokens),
        "engine, one stream": engine_side(lean, tokenizer, short, given.tokens, 1),
        f"engine, {given.streams} streams": engine_side(lean, tokenizer, short, given.tokens, given.streams),
        f"engine, {given.streams} streams, 8 bits": engine_side(eight, tokenizer, short, given.tokens, given.streams),
    }, given.rounds)}
    count = count_parameters(decoder.settings)
    what = f"{given.streams} requests of {given.prompt} + {given.tokens} tokens, {given.threads} threads"
    print(Table(results["streams"], f"{count / 1e6:.1f}M parameters, {what}"), flush=True)
    long = min(given.long, decoder.settings.context - 1)
    common = draw(long * 9 // 10)
    prompts = [common + draw(long - len(common)) for _ in range(9)]
    for name, together in (("one at a time", False), ("eight together", True)):
        rows = measure({
            "without reuse": prefix_side(lean, tokenizer, prompts, together, False),
            "with reuse": prefix_side(lean, tokenizer, prompts, together, True),
        }, given.rounds)
        kept = ("side", "first token p50 [s]", "p95 [s]", "p50 ratio", "p50 range")
        results[name] = [{column: row[column] for column in kept} for row in rows]
        caption = f"\nprompts of {long:,} tokens, nine tenths in common, {name}"
        print(Table(results[name], caption), flush=True)
    if given.output:
        write_json(given.output, {"settings": vars(given), "parameters": count, "results": results})


if __name__ == "__main__":
    main()
