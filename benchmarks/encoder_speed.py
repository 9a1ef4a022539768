"""Texts per second of the sentence encoder: `encode_texts` against sentence-transformers on one folder.

The two take turns on the same passages; vectors are compared. Importing the library and opening the
folder are shown apart, each in a fresh process.

    python benchmarks/encoder_speed.py [--folder ENCODER] [--passages 10000] [--rounds 5] [--output FILE.json]
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

    tokenizer = train_search_tokenizer(passages[:2000], 16_384)
    encoder = SentenceEncoder(tokenizer, torch.zeros(1, 256))
    encoder.weights = draw_weights(*encoder.memory.look_up(passages), tokenizer.get_vocab_size(), 256)
    folder = tempfile.mkdtemp()
    save_encoder(encoder, folder)
    return folder


def main() -> None:
    "Run the comparison."
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--folder")
    options.add_argument("--passages", type=int, default=10_000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--output")
    chosen = options.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    passages = read_passages(chosen.passages)
    folder = chosen.folder or make_folder(passages)
    opened = {}
    for name, code in OPEN.items():
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code.format(folder)], check=True, capture_output=True)
        opened[name] = time.perf_counter() - started
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(folder, device="cpu", local_files_only=True)
    sides = {
        "encode_texts": lambda texts: encode_texts(load_encoder(folder), texts),
        "sentence-transformers": lambda texts: theirs.encode(texts, batch_size=1024, show_progress_bar=False),
    }
    took, vectors = {name: [] for name in sides}, {}
    for _ in range(chosen.rounds):
        for name, encode in sides.items():
            wall, processor = time.perf_counter(), time.process_time()
            vectors[name] = encode(passages)
            took[name].append((time.perf_counter() - wall, time.process_time() - processor))
    apart = float(np.abs(vectors["encode_texts"] - vectors["sentence-transformers"]).max())
    assert apart < 1e-5, apart
    rows = []
    for name, seconds in took.items():
        wall, processor = (statistics.median(column) for column in zip(*seconds, strict=True))
        rows.append({
            "by": name, "texts per s": len(passages) / wall, "texts per cpu s": len(passages) / processor,
            "wall from": min(seconds)[0], "to": max(seconds)[0], "import, open, one text [s]": opened[name],
        })  # fmt: skip
    told = {
        "rows": rows, "largest difference": apart, "ratio": rows[0]["texts per s"] / rows[1]["texts per s"],
        "ratio of cpu": rows[0]["texts per cpu s"] / rows[1]["texts per cpu s"],
    }  # fmt: skip
    print(Table(rows, f"{len(passages):,} passages, medians of {chosen.rounds} interleaved rounds"))
    print(f"ratio {told['ratio']:.2f} by the clock, {told['ratio of cpu']:.2f} by processor seconds")
    if chosen.output:
        Path(chosen.output).write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
