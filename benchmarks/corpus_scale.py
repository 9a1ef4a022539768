"""A corpus of many megabytes: documents per second with one and two processes, and what memory does as the text grows.

    python benchmarks/corpus_scale.py [RESULT.json] [--megabytes 10 40]

The text is generated: words drawn from a vocabulary of 20,000, one document in ten nearly a copy of another, some personal
data, some noise. Each size and number of processes runs in a process of its own; its peak memory is the system's figure.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy

from llmbook.core import Table

SCRIPT = """
import json, sys
from pathlib import Path
from llmbook.core import Meter
from llmbook.data import CorpusSettings, build_corpus

if __name__ == "__main__":
    rules = CorpusSettings(sys.argv[1], 1e6, workers=int(sys.argv[3]), quality="none")
    with Meter() as meter:
        numbers = build_corpus(rules, {}, Path(sys.argv[2]))
    print(json.dumps({"numbers": numbers, **meter.record()}))
"""


def write_source(path: Path, megabytes: float, seed: int = 1) -> int:
    """JSON lines of about so many megabytes; how many."""
    draw = numpy.random.default_rng(seed)
    words = numpy.array(["".join(draw.choice(list("aeioulnrstmcdbp"), 7)) for _ in range(20_000)])
    count, size, last = 0, 0, []
    with open(path, "w", encoding="utf-8") as stream:
        while size < megabytes * 1e6:
            text = draw.choice(words, int(draw.integers(60, 600))).tolist() if count % 10 or not last else last
            text[int(draw.integers(len(text)))] = "changed"
            last = text
            mail = " Ask ann@tea.org." if count % 7 == 0 else ""
            line = json.dumps({"text": " ".join(text) + mail, "license": "MIT"})
            stream.write(line + "\n")
            count, size = count + 1, size + len(line)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", nargs="?")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[10, 40])
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "build.py"
        script.write_text(SCRIPT)
        for megabytes in arguments.megabytes:
            source = Path(folder) / f"{megabytes:g}.jsonl"
            count = write_source(source, megabytes)
            for workers in (1, 2):
                out = Path(folder) / f"{megabytes:g}-{workers}"
                out.mkdir()
                command = [sys.executable, str(script), str(source), str(out), str(workers)]
                done = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
                rows.append({
                    "megabytes": megabytes, "processes": workers, "documents": count,
                    "documents per second": count / done["seconds"], "seconds": done["seconds"],
                    "CPU seconds": done["cpu_seconds"], "peak memory [MB]": done["peak_memory"] / 1e6,
                    "near-duplicates": done["numbers"]["removed"].get("near-duplicates", 0),
                })
    print(Table(rows, "Building a corpus; the peak is that of the main process"))
    if arguments.result:
        Path(arguments.result).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
