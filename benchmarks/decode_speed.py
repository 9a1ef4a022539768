"""Decoding one stream: `stream` on our decoders against `transformers.generate`, the same weights.

Each side starts from tokens and ends with tokens, as its users call it; transformers gets its own best
defaults (greedy, KV cache). The sides take turns; medians and their range are shown, and each round's ratio.
Weights are random unless a model folder is given: speed does not depend on them.

    python benchmarks/decode_speed.py [--folder MODEL] [--depth 6] [--width 288] [--vocabulary 32000]
        [--prompt 32] [--tokens 128] [--rounds 5] [--threads 2] [--output FILE.json]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from llmbook.architecture import count_parameters, Decoder, DecoderSettings
from llmbook.bridge import load_decoder, to_transformers
from llmbook.core import Table, set_seed, set_threads, write_json
from llmbook.generation import LeanDecoder, Sampling, stream
from llmbook.quantization import to_int8
from llmbook.tokenization import load_tokenizer, train_tokenizer


def random_decoder(depth: int, width: int, vocabulary: int) -> Decoder:
    "A decoder of the given shape; heads of 48 to 64 channels."
    heads = width // (64 if width % 64 == 0 else 48)
    hidden = 32 * round(width * 8 / 3 / 32)
    shape = DecoderSettings(vocabulary, depth, width, heads, heads, hidden, context=1024)
    return Decoder(shape).eval()


def sides(decoder: Decoder, tokenizer, ids: list[int], tokens: int) -> dict[str, Callable[[], int]]:
    "Name → a function that decodes and returns how many tokens came."
    from transformers import GenerationConfig

    llama, sampling = to_transformers(decoder).eval(), Sampling(max_tokens=tokens)
    config = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )
    prompt = torch.tensor([ids])

    def generate() -> int:
        with torch.inference_mode():
            mask = torch.ones_like(prompt)
            return llama.generate(prompt, attention_mask=mask, generation_config=config).shape[1] - len(ids)

    ours = {"Decoder": decoder, "LeanDecoder": LeanDecoder.of(decoder), "LeanDecoder, 8 bits": to_int8(decoder)}
    run = lambda model: lambda: len(list(stream(model, tokenizer, ids, sampling)))
    return {"transformers.generate": generate} | {f"stream, {name}": run(model) for name, model in ours.items()}


def measure(functions: dict[str, Callable[[], int]], rounds: int) -> list[dict]:
    "Tokens per second and the ratio to transformers, round by round."
    rates: dict[str, list[float]] = {name: [] for name in functions}
    for step in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            count = function()
            if step:  # the first round warms up
                rates[name].append(count / (time.perf_counter() - start))
    rows, base = [], rates["transformers.generate"]
    for name, found in rates.items():
        ratios = [mine / other for mine, other in zip(found, base, strict=True)]
        rows.append({
            "side": name, "tokens/s": round(statistics.median(found)),
            "range": f"{min(found):.0f}–{max(found):.0f}", "ratio": round(statistics.median(ratios), 2),
            "ratios": f"{min(ratios):.2f}–{max(ratios):.2f}",
        })
    return rows


def prepare(given: argparse.Namespace) -> tuple:
    "The decoder and tokenizer of a folder, or a random decoder that stays within a small tokenizer."
    set_seed(0)
    set_threads(given.threads)
    if given.folder:
        return load_decoder(given.folder), load_tokenizer(given.folder)
    decoder = random_decoder(given.depth, given.width, given.vocabulary)
    with torch.no_grad():  # ids beyond the small tokenizer have no text: never choose them
        decoder.embedding.weight[6:262].mul_(4)
    return decoder, train_tokenizer(["A text of no importance."], 270)


def main() -> None:
    "Read the command line, measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder")
    for name, value in (("depth", 6), ("width", 288), ("vocabulary", 32_000), ("prompt", 32), ("tokens", 128),
                        ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output")
    given = parser.parse_args()
    decoder, tokenizer = prepare(given)
    ids = [10 + i % 200 for i in range(given.prompt)]
    rows = measure(sides(decoder, tokenizer, ids, given.tokens), given.rounds)
    count = count_parameters(decoder.settings)
    print(Table(rows, f"{count / 1e6:.1f}M parameters, one stream, {given.tokens} tokens, {given.threads} threads"))
    if given.output:
        write_json(given.output, {"settings": vars(given), "parameters": count, "rows": rows})


if __name__ == "__main__":
    main()
