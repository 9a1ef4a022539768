"""What packing by best fit costs: to plan the rows, and in each step through its mask; and which documents stay whole.

The step is the loop's own at 4 layers of 192 and 8 rows of 256, once in windows of the stream with the plain causal
kernel, once in packed rows
with a mask over documents, interleaved, in processor seconds.
    python benchmarks/packing.py [RESULT.json] [--rounds 5] [--documents 1000000] [--threads 1]
"""

import argparse
import statistics
import time
from pathlib import Path


def main() -> None:
    "Plan, step, compare."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    import numpy as np

    from llmbook.architecture import Decoder, DecoderSettings
    from llmbook.core import Table, set_threads, write_json
    from llmbook.objectives import Autoregressive
    from llmbook.packing import Packed, cut_stream, fit_best

    set_threads(options.threads)
    chance = np.random.default_rng(0)
    lengths = np.maximum(2, chance.lognormal(4.5, 1.2, options.documents).astype(np.int64))  # as documentation has them
    starts, plans = np.cumsum(lengths) - lengths, []
    for name, way in {"cut the stream": cut_stream, "best fit": fit_best}.items():
        for size in (256, 2048):
            began = time.process_time()
            packing = way(lengths, size)
            plans.append({
                "way": name, "row": size, "CPU-s": round(time.process_time() - began, 2), "documents": len(lengths),
                "cut without need": f"{packing.count_cut(starts):.1%}", "padding": f"{packing.padding:.2%}",
            })
    print(Table(plans))
    few = lengths[:3000]
    tokens = chance.integers(0, 4096, few.sum(), np.uint16)
    objectives = {
        "windows, causal kernel": Autoregressive(tokens, 256, 8),
        "packed, mask": Packed(tokens, np.cumsum(few) - few, 256, 8),
    }
    model = Decoder(DecoderSettings(4096, 4, 192, 3, 3, 512, 256))
    spent: dict[str, list[float]] = {name: [] for name in objectives}
    for step in range(options.rounds + 1):
        for name, objective in objectives.items():
            began = time.process_time()
            batch = objective.batch(step)
            objective.loss(model, batch).backward()
            model.zero_grad()
            spent[name].append((time.process_time() - began) / objective.count(batch))
    steps = [
        {"rows": name, "CPU-ms per 1,000 labels": round(1e6 * statistics.median(times[1:])),
         "from": round(1e6 * min(times[1:])), "to": round(1e6 * max(times[1:]))}
        for name, times in spent.items()
    ]
    print(Table(steps))
    first, second = (statistics.median(times[1:]) for times in spent.values())
    print(f"a step with the mask costs {second / first:.2f} times a step without")
    if options.result:
        write_json(Path(options.result), {"plans": plans, "steps": steps, "ratio": second / first})


if __name__ == "__main__":
    main()
