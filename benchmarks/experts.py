"""A mixture of experts, forward and backward: our grouped product, our loop, and transformers' Mixtral block in both its forms.

    python benchmarks/experts.py [RESULT.json] [--tokens 1024] [--width 192] [--hidden 256] [--rounds 7] [--threads 1]

All sides hold the same weights and take turns; medians of processor seconds, and the spread of the ratio to ours, grouped.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from llmbook.core import Table, set_seed, set_threads
from llmbook.experts import MixtureOfExperts


def sides(width: int, hidden: int, count: int, k: int) -> dict:
    """Four blocks with the same weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    shape = {"hidden_size": width, "intermediate_size": hidden, "num_local_experts": count, "num_experts_per_tok": k}
    theirs = {}
    for form in ("eager", "grouped_mm"):
        config = MixtralConfig(**shape)
        config._experts_implementation = form
        theirs[f"transformers, {form}"] = MixtralSparseMoeBlock(config)
    found = {"llmbook, grouped": MixtureOfExperts(width, hidden, count, k, 0.0, 0.0)}
    found["llmbook, loop"] = MixtureOfExperts(width, hidden, count, k, 0.0, 0.0, "loop")
    for block in found.values():
        block.load_state_dict(found["llmbook, grouped"].state_dict())
    ours = found["llmbook, grouped"]
    for block in theirs.values():
        block.gate.weight.data = ours.router.weight.data.clone()
        block.experts.gate_up_proj.data = ours.experts.gate_up.data.clone()
        block.experts.down_proj.data = ours.experts.down.data.clone()
    return found | theirs


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?")
    for name, value in (("tokens", 1024), ("width", 192), ("hidden", 256), ("rounds", 7), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    own = parser.parse_args()
    set_threads(own.threads)
    rows = []
    for count, k in ((4, 2), (8, 2), (32, 2), (64, 4)):
        set_seed(0)
        blocks, spent = sides(own.width, own.hidden, count, k), {}
        x = torch.randn(1, own.tokens, own.width)
        for turn in range(own.rounds + 1):
            for name, block in blocks.items():
                block.zero_grad(set_to_none=True)
                start = time.process_time()
                block(x).square().sum().backward()
                if turn:
                    spent.setdefault(name, []).append(time.process_time() - start)
        for name, times in spent.items():
            ratios = [a / b for a, b in zip(times, spent["llmbook, grouped"], strict=True)]
            rows.append({
                "experts": count, "used": k, "side": name, "ms": 1000 * statistics.median(times),
                "times ours": statistics.median(ratios), "spread": f"{min(ratios):.2f}–{max(ratios):.2f}",
            })
    print(Table(rows, f"Forward and backward of one block, {own.tokens} tokens, width {own.width}, {own.hidden} inside"))
    if own.result:
        Path(own.result).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
