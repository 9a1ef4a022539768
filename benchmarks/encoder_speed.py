"""Passages per second of the sentence encoder: `encode_texts` against sentence-transformers on one folder.

The two take turns on the same passages, the library with its default batch and with the batch that suits it best; the vectors
are compared. Ours opens the folder anew in each round, so that it remembers no word of an earlier one. Then where our time goes,
one question at a time, and importing and opening, each in a fresh process.

    python benchmarks/encoder_speed.py [RESULT.json] [--folder ENCODER] [--passages 10000] [--rounds 5]
"""

import argparse
import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llmbook.core import Table
from llmbook.encoder import (
    SentenceEncoderSettings,
    SentenceEncoder,
    draw_weights,
    encode_texts,
    load_encoder,
    save_encoder,
    train_search_tokenizer,
)

OPEN = {
    "encode_texts": "from llmbook.encoder import load_encoder, encode_texts;"
    "encode_texts(load_encoder({!r}), ['a'])",
    "sentence-transformers": "from sentence_transformers import SentenceTransformer;"
    "SentenceTransformer({!r}, device='cpu').encode('a')",
}


def read_passages(count: int) -> list[str]:
    "Windows of the language reference, some 700 characters each, no two alike."
    text = "\n".join(pydoc_data.topics.topics.values())
    step = max(1, (len(text) - 700) // count)
    return [text[i * step : i * step + 700] for i in range(count)]


def make_folder(passages: list[str]) -> str:
    "An untrained encoder; its speed is that of a trained one."
    import torch

    tokenizer, width = train_search_tokenizer(passages[:2000], 16_384), SentenceEncoderSettings().width
    encoder = SentenceEncoder(tokenizer, torch.zeros(1, width))
    encoder.weights = draw_weights(*encoder.memory.look_up(passages), tokenizer.get_vocab_size(), width)
    folder = tempfile.mkdtemp()
    save_encoder(encoder, folder)
    return folder


def measure(sides: dict, rounds: int) -> dict[str, list[tuple[float, float]]]:
    "Seconds by the clock and of the processor, per side and round; the sides take turns."
    took = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            wall, processor = time.perf_counter(), time.process_time()
            work()
            took[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return took


def main() -> None:
    "Run the comparison."
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("result", nargs="?")
    options.add_argument("--folder")
    options.add_argument("--passages", type=int, default=10_000)
    options.add_argument("--rounds", type=int, default=5)
    chosen = options.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    passages = read_passages(chosen.passages)
    folder = chosen.folder or make_folder(passages)
    opened = {}
    for name, code in OPEN.items():
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code.format(folder)], check=True, capture_output=True)
        opened[name] = time.perf_counter() - started
    import torch
    from sentence_transformers import SentenceTransformer

    theirs, ours = SentenceTransformer(folder, device="cpu", local_files_only=True), load_encoder(folder)
    encode = lambda texts, **how: theirs.encode(texts, show_progress_bar=False, **how)
    apart = float(np.abs(encode_texts(ours, passages) - encode(passages)).max())
    assert apart < 1e-5, apart
    took = measure({
        "encode_texts": lambda: encode_texts(load_encoder(folder), passages),
        "sentence-transformers, batch 1024": lambda: encode(passages, batch_size=1024),
        "sentence-transformers, its batch of 32": lambda: encode(passages),
    }, chosen.rounds)  # fmt: skip
    rows, base = [], took["encode_texts"]
    for name, seconds in took.items():
        wall, processor = (statistics.median(column) for column in zip(*seconds, strict=True))
        ratios = sorted(other[1] / mine[1] for other, mine in zip(seconds, base, strict=True))
        rows.append({
            "by": name, "passages/s": len(passages) / wall, "passages per CPU second": len(passages) / processor,
            "CPU time / ours": statistics.median(ratios), "range": f"{ratios[0]:.2f}–{ratios[-1]:.2f}",
        })  # fmt: skip
    tokens, begins = (torch.from_numpy(x) for x in ours.memory.look_up(passages))
    with torch.inference_mode():
        parts = measure({
            "open the folder": lambda: load_encoder(folder),
            "look up words, none known": lambda: load_encoder(folder).memory.look_up(passages),
            "look up words, all known": lambda: ours.memory.look_up(passages),
            "average their vectors": lambda: ours.embed(tokens, begins[:-1]),
        }, chosen.rounds)  # fmt: skip
    whole = statistics.median(cpu for _, cpu in base)
    spent = {name: statistics.median(cpu for _, cpu in seconds) for name, seconds in parts.items()}
    shares = [{"part": name, "CPU seconds": cpu, "of encode_texts": f"{cpu / whole:.0%}"} for name, cpu in spent.items()]
    question = ["how do I rename a file?"]
    alone = {"encode_texts": lambda: encode_texts(ours, question), "sentence-transformers": lambda: encode(question)}
    single = {name: 1e3 * statistics.median(w for w, _ in taken) for name, taken in measure(alone, 300).items()}
    apiece = [{"by": name, "one question [ms]": ms, "import, open, one [s]": opened[name]} for name, ms in single.items()]
    size = sum(map(len, passages)) / len(passages)
    told = f"{len(passages):,} passages of {size:.0f} characters, width {ours.width}"
    print(Table(rows, f"{told}, {chosen.rounds} rounds in turn, medians"))
    print(Table(shares, f"\nWhere the time goes; {len(tokens) / len(passages):.0f} tokens a passage"))
    print(Table(apiece, "\nOne at a time, in a warm process and in a fresh one"))
    if chosen.result:
        told = {"rows": rows, "parts": shares, "single": apiece, "largest difference": apart}
        Path(chosen.result).write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
