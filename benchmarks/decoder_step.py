"""Forward and backward of one training step: our decoder against transformers' Llama and GPT-2.

All sides have the same depth, width, heads, vocabulary and batch (GPT-2 stands in for nanoGPT: learned
positions, LayerNorm, GELU, four times the width inside). They take turns; the median is shown.

    python benchmarks/decoder_step.py [--depth 6] [--batch 8] [--rounds 7] [--threads 2] [--output FILE.json]
"""

import argparse
import json
import os
import statistics
import time

import torch
from torch import nn

from llmbook.architecture import Decoder, DecoderSettings, derive_decoder
from llmbook.bridge import to_transformers
from llmbook.core import Table, set_seed, set_threads
from llmbook.losses import causal_cross_entropy


def ours(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    "The loss of our decoder."
    states = decoder.states(ids[:, :-1])
    return causal_cross_entropy(states.flatten(0, 1), decoder.output_weight, ids[:, 1:].flatten())


def theirs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    "The loss of a model of transformers, inputs already shifted on our side are shifted by it here."
    return model(ids, labels=ids, use_cache=False).loss


def gpt2(settings: DecoderSettings) -> nn.Module:
    "GPT-2 of the same shape, without dropout."
    from transformers import GPT2Config, GPT2LMHeadModel

    s = settings
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=s.vocabulary, n_positions=s.context + 1, n_embd=s.width, n_layer=s.depth,
        n_head=s.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ))


def measure(depth: int, batch: int, rounds: int) -> list[dict]:
    "Tokens per second of each side, by wall and by processor seconds."
    settings = derive_decoder(depth, vocabulary=4096, context=257)
    decoder = Decoder(settings)
    sides = {
        "llmbook": (ours, decoder), "transformers Llama": (theirs, to_transformers(decoder)),
        "transformers GPT-2": (theirs, gpt2(settings)),
    }
    ids = torch.randint(0, settings.vocabulary, (batch, 257))
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(rounds + 2):
        for name, (loss, model) in sides.items():
            model.zero_grad(set_to_none=True)
            start, used = time.perf_counter(), time.process_time()
            loss(model, ids).backward()
            if step >= 2:  # the first two warm up
                wall[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - used)
    tokens, rows = batch * 256, []
    for name in sides:
        ratios = [other / mine for other, mine in zip(wall[name], wall["llmbook"], strict=True)]
        used = [other / mine for other, mine in zip(processor[name], processor["llmbook"], strict=True)]
        rows.append({
            "side": name, "parameters": sum(p.numel() for p in sides[name][1].parameters()),
            "tokens/s": round(tokens / statistics.median(wall[name])),
            "tokens/CPU-s": round(tokens / statistics.median(processor[name])),
            "ours is faster by (wall)": statistics.median(ratios),
            "ours is faster by (CPU)": statistics.median(used),
            "spread (CPU)": f"{min(used):.2f}–{max(used):.2f}",
        })
    return rows


def main() -> None:
    "Run the comparison and print it."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("depth", 6), ("batch", 8), ("rounds", 7), ("threads", os.cpu_count())):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", help="write the rows as JSON to this file")
    options = parser.parse_args()
    set_seed(0)
    set_threads(options.threads)
    rows = measure(options.depth, options.batch, options.rounds)
    print(Table(rows, f"Forward and backward, depth {options.depth}, batch {options.batch} × 256"))
    if options.output:
        with open(options.output, "w", encoding="utf-8") as stream:
            json.dump(rows, stream, indent=1)


if __name__ == "__main__":
    main()
