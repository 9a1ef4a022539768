"""Time to equal held-out loss: nanoGPT's documented CPU recipe against ours, same bytes, same cores.

The peer: characters, 4 layers, 4 heads, width 128, context 64, batch 12, 2,000 steps, AdamW 1e-3 to
1e-4 by cosine after 100 steps of warm-up, betas 0.9 and 0.99, decay 0.1, clip 1; its documented loss
is about 1.88 nats per character. Ours: the same characters, our decoder and loop, whole trainings of
rising length until one is as good. AdamW in our loop, at several rates, shows what Muon adds.
    python benchmarks/time_to_loss.py tinyshakespeare.txt [RESULT.json]
"""

import argparse
import json
import tempfile
import time

import numpy as np
import torch

from llmbook.architecture import Decoder, DecoderSettings
from llmbook.core import set_seed, set_threads
from llmbook.objectives import Autoregressive, heldout_bits_per_byte
from llmbook.optimisation import TrainSettings, training_dtype
from llmbook.training import train

LN2 = 0.6931471805599453


class Characters:
    "A text as character ids: the first nine tenths to learn, the rest to measure."

    def __init__(self, text: str, part: slice):
        table = {c: i for i, c in enumerate(sorted(set(text)))}
        ids = np.array([table[c] for c in text], np.uint16)
        self.vocabulary, self.tokens = len(table), ids[part]
        self.bytes = len(self.tokens)


def run_peer(learn: Characters, rest: Characters, seed: int) -> dict:
    "nanoGPT's recipe with transformers' GPT-2 as its model."
    from transformers import GPT2Config, GPT2LMHeadModel

    set_seed(seed)
    config = GPT2Config(
        vocab_size=learn.vocabulary, n_positions=64, n_embd=128, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.99),
    )
    text, chance = torch.from_numpy(learn.tokens.astype(np.int64)), torch.Generator().manual_seed(seed)
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(2000):
        fall = 0.5 * (1 + np.cos(np.pi * (step - 100) / 1900))
        rate = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + 9e-4 * fall
        for group in optimiser.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(text) - 65, (12,), generator=chance)
        rows = torch.stack([text[s : s + 65] for s in starts])
        logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    class Plain(torch.nn.Module):
        "Logits only, as our scorer wants them."

        def __init__(self):
            super().__init__()
            self.inner = model.eval()

        def forward(self, ids):
            return self.inner(ids).logits

    return spent | {"loss": heldout_bits_per_byte(Plain(), rest, 64) * LN2, "steps": 2000}


def run_ours(learn: Characters, rest: Characters, seed: int, steps: int, **options) -> dict:
    "Our decoder of the same depth and width, our loop."
    set_seed(seed)
    model = Decoder(DecoderSettings(learn.vocabulary, 4, 128, 4, 4, 320, 64))
    wall, cpu = time.perf_counter(), time.process_time()
    objective = Autoregressive(learn.tokens, 64, 16, seed)
    settings = TrainSettings(steps=steps, checkpoint_every=10**6, seed=seed, device="cpu", **options)
    with tempfile.TemporaryDirectory() as folder:
        train(model, objective, settings, folder, watch_every=10**6)
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return spent | {"loss": heldout_bits_per_byte(model, rest) * LN2, "steps": steps}


def main() -> None:
    "Peer, then ours in rising lengths until one is as good; for each seed."
    parser = argparse.ArgumentParser()
    parser.add_argument("text")
    parser.add_argument("result", nargs="?")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--adamw", action="store_true", help="sweep AdamW in our loop, too")
    options = parser.parse_args()
    set_threads()
    with open(options.text, encoding="utf-8") as stream:
        text = stream.read()
    cut = len(text) * 9 // 10
    learn, rest = Characters(text, slice(0, cut)), Characters(text, slice(cut, None))
    rivals = {"Muon": [{"learning_rate": 1e-2, "matrix_rate": 1e-2}]}
    if options.adamw:
        rates = (3e-3, 6e-3, 1.2e-2)
        rivals["AdamW"] = [{"optimiser": "adamw", "learning_rate": rate} for rate in rates]
    print("precision of ours:", training_dtype(torch.device("cpu")))
    rows = []
    for seed in range(options.seeds):
        peer = run_peer(learn, rest, seed) | {"side": "nanoGPT's recipe", "seed": seed}
        rows.append(peer)
        show(peer, peer)
        for name, choices in rivals.items():
            for steps in (100, 150, 200, 300, 450, 700, 1000, 1500):
                runs = [run_ours(learn, rest, seed, steps, **choice) for choice in choices]
                best = min(runs, key=lambda run: run["loss"])
                rows.append(best | {"side": f"ours, {name}", "seed": seed})
                show(rows[-1], peer)
                if best["loss"] <= peer["loss"]:
                    break
    if options.result:
        with open(options.result, "w") as stream:
            json.dump(rows, stream)


def show(row: dict, peer: dict) -> None:
    "Print a line."
    print(
        f"{row['side']:18} {row['steps']:5} steps  loss {row['loss']:.3f} nats per character  "
        f"{row['wall']:6.1f} s wall  {row['cpu']:6.1f} s CPU  1/{peer['cpu'] / row['cpu']:.1f} of the "
        "peer's CPU time", flush=True,
    )


if __name__ == "__main__":
    main()
