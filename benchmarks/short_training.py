"""A training that leaves nothing behind, for the benchmarks that train several models side by side."""

import tempfile
import time

import torch

from llmbook.optimisation import TrainSettings
from llmbook.training import train


def train_short(model: torch.nn.Module, objective, steps: int, seed: int, **options) -> dict[str, float]:
    """Train by the book's loop without a checkpoint; the seconds it took by the clock and of the processor."""
    settings = TrainSettings(steps=steps, checkpoint_every=10**6, seed=seed, device="cpu", **options)
    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train(model, objective, settings, folder, watch_every=10**6)
    return {"wall seconds": time.perf_counter() - wall, "CPU seconds": time.process_time() - cpu}
