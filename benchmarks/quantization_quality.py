"""Quality of fewer bits on held-out text: size, bits per byte, perplexity change and divergence.

Peer of GPTQ is rounding to the nearest with the same bits and groups. Every row is measured on the same
tokens; a paired standard error over windows shows how much of a difference is chance.

    python benchmarks/quantization_quality.py RUN [--tokens 65536] [--calibration 8192] [--output FILE.json]

RUN is a folder of `llmbook run`, or any folder with `chat/` and `tokens/` in it.
"""

import argparse
import math
from pathlib import Path

import torch

from llmbook.architecture import Decoder
from llmbook.bridge import export_tensors, import_tensors, load_decoder
from llmbook.core import Table, set_threads, write_json
from llmbook.generation import score_states
from llmbook.quantization import quantize_blocks, spread_windows, to_int8
from llmbook.tokenization import TokenShard


def window_losses(model, ids: torch.Tensor) -> torch.Tensor:
    "Mean loss of each window [nats per token]."
    losses = []
    with torch.inference_mode():
        for part in ids.split(8):
            found = score_states(model, model.states(part)[:, :-1].flatten(0, 1)).log_softmax(-1)
            losses.append(-found.gather(1, part[:, 1:].reshape(-1, 1)).view(len(part), -1).mean(1))
    return torch.cat(losses).double()


def copy_of(decoder: Decoder) -> Decoder:
    "The same weights, to be changed."
    tensors = {name: weight.clone() for name, weight in export_tensors(decoder).items()}
    return import_tensors(decoder.settings, tensors).eval()


def measure(run: Path, tokens: int, calibration: int) -> list[dict]:
    "One row per way of shrinking the model."
    decoder = load_decoder(run / "chat")
    t = min(decoder.settings.context, 256)
    known = spread_windows(TokenShard(run / "tokens", "train").tokens, calibration, t)
    unseen = spread_windows(TokenShard(run / "tokens", "validation").tokens, tokens, t)
    models = {"8 bits, row": to_int8(decoder)}
    for group in (128, 32):
        for method in ("rtn", "gptq"):
            models[f"4 bits, group {group}, {method}"] = model = copy_of(decoder)
            quantize_blocks(model, known, 4, group, method)
    base, rows = window_losses(decoder, unseen), []
    for name, model in models.items():
        change = window_losses(model, unseen) - base
        gap = float(change.mean())
        nearest = next((row["loss change"] for row in rows if row["model"] == name.replace("gptq", "rtn")), None)
        rows.append({
            "model": name, "loss change": gap, "standard error": float(change.std() / math.sqrt(len(change))),
            "perplexity change": f"{math.expm1(gap):+.3%}",
            "gap closed": f"{1 - gap / nearest:.0%}" if nearest else "",
        })
    return rows


def main() -> None:
    "Read the command line, measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    for name, value in (("tokens", 65_536), ("calibration", 8_192), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output")
    given = parser.parse_args()
    set_threads(given.threads)
    rows = measure(given.run, given.tokens, given.calibration)
    print(Table(rows, "Held-out loss [nats per token] against 32 bits"))
    if given.output:
        write_json(given.output, {"settings": {**vars(given), "run": given.run.name}, "rows": rows})


if __name__ == "__main__":
    main()
