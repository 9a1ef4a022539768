"""Guessing tokens from the prompt: `speculate` with `PromptLookup` against plain `stream`, the same weights.

Two kinds of text, each beside transformers with and without its `prompt_lookup_num_tokens`, the sides in turns:

- *repeats its prompt*: the hand-written decoder that quotes (`build_copier`, its further layers at full cost) reads a
  document and how it begins, and writes on;
- *natural text*: a decoder with random weights is told by a mask, the same on all sides, to write what a document says
  after its beginning. Speed depends on the weights only through which guesses are right, and this text is real.

Ratios are of CPU seconds on one thread, per document and round; medians and the range of documents are shown.
The texts are the documentation of the standard library, or any file of yours.

    python benchmarks/speculation.py [RESULT.json] [--text FILE] [--documents 6] [--depth 6] [--width 192]
        [--tokens 160] [--rounds 3] [--vocabulary 4096]
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.bridge import to_transformers
from llmbook.core import Table, set_seed, set_threads, write_json
from llmbook.environment import read_environment
from llmbook.generation import LeanDecoder, Sampling, stream
from llmbook.speculation import PromptLookup, build_copier, speculate
from llmbook.tokenization import train_tokenizer

PLAIN, OURS, THEIRS, THEIR_LOOKUP = "stream", "speculate", "transformers", "transformers, look-up"


def read_texts(path: str | None, count: int, length: int) -> list[str]:
    "Texts of some length: parts of a file, or pages of documentation from all over the standard library."
    if path:
        text = Path(path).read_text(encoding="utf-8")
        found = [text[i : i + length] for i in range(0, len(text) - length // 2, length)]
    else:
        documents = itertools.islice(read_environment(distributions=[None]), 6000)
        found = [document.text[:length] for document in documents if len(document.text) >= length // 2]
    return found[:: max(1, len(found) // count)][:count]


def dictate(ids: list[int], vocabulary: int) -> Callable:
    "A rule that allows exactly the given tokens, one after the other."
    mask, last = torch.zeros(vocabulary, dtype=torch.bool), [0]

    def allow(generated) -> torch.Tensor:
        mask[last[0]] = False
        last[0] = ids[min(len(generated), len(ids) - 1)]
        mask[last[0]] = True
        return mask

    return allow


def sides(decoder: Decoder, llama, tokenizer, ids: list[int], told: list[int] | None, tokens: int) -> dict:
    "Name → a function that decodes and returns how many tokens came, and the tally of guesses."
    from transformers import GenerationConfig

    lean, sampling, prompt = LeanDecoder.of(decoder), Sampling(max_tokens=tokens), torch.tensor([ids])
    rule = lambda: dictate(told, decoder.settings.vocabulary) if told else None
    follow = (lambda _, row: [told[min(len(row) - len(ids), len(told) - 1)]]) if told else None

    def ours() -> tuple[int, object]:
        guesser = PromptLookup()
        count = len(list(speculate(lean, tokenizer, ids, sampling, allow=rule(), guesser=guesser)))
        return count, guesser.tally

    def theirs(**options) -> tuple[int, None]:
        config = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=1, **options,
        )
        with torch.inference_mode():
            found = llama.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=config, prefix_allowed_tokens_fn=follow)
        return found.shape[1] - len(ids), None

    return {
        PLAIN: lambda: (len(list(stream(lean, tokenizer, ids, sampling, allow=rule()))), None), OURS: ours,
        THEIRS: theirs, THEIR_LOOKUP: lambda: theirs(prompt_lookup_num_tokens=10),
    }


def measure(functions: dict[str, Callable], rounds: int) -> tuple[dict[str, float], object, int]:
    "CPU seconds per token of each side (medians of rounds), the guesses, the tokens."
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    tally, counts = None, {}
    for step in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            counts[name], seen = function()
            tally = seen or tally
            if step:  # the first round warms up
                seconds[name].append((time.process_time() - start) / counts[name])
    assert counts[PLAIN] == counts[OURS], "guesses must not change the text"
    return {name: statistics.median(taken) for name, taken in seconds.items()}, tally, counts[OURS]


def summarise(kind: str, found: list[tuple]) -> list[dict]:
    "One row per side: its speed and how it compares with plain decoding of the same library."
    rows = []
    for name, base in ((PLAIN, PLAIN), (OURS, PLAIN), (THEIRS, THEIRS), (THEIR_LOOKUP, THEIRS)):
        ratios = [seconds[base] / seconds[name] for seconds, _, _ in found]
        total = lambda part: sum(getattr(tally, part) for _, tally, _ in found)  # noqa: B023
        kept = f"{total('kept')}/{total('guessed')}" if name == OURS else ""
        rows.append({
            "text": kind, "side": name, "tokens/s": round(1 / statistics.median(s[name] for s, _, _ in found)),
            "speed-up": round(statistics.median(ratios), 3), "documents": f"{min(ratios):.2f}–{max(ratios):.2f}",
            "tokens": sum(count for _, _, count in found), "guesses kept": kept,
            "tokens/step": round(total("tokens") / total("steps"), 2) if kept else "",
        })
    return rows


def main() -> None:
    "Read the command line, measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?")
    parser.add_argument("--text")
    for name, value in (("documents", 6), ("depth", 6), ("width", 192), ("tokens", 160), ("rounds", 3),
                        ("vocabulary", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    set_threads(1)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    texts = read_texts(given.text, 2 * given.documents, 2400)
    tokenizer = train_tokenizer(texts, given.vocabulary)
    rows_of = [tokenizer(text).input_ids for text in texts]
    size, heads = len(tokenizer), max(1, given.width // 48)
    copier = build_copier(size, given.depth)
    set_seed(0)
    shape = DecoderSettings(size, given.depth, given.width, heads, heads, given.width * 8 // 3 // 32 * 32, 1024)
    plain = Decoder(shape).eval()
    found: dict[str, list] = {"repeats its prompt": [], "natural text": []}
    llamas = {"repeats its prompt": to_transformers(copier).eval(), "natural text": to_transformers(plain).eval()}
    for row in rows_of[: given.documents]:
        ids = [*row[:600], tokenizer.eos_token_id, *row[:6]]
        functions = sides(copier, llamas["repeats its prompt"], tokenizer, ids, None, min(given.tokens, len(row) - 6))
        found["repeats its prompt"].append(measure(functions, given.rounds))
    for row in rows_of[given.documents :]:
        ids, told = row[: len(row) // 2][-400:], row[len(row) // 2 :]
        functions = sides(plain, llamas["natural text"], tokenizer, ids, told, min(given.tokens, len(told)))
        found["natural text"].append(measure(functions, given.rounds))
    rows = [row for kind, results in found.items() for row in summarise(kind, results)]
    title = f"{given.depth} layers, one thread, {given.documents} documents of each kind, up to {given.tokens} tokens"
    print(Table(rows, title))
    if given.output:
        write_json(given.output, {"settings": vars(given), "rows": rows})


if __name__ == "__main__":
    main()
