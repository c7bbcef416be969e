"""One command for every figure of the losses on a CPU: ``python -m benchmarks.run``.

Writes ``loss_cpu.json`` and ``loss_cpu.md``. Times come from two child processes: one with the
allocator as it is, one told to keep freed memory, since the page faults of returning and fetching
large blocks are most of what some peers cost.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import accuracy, machine, memory
from benchmarks.report import markdown

_KEEPS_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}

_RESULTS = machine.REPOSITORY / "benchmarks" / "results"


def run(quick: bool) -> dict[str, Any]:
    """Measure everything, or a few small sizes if ``quick``."""
    start = time.monotonic()
    results: dict[str, Any] = {
        "mode": "quick" if quick else "full",
        "machine": machine.describe(),
        "timings": {
            "default": _timings("quick" if quick else "full", {}),
            "tuned": _timings("quick" if quick else "allocator", _KEEPS_FREED_MEMORY),
        },
        "memory": memory.measure(
            memory.ARMS[:2] if quick else memory.ARMS, memory.SIZES[:2] if quick else memory.SIZES
        ),
        "accuracy": accuracy.measure(),
    }
    results["seconds"] = time.monotonic() - start
    results["load_average_after"] = round(os.getloadavg()[0], 2)
    return results


def _timings(cases: str, environment: dict[str, str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "timings.json"
        subprocess.run(
            [sys.executable, "-m", "benchmarks.timings", cases, str(out)],
            cwd=machine.REPOSITORY,
            env={**os.environ, **environment},
            check=True,
        )
        result: list[dict[str, Any]] = json.loads(out.read_text())
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the losses on a CPU.")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few small sizes, to see that everything runs; the report is printed, and written "
        "only where --out says",
    )
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results)")
    arguments = parser.parse_args()
    results = run(arguments.quick)
    report = markdown(results)
    print(report)
    out = arguments.out or (None if arguments.quick else _RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "loss_cpu.json").write_text(json.dumps(results, indent=1) + "\n")
        (out / "loss_cpu.md").write_text(report)


if __name__ == "__main__":
    main()
