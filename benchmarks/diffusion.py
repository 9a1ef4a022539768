"""Masked diffusion beside a decoder at equal compute: bits per byte, gaps, and what few passes cost.

The decoder's bits per byte are exact; those of diffusion are a bound from above. Both models have the same
width and depth, learn the same documentation by the same loop for the same number of operations, and
are judged on the same held-out documents. A third run gives diffusion four times the compute.
    python benchmarks/diffusion.py [RESULT.json] [--steps 1500] [--seeds 2]
"""

import argparse
import json
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
from objectives import read_texts

from llmbook.architecture import Decoder, DecoderSettings, Encoder, EncoderSettings, count_flops, initialise_weights
from llmbook.core import Table, set_seed
from llmbook.diffusion import MaskedDiffusion, heldout_bound, unmask
from llmbook.masking import reserve_tokens
from llmbook.objectives import Autoregressive, heldout_bits_per_byte
from llmbook.optimisation import TrainSettings
from llmbook.pretraining import continue_greedily
from llmbook.tokenization import encode_plain, train_tokenizer
from llmbook.training import train

CONTEXT, ROWS, WIDTH, HIDDEN = 64, 32, 128, 320


def learn(model: torch.nn.Module, objective, steps: int, seed: int) -> float:
    "Train from first weights; the processor seconds it took."
    set_seed(seed)
    initialise_weights(model)
    how = TrainSettings(steps=steps, learning_rate=2e-2, matrix_rate=1e-2, checkpoint_every=10**6, seed=seed, device="cpu")
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train(model, objective, how, folder, watch_every=10**6)
    model.eval()
    return time.process_time() - started


def share_right(guess: torch.Tensor, truth: torch.Tensor) -> str:
    "Tokens and whole gaps that are right."
    hits = guess == truth
    return f"{100 * hits.float().mean().item():.1f} / {100 * hits.all(1).float().mean().item():.1f}"


@torch.no_grad()
def surprise(judge: Decoder, rows: torch.Tensor) -> str:
    "The judge's nats per token, and the share of different tokens in a row."
    nats = torch.nn.functional.cross_entropy(judge(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).item()
    return f"{nats:.2f} / {100 * np.mean([len(set(row)) / len(row) for row in rows.tolist()]):.0f}"


def main() -> None:
    "Train and measure for each seed."
    parser = argparse.ArgumentParser()
    parser.add_argument("result", nargs="?")
    parser.add_argument("--steps", type=int, default=1500, help="of the decoder")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    texts, others = read_texts(["numpy"])
    tokenizer = reserve_tokens(train_tokenizer(texts, 1024))
    mask, end = tokenizer.mask_token_id, tokenizer.eos_token_id
    tokens, rest = (np.concatenate([[*ids, end] for ids in encode_plain(tokenizer, part)]) for part in (texts, others))
    rest = rest[:40_000]
    held = SimpleNamespace(tokens=rest, bytes=len(tokenizer.decode(rest.tolist()).encode()))
    windows = torch.from_numpy(rest[: len(rest) // CONTEXT * CONTEXT].astype(np.int64)).view(-1, CONTEXT)[:400]
    gap = slice(30, 33)
    holes = windows.clone()
    holes[:, gap] = mask
    shape = DecoderSettings(len(tokenizer), 3, WIDTH, 4, 4, HIDDEN, CONTEXT)
    mirror = EncoderSettings(len(tokenizer), 3, WIDTH, 4, HIDDEN, CONTEXT, window=4)
    matched = round(options.steps * count_flops(shape, CONTEXT) / count_flops(mirror, CONTEXT))
    rows = []
    for seed in range(options.seeds):
        decoder = Decoder(shape)
        spent = learn(decoder, Autoregressive(tokens, CONTEXT, ROWS, seed), options.steps, seed)
        found = torch.tensor([continue_greedily(decoder, row[: gap.start].tolist(), 3) for row in windows])
        bits = heldout_bits_per_byte(decoder, held)
        rows.append({"seed": seed, "model": "decoder", "steps": options.steps, "bits per byte": bits,
                     "gap of 3, tokens / whole [%]": share_right(found, windows[:, gap]), "written in 8 passes": "",
                     "in 64": surprise(decoder, windows), "CPU s": spent})
        for name, times in (("diffusion, equal compute", 1), ("diffusion, four times", 4)):
            model = Encoder(mirror)
            spent = learn(model, MaskedDiffusion(tokens, CONTEXT, ROWS, mask, seed, level=True), matched * times, seed)
            filled = unmask(model, holes, mask, 3, temperature=0)[-1][:, gap]
            blank = torch.full((64, CONTEXT), mask)
            written = {steps: surprise(decoder, unmask(model, blank, mask, steps, "random", 0.8, seed)[-1]) for steps in (8, 64)}
            rows.append({"seed": seed, "model": name, "steps": matched * times, "bits per byte": heldout_bound(model, held, mask),
                         "gap of 3, tokens / whole [%]": share_right(filled, windows[:, gap]),
                         "written in 8 passes": written[8], "in 64": written[64], "CPU s": spent})
        print(Table(rows, "Surprise of the decoder [nats] / different tokens [%]; in the decoder's row: real text"), flush=True)
    if options.result:
        with open(options.result, "w") as stream:
            json.dump(rows, stream)


if __name__ == "__main__":
    main()
