"""What grows how: time, memory and recall of every layer against the length of the text.

    python benchmarks/growth.py [RESULT.json] [--lengths 256 512 1024 2048 4096 8192] [--width 64] [--steps 400] [--depth 1]

First table: processor microseconds per token to learn and to write, bytes alive at the peak, bytes of the state, and the
resident peak that the system saw in a process of its own, with the exponents fitted to all lengths. All layers take turns;
the best of several rounds counts.
Second table: associative recall of four pairs at growing distance, equal parameters, over seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from llmbook.core import Meter, Table, set_seed, set_threads
from llmbook.growth import common_layers, compare_recall, exponents, fit_exponent, make_layer, measure_growth

COLUMNS = ("read [µs/token]", "learn [µs/token]", "write [µs/token]", "kept [B]", "peak [B]", "state [B]")


def resident(name: str, t: int, width: int) -> int:
    """Resident bytes that learning from one text adds, in this process."""
    set_seed(0)
    layer = make_layer(common_layers()[name], width, t)
    layer(torch.randn(1, 64, width))[0].sum().backward()  # what torch loads once
    x = torch.randn(1, t, width)
    with Meter() as idle:
        pass
    with Meter() as busy:
        layer(x)[0].sum().backward()
    return max(0, busy.peak_memory - idle.peak_memory)


def ask(name: str, t: int, width: int) -> int:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--lengths", str(t), "--width", str(width)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def grow(lengths: list[int], width: int, rounds: int, largest: float) -> tuple[list[dict], list[dict]]:
    """All measurements, and a summary per layer."""
    layers = common_layers()
    naive = "full, weights kept"  # its square must fit into memory
    short = [t for t in lengths if 2 * 4 * t * t * 6 < largest]
    rows = measure_growth({name: build for name, build in layers.items() if name != naive}, lengths, width, rounds=rounds)
    rows += measure_growth({naive: layers[naive]}, short, width, rounds=rounds) if len(short) > 1 else []
    for row in rows:
        row["resident [B]"] = ask(row["layer"], row["tokens"], width)
    power, summary = exponents(rows, COLUMNS), []
    for name, own in power.items():
        part = [row for row in rows if row["layer"] == name]
        system = [(row["tokens"], row["resident [B]"]) for row in part if row["resident [B]"] > 1e6]
        last = part[-1]
        summary.append({
            "layer": name, "longest": last["tokens"],
            **{key: last[key] for key in ("learn [µs/token]", "write [µs/token]")},
            "peak [MB]": last["peak [B]"] / 1e6,
            "resident [MB]": last["resident [B]"] / 1e6, "state [kB]": last["state [B]"] / 1e3,
            "time ~ t^": 1 + own["learn [µs/token]"], "peak ~ t^": own["peak [B]"], "state ~ t^": own["state [B]"],
            "resident ~ t^": fit_exponent(*zip(*system, strict=True)) if len(system) > 1 else float("nan"),
        })
    return rows, summary


def recall(seeds: int, steps: int, depth: int, parameters: int) -> list[dict]:
    """Mean share of right answers at each distance."""
    tested, rows = (0, 8, 16, 24, 32, 48, 64, 96, 128, 256), []
    contest = {name: build for name, build in common_layers(window=16).items() if name != "full, weights kept"}
    runs = [compare_recall(contest, range(25), tested, 4, parameters, steps, seed, depth) for seed in range(seeds)]
    for name in contest:
        own = [run[name] for run in runs]
        scores = {f"at {d} [%]": 100 * statistics.mean(one["scores"][d] for one in own) for d in tested}
        rows.append({"layer": name, "parameters": own[0]["parameters"], **scores})
    return rows


def main() -> None:
    """Run both measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    numbers = {"width": 64, "rounds": 3, "threads": 1, "seeds": 2, "steps": 400, "depth": 1, "parameters": 9000}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--largest", type=float, default=4e9, help="bytes that full attention with all weights may take")
    parser.add_argument("--one", help="measure the resident peak of this layer alone, and print it")
    own = parser.parse_args()
    set_threads(own.threads)
    if own.one:
        print(resident(own.one, own.lengths[0], own.width))
        return
    rows, summary = grow(own.lengths, own.width, own.rounds, own.largest)
    print(Table(summary, f"One layer of width {own.width}, one text, at its longest length; exponents over all lengths"))
    found = recall(own.seeds, own.steps, own.depth, own.parameters)
    print(Table(found, f"Recall of four pairs, {own.depth} layer(s), {own.steps} steps at distances to 24, {own.seeds} seeds"))
    if own.result:
        content = {"rows": rows, "summary": summary, "recall": found}
        Path(own.result).write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
