"""Training on a GPU: tokens per second, utilisation and peak memory of 124 million and of a billion weights.

The same `train` as everywhere, under accelerate, in bfloat16, compiled. One GPU, or several with FSDP2:
    python benchmarks/gpu_training.py [RESULT.json] [--models 124M 1B] [--steps 60]
    torchrun --nproc-per-node 8 benchmarks/gpu_training.py [RESULT.json] --shard
Without a GPU it stops and says so; `--smoke` runs tiny shapes on the processor, to see that the script works.

The goal: 40 % of the peak for both on one H100 or H200, where well-kept trainers reach 35 to 50 %.
Utilisation counts the arithmetic of the model (6 per weight and token, and attention's products), not what is recomputed.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

GOAL = 0.4
ROWS = {"124M": (32, 16), "1B": (16, 4)}  # rows per step and per forward pass, on 80 GB


def choose_shapes(smoke: bool) -> dict:
    "The models: GPT-2's size, and a billion weights in Llama's proportions."
    from llmbook.architecture import DecoderSettings, derive_decoder

    if smoke:
        return {"124M": DecoderSettings(256, 2, 64, 2, 2, 128, 32), "1B": DecoderSettings(256, 3, 96, 3, 3, 256, 32)}
    return {
        "124M": DecoderSettings(50_304, 12, 768, 12, 12, 2048, 1024),
        "1B": derive_decoder(36, 32_768, 2048),
    }


def measure(name: str, shape, options: argparse.Namespace) -> dict:
    "Train one model for some steps; the first third, with the compilation, does not count."
    import numpy as np
    import torch

    from llmbook.architecture import Decoder, count_flops, count_parameters
    from llmbook.objectives import Autoregressive
    from llmbook.optimisation import TrainSettings, peak_flops
    from llmbook.training import train

    rows, micro = (4, 0) if options.smoke else ROWS[name]
    rows = (options.rows or rows) * int(os.environ.get("WORLD_SIZE", "1"))
    chance = np.random.default_rng(0)
    text = chance.integers(0, shape.vocabulary, (options.steps + 2) * rows * (shape.context + 1), np.uint16)
    settings = TrainSettings(
        steps=options.steps, precision="float32" if options.smoke else "bfloat16", workers=options.workers,
        compile=not (options.smoke or options.eager), micro_batch=options.micro or micro, shard=options.shard,
        checkpoint_every=10**9, device="cpu" if options.smoke else "auto",
    )
    torch.manual_seed(0)
    marks = []

    def watch(model) -> dict:  # called before steps 0, a third, … and after the last
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return {}

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    flops, every = 3 * count_flops(shape, shape.context), max(1, options.steps // 3)
    with tempfile.TemporaryDirectory() as folder:
        objective = Autoregressive(text, shape.context, rows)
        result = train(Decoder(shape), objective, settings, folder, watch, every, flops)
    first, last = result["curve"][1], result["curve"][-1]  # after a third, and at the end
    speed = (last["targets"] - first["targets"]) / (marks[-1] - marks[1])
    where = torch.device("cpu" if options.smoke else "cuda")
    peak = peak_flops(where, getattr(torch, result["precision"])) * int(os.environ.get("WORLD_SIZE", "1"))
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return {
        "model": name, "weights": count_parameters(shape), "tokens per step": rows * shape.context, "tokens/s": round(speed),
        "utilisation": round(speed * flops / peak, 3) if peak else 0.0,
        "peak memory [GB]": round(memory, 1), "loss": round(last["loss"], 3), "precision": result["precision"],
    }


def main() -> None:
    "Measure each model and compare with the goal."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", help="JSON file to write")
    parser.add_argument("--models", nargs="+", choices=sorted(ROWS), default=sorted(ROWS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=0, help="rows per step and process; 0: as fits 80 GB")
    parser.add_argument("--micro", type=int, default=0, help="rows per forward pass; 0: as fits 80 GB")
    parser.add_argument("--workers", type=int, default=2, help="processes that prepare batches")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--shard", action="store_true", help="FSDP2 over the processes of torchrun")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the processor")
    options = parser.parse_args()
    import torch

    from llmbook.core import Table, write_json

    if not torch.cuda.is_available() and not options.smoke:
        print("no GPU here: nothing was measured. `--smoke` tries the script on the processor.", file=sys.stderr)
        sys.exit(3)
    if options.smoke:
        options.workers, options.steps = min(options.workers, 1), min(options.steps, 9)
        torch.set_num_threads(1)
    where = "processor, smoke test: these are no results" if options.smoke else torch.cuda.get_device_name()
    rows = [measure(name, shape, options) for name, shape in choose_shapes(options.smoke).items() if name in options.models]
    if int(os.environ.get("RANK", "0")):
        return
    print(where, "·", os.environ.get("WORLD_SIZE", "1"), "process(es) · torch", torch.__version__)
    print(Table(rows))
    if not options.smoke:
        for row in rows:
            verdict = "reached" if row["utilisation"] >= GOAL else "missed"
            print(f"{row['model']}: {row['utilisation']:.1%} of the peak, goal {GOAL:.0%} {verdict}")
    if options.result:
        write_json(Path(options.result), {"where": where, "goal": GOAL, "rows": rows, "smoke": options.smoke})


if __name__ == "__main__":
    main()
