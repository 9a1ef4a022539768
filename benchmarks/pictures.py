"""Pictures and captions: zero-shot accuracy against the share of wrong captions, and SigLIP beside CLIP.

    python benchmarks/pictures.py [RESULT.json] [--steps 300] [--rows 48] [--seeds 3] [--wrong 0 0.2 0.5]

Every row trains new models with the same settings, one per seed (which decides first weights and pairs), through
`llmbook.training.train`. All are asked about the same drawings, which no training drew: form among 5, colour among 6,
both among 30 classes, for combinations that occurred in training and for five that did not. Shown are means over the
seeds; ± is half of the 95 % interval of the mean (Student's t).
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from functools import partial

import numpy as np
from scipy import stats

from llmbook.core import Table, progress, set_seed
from llmbook.optimisation import TrainSettings
from llmbook.pictures import (
    FORMS,
    PAINTS,
    TextImage,
    TextImageModel,
    TextImageSettings,
    draw_pairs,
    recall_pairs,
    score_exam,
)
from llmbook.tokenization import train_tokenizer
from llmbook.training import train

UNSEEN = [("green", "triangle"), ("red", "cross"), ("yellow", "square"), ("white", "ring"), ("purple", "circle")]
SEEN = [(colour, form) for colour in PAINTS for form in FORMS if (colour, form) not in UNSEEN]


def measure(loss: str, wrong: float, seed: int, options: argparse.Namespace, tokenizer) -> dict[str, float]:
    """Train once and ask everything; percentages."""
    set_seed(seed)
    model, clean = TextImageModel(TextImageSettings(vocabulary=len(tokenizer))), partial(draw_pairs, without=UNSEEN)
    objective = TextImage(partial(clean, wrong=wrong), tokenizer, options.rows, seed, loss)
    settings = TrainSettings(
        steps=options.steps, precision="float32", device="cpu", checkpoint_every=options.steps, seed=seed)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train(model, objective, settings, folder)
    seconds = time.process_time() - start
    seen, unseen = score_exam(model, tokenizer, SEEN), score_exam(model, tokenizer, UNSEEN, each=80)
    recall = recall_pairs(model, tokenizer, *clean(np.random.default_rng(2**32 + 1), 200))
    shares = {"form": seen["form"], "colour": seen["colour"], "both": seen["both"], "both, unseen": unseen["both"],
              "recall@1": statistics.mean(way[1] for way in recall.values()),
              "recall@5": statistics.mean(way[5] for way in recall.values())}
    return {name: 100 * share for name, share in shares.items()} | {"processor [s]": seconds}


def summarise(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval."""
    if len(values) < 2:
        return values[0], math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", nargs="?", help="write all numbers to this JSON file")
    for name, value in (("steps", 300), ("rows", 48), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--wrong", type=float, nargs="+", default=[0.0, 0.2, 0.5])
    options = parser.parse_args()
    tokenizer = train_tokenizer(draw_pairs(np.random.default_rng(0), 2000)[1], 400)
    cases = [*(("clip", wrong) for wrong in options.wrong), ("siglip", 0.0)]
    found: dict[tuple, list] = {case: [] for case in cases}
    turns = [(case, seed) for seed in range(options.seeds) for case in cases]  # interleaved
    for case, seed in progress(turns, "training", unit="model"):
        found[case].append(measure(*case, seed, options, tokenizer))
    rows = []
    for (loss, wrong), results in found.items():
        row = {"loss": loss, "wrong captions [%]": 100 * wrong}
        for name in results[0]:
            mean, half = summarise([result[name] for result in results])
            row[name] = f"{mean:.1f} ± {half:.1f}"
        rows.append(row)
    chance = {"loss": "chance", "form": "20.0", "colour": "16.7", "both": "3.3", "both, unseen": "3.3",
              "recall@1": "0.5", "recall@5": "2.5"}
    print(Table([*rows, chance], f"Zero-shot [%] after {options.steps} steps of {options.rows}, {options.seeds} seeds"))
    if options.output:
        kept = [{"loss": loss, "wrong": wrong, "results": results} for (loss, wrong), results in found.items()]
        with open(options.output, "w", encoding="utf-8") as stream:
            json.dump({"options": vars(options), "cases": kept}, stream, indent=1)


if __name__ == "__main__":
    main()
