"""Training tokens per second: our loop, transformers' Llama in a plain loop, and its Trainer.

Equal shape, equal rows, each side in its own process as its users start it, interleaved.
    python benchmarks/training_speed.py [RESULT.json] [--rounds 3] [--steps 12]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

SIDES = ("llmbook", "llmbook float32", "transformers loop", "transformers Trainer")
SHAPE = {"vocabulary": 4096, "depth": 4, "width": 192, "heads": 3, "context": 256, "rows": 8}


def make_rows(steps: int):
    "The same random rows for every side."
    import numpy as np

    chance = np.random.default_rng(0)
    return chance.integers(0, SHAPE["vocabulary"], (steps * SHAPE["rows"] * 260,), np.int64)


def run_ours(steps: int, precision: str) -> float:
    "Tokens per second of `llmbook.training.train`."
    from llmbook.architecture import Decoder, DecoderSettings
    from llmbook.objectives import Autoregressive
    from llmbook.optimisation import TrainSettings
    from llmbook.training import train

    heads = SHAPE["heads"]
    model = Decoder(DecoderSettings(4096, SHAPE["depth"], SHAPE["width"], heads, heads, 512, 256))
    objective = Autoregressive(make_rows(steps + 2), SHAPE["context"], SHAPE["rows"])
    settings = TrainSettings(steps=steps, precision=precision, checkpoint_every=10**6, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        return train(model, objective, settings, folder, watch_every=10**6)["targets_per_second"]


def make_llama():
    "The same shape in transformers."
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=4096, num_hidden_layers=SHAPE["depth"], hidden_size=SHAPE["width"],
        num_attention_heads=SHAPE["heads"], intermediate_size=512, tie_word_embeddings=True,
        max_position_embeddings=256,
    ))


def run_loop(steps: int) -> float:
    "The loop of a tutorial: AdamW, one forward, one backward."
    import torch

    model = make_llama().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = torch.from_numpy(make_rows(steps)[: steps * 8 * 256]).view(steps, 8, 256)
    start = time.perf_counter()
    for batch in rows:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return steps * 8 * 256 / (time.perf_counter() - start)


def run_trainer(steps: int) -> float:
    "transformers' Trainer with its defaults."
    import torch
    from transformers import Trainer, TrainingArguments

    rows = torch.from_numpy(make_rows(steps)[: steps * 8 * 256]).view(-1, 256)
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, report_to=[], use_cpu=True,
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )
        trainer = Trainer(make_llama(), arguments, train_dataset=data)
        start = time.perf_counter()
        trainer.train()
        return steps * 8 * 256 / (time.perf_counter() - start)


def measure(side: str, steps: int) -> dict:
    "One side, in this process."
    from llmbook.core import set_threads

    threads, cpu = set_threads(), time.process_time()
    runs = {
        "llmbook": lambda: run_ours(steps, "auto"),
        "llmbook float32": lambda: run_ours(steps, "float32"),
        "transformers loop": lambda: run_loop(steps),
        "transformers Trainer": lambda: run_trainer(steps),
    }
    speed = runs[side]()
    return {"tokens_per_second": speed, "cpu": time.process_time() - cpu, "threads": threads}


def main() -> None:
    "Interleave the sides and print the medians."
    parser = argparse.ArgumentParser()
    parser.add_argument("result", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--side")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.steps)))
        return
    found = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--steps", str(options.steps)]
            env = os.environ | {"HF_HUB_OFFLINE": "1"}
            text = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
            found[side].append(json.loads(text.splitlines()[-1])["tokens_per_second"])
    base = statistics.median(found["transformers loop"])
    for side, speeds in found.items():
        middle = statistics.median(speeds)
        spread = f"{min(speeds):,.0f} to {max(speeds):,.0f}"
        print(f"{side:22} {middle:8,.0f} tokens/s  ({spread})  {middle / base:.2f} x the plain loop")
    if options.result:
        with open(options.result, "w") as stream:
            json.dump(found, stream)


if __name__ == "__main__":
    main()
