"""A scaling law fitted to small trainings, and how far off it is for a larger one that it has not seen.

Every size is trained for every length, each a whole training with its own schedule, on a text file or on the standard
library's documentation. The law is fitted to the runs with at most half, a quarter and an eighth of the work of the largest
one, and asked for its loss. Two guesses that need no such law stand beside it: the best loss so far, and a straight line
through log loss against log work. A killed benchmark goes on where it was if `--folder` is given.
    python benchmarks/scaling_law.py [RESULT.json] [--text FILE] [--widths 32 64 128] [--steps 60 120 240 480]
"""

import argparse
import math
import tempfile
import time
from pathlib import Path


def main() -> None:
    "Train the grid, fit, foretell."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", help="JSON file to write")
    parser.add_argument("--text", help="a file of UTF-8 text; without it the standard library's documentation")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 192])
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 120, 240, 480])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--folder", help="keeps the trainings, to go on after a kill")
    options = parser.parse_args()

    import numpy as np
    import torch

    from llmbook.architecture import DecoderSettings
    from llmbook.core import Table, set_threads, write_json
    from llmbook.environment import read_environment
    from llmbook.losses import causal_cross_entropy
    from llmbook.objectives import Autoregressive, heldout_windows
    from llmbook.optimisation import TrainSettings
    from llmbook.scaling import bootstrap_laws, fit_law, train_grid
    from llmbook.tokenization import encode_plain, train_tokenizer

    set_threads(options.threads or None)
    if options.text:
        texts = Path(options.text).read_text(encoding="utf-8").split("\n\n")
    else:
        texts = [document.text for document in read_environment(distributions=[None])]
    texts = [text for text in texts if text.strip()]
    order = np.random.default_rng(0).permutation(len(texts))
    texts = [texts[i] for i in order]
    tokenizer = train_tokenizer(texts[:4000], options.vocabulary)
    stream = np.concatenate([[*ids, tokenizer.eos_token_id] for ids in encode_plain(tokenizer, texts)])
    border = max(len(stream) * 9 // 10, len(stream) - 100_000)
    objective = Autoregressive(stream[:border].astype(np.uint16), options.context, options.rows)
    every = max(1, (len(stream) - border) // (100 * options.context))
    pairs = zip(*heldout_windows(stream[border:], options.context, options.context, every), strict=True)
    ids, labels = (torch.from_numpy(np.stack(part)) for part in pairs)

    def score(model: torch.nn.Module) -> float:
        parts = zip(ids.split(16), labels.split(16), strict=True)
        losses = [causal_cross_entropy(model.states(i), model.output_weight, wanted).item() for i, wanted in parts]
        return float(np.mean(losses))

    shapes = [
        DecoderSettings(len(tokenizer), 3, width, width // 16, width // 16, 64 * math.ceil(width / 24), options.context)
        for width in options.widths
    ]
    settings = TrainSettings(learning_rate=2e-2, device="cpu")
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        runs = train_grid(shapes, options.steps, objective, score, settings, Path(options.folder or folder))
    spent = time.process_time() - began
    print(f"{len(runs)} trainings on {border:,} tokens, {spent:,.0f} CPU-s")
    print(Table([{"weights": run.parameters, "tokens": run.tokens, "loss": round(run.loss, 3)} for run in runs]))
    work = lambda run: run.parameters * run.tokens
    largest, rows = max(runs, key=work), []
    for share in (2, 4, 8):
        seen = sorted((run for run in runs if work(run) <= work(largest) / share), key=work)
        if len(seen) < 6 or len({run.parameters for run in seen}) < 2:
            continue
        law = fit_law(seen)
        told = [other(largest.parameters, largest.tokens) for other in bootstrap_laws(seen, law, 60)]
        low, high = np.quantile(told, [0.05, 0.95])
        slope = np.polyfit(np.log([work(run) for run in seen]), np.log([run.loss for run in seen]), 1)
        guesses = {
            "law": law(largest.parameters, largest.tokens),
            "straight line": math.exp(np.polyval(slope, math.log(work(largest)))),
            "best so far": min(run.loss for run in seen),
        }
        errors = {f"error of {name}": f"{value / largest.loss - 1:+.1%}" for name, value in guesses.items()}
        rows.append({
            "runs": len(seen), "work of the largest seen": f"1/{share}", "measured": round(largest.loss, 3),
            "law": round(guesses["law"], 3), "90 %": f"{low:.2f} to {high:.2f}", **errors,
        })
    print(Table(rows))
    final = fit_law(runs)
    laws = bootstrap_laws(runs, final, 100)
    for name in ("floor", "size", "data", "size_power", "data_power"):
        low, high = np.quantile([getattr(law, name) for law in laws], [0.05, 0.95])
        print(f"{name:11} {getattr(final, name):10.4g}   90 %: {low:.3g} to {high:.3g}")
    parameters, tokens = final.split(1e15)
    print(f"1e15 operations: {parameters:,.0f} weights, {tokens:,.0f} tokens")
    if options.result:
        write_json(Path(options.result), {"runs": runs, "rows": rows, "law": final, "cpu_seconds": spent})


if __name__ == "__main__":
    main()
