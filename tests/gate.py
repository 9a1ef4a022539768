"""Everything that must hold before a change lands; `make test` runs it and stops at the first step that fails."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = min(CORES, 4)

ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": str(max(1, CORES // WORKERS)),  # workers × threads = cores
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MPLBACKEND": "agg",
}

STEPS = {
    "style": "ruff check",
    "the form of the notebooks": "pytest tests/test_notebooks.py",
    "every notebook runs": f"nbdev-test --n-workers {WORKERS}",
    "the site builds": "python site/build.py",
    "tests": "pytest --ignore tests/test_notebooks.py",
}


def main() -> int:
    """Run the steps in order; return the exit status of the first that fails."""
    for title, command in STEPS.items():
        print(f"── {title}: {command}", flush=True)
        started = time.perf_counter()
        status = subprocess.run(command, shell=True, cwd=ROOT, env=ENVIRONMENT).returncode
        print(f"   {'FAILED' if status else 'ok'} in {time.perf_counter() - started:.0f} s", flush=True)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
