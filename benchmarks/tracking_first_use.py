"""The first MLflow database: MLflow's own way on the disk, and ours in memory; interleaved, each in a fresh process."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

THEIRS = "from mlflow import MlflowClient; MlflowClient('sqlite:///{0}').search_experiments()"
OURS = "from llmbook.tracking import create_database; create_database('{0}'); " + THEIRS
TIMED = "import os, time, mlflow; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(way: str, place: Path) -> float:
    """Seconds from an imported MLflow to the first answer of a new database."""
    command = [sys.executable, "-W", "ignore", "-c", TIMED.format(way.format(place))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main(output: str = "", rounds: int = 5) -> None:
    """Print a table; write JSON if a path is given."""
    taken: dict[str, list[float]] = {"MLflow alone": [], "llmbook": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            taken["MLflow alone"].append(seconds(THEIRS, Path(folder) / f"a{i}.db"))
            taken["llmbook"].append(seconds(OURS, Path(folder) / f"b{i}.db"))
    for name, values in taken.items():
        print(f"{name:14} median {statistics.median(values):6.2f} s   from {min(values):.2f} to {max(values):.2f}")
    ratio = statistics.median(a / b for a, b in zip(*taken.values(), strict=True))
    print(f"median ratio {ratio:.1f}")
    if output:
        Path(output).write_text(json.dumps(taken | {"ratio": ratio}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:2])
