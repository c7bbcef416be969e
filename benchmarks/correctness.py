"""Is everything right on this GPU? The tests that need one, before anything is timed."""

import os
import subprocess
import sys
from typing import Any, NamedTuple

import torch

from benchmarks.harness import report
from benchmarks.harness.device import Device
from benchmarks.harness.machine import REPOSITORY
from benchmarks.harness.report import Results
from benchmarks.harness.store import OutOfTime, Store

_WHOLE_S = 300  # a file of tests that is cut short with less than this left is run again


class Case(NamedTuple):
    file: str


def cases(kind: str, quick: bool) -> list[Case]:
    """All files that speak of a GPU; only those of tests/gpu where it is to be quick."""
    folder = REPOSITORY / "tests"
    found = sorted((folder / "gpu" if quick else folder).rglob("test_*.py"))
    return [Case(str(x.relative_to(REPOSITORY))) for x in found if "gpu" in x.read_text()]


def measure(case: Case, store: Store, device: Device) -> dict[str, Any]:
    """``pytest -m gpu`` of a file on fresh random inputs, where finding no GPU fails.

    Raises:
        OutOfTime: if it was cut short, and would have more time in the next call.
    """
    seed, left_s = torch.seed() % 2**32, store.left_s()
    owed = {"CK_REQUIRE_CUDA": "1", "CK_SEED": str(seed)} | ({"CK_DRY": "1"} if device.dry else {})
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "-m", "gpu", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, case.file],
            cwd=REPOSITORY,
            env={**os.environ, **owed, "COLUMNS": "300"},
            check=False,
            capture_output=True,
            text=True,
            timeout=None if left_s == float("inf") else max(left_s, 1),
        )
    except subprocess.TimeoutExpired:
        if left_s < _WHOLE_S:
            raise OutOfTime from None
        return {"seed": seed, "summary": "", "failed": f"not done in {left_s:.0f} s"}
    lines = done.stdout.splitlines() or done.stderr.splitlines() or ["no output"]
    said = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    result: dict[str, Any] = {"seed": seed, "summary": lines[-1].strip("= "), "said": said}
    # 5: no test is selected, where a file speaks of a GPU in other words.
    return result if done.returncode in (0, 5) else result | {"failed": lines[-1]}


def markdown(results: Results) -> str:
    """A row for each file, and what failed or was skipped."""
    said = [line for c in results["cases"] for line in (*c.get("said", ()), c.get("failed"))]
    return report.page("correctness", **results, said=list(filter(None, said)))
