"""From a training token back to its source: `where` against reading the split and counting along.

    python benchmarks/traceability.py [RESULT.json] [--run runs/first] [--positions 200]

Both sides answer for the same random positions of the training shard of a finished run, and must give the same document.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy

from llmbook.core import InputError, Table
from llmbook.data import load_split
from llmbook.provenance import where
from llmbook.tokenization import TokenShard


def plain(position: int, tokens: Path, corpus: Path) -> dict:
    """Read the whole split, then find the document."""
    shard, documents = TokenShard(tokens), load_split(corpus, "train")
    number = int((shard.documents <= position).sum()) - 1
    return documents.iloc[number].to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--run", type=Path, default=Path("runs/first"))
    parser.add_argument("--positions", type=int, default=200)
    arguments = parser.parse_args()
    tokens, corpus = arguments.run / "tokens", arguments.run / "corpus"
    if not tokens.is_dir():
        raise InputError(f"no tokens in `{arguments.run}`", "a finished run", "start `llmbook run` first")
    shard = TokenShard(tokens)
    positions = numpy.random.default_rng(1).integers(0, len(shard), arguments.positions).tolist()
    milliseconds, sides = {"where": [], "whole split": []}, {"where": where, "whole split": plain}
    for position in positions:
        found = {}
        for name, function in sides.items():
            start = time.perf_counter()
            found[name] = function(position, tokens, corpus)["id"]
            milliseconds[name].append(1e3 * (time.perf_counter() - start))
        assert len(set(found.values())) == 1, found
    rows = [
        {"side": name, "median [ms]": statistics.median(taken), "slowest [ms]": max(taken),
         "95 % of answers within [ms]": sorted(taken)[int(0.95 * len(taken))]}
        for name, taken in milliseconds.items()
    ]
    print(Table(rows, f"{len(positions)} tokens of {len(shard):,}, {len(shard.documents):,} documents"))
    if arguments.result:
        Path(arguments.result).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
