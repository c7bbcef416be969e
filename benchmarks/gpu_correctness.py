"""Is everything right on this device? The stage ``correctness``, before anything is timed."""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks import gpu_check_losses, gpu_check_views
from benchmarks.gpu_check_losses import Check
from benchmarks.gpu_device import Device
from benchmarks.gpu_store import DeviceBroken, OutOfTime, Store
from benchmarks.machine import REPOSITORY

PASSED, FAILED, ABSENT = "passed", "failed", "absent"


def run(store: Store, device: Device) -> None:
    """Run the checks that are missing, then the tests that need a GPU.

    Raises:
        OutOfTime: when what is next would not fit; what has run is kept.
        DeviceBroken: if a check left the device unusable.
    """
    seed = torch.seed()
    whole_s = store.left_s()
    for name, check in chain(gpu_check_losses.checks(device), gpu_check_views.checks(device)):
        case = {"check": name}
        if store.has(case):
            continue
        store.check_time()
        start = time.monotonic()
        if store.broke(case, name):
            result = {"outcome": FAILED, "reason": "broke the device, crashed or hung"}
        else:
            result = _outcome(case, check, store)
        store.add(case, {**result, "seed": seed}, time.monotonic() - start)
        if result["outcome"] == FAILED:
            print(f"FAILED {name}: {result}", flush=True)
    for path in _test_files(device):
        case = {"check": f"pytest -m gpu {path}"}
        if not store.has(case):
            store.check_time()
            start = time.monotonic()
            left_s = store.left_s()
            result = _tests(path, left_s, device)
            if result is None:
                if left_s < 0.9 * whole_s:  # the next call has all of its time for it
                    raise OutOfTime
                result = {"outcome": FAILED, "reason": f"not done in {left_s:.0f} s"}
            store.add(case, result, time.monotonic() - start)
            print(f"{case['check']}: {result}", flush=True)
    store.finish()


def _test_files(device: Device) -> list[str]:
    """The test of the instruments, and all that speak of a GPU; one of them in a dry run."""
    found = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    paths = ["benchmarks/test_gpu_method.py"]
    paths += [str(x.relative_to(REPOSITORY)) for x in found if "gpu" in x.read_text()]
    return ["tests/test_evaluation.py"] if device.dry else paths


def _outcome(case: dict[str, Any], check: Check, store: Store) -> dict[str, Any]:
    try:
        with store.running(case, case["check"]):
            error, budget = check()
    except DeviceBroken:
        raise
    except Exception as problem:
        refused = isinstance(problem, ValueError) and "backend" in str(problem)
        reason = f"{type(problem).__name__}: {problem}"[:500]
        return {"outcome": ABSENT if refused else FAILED, "reason": reason}
    # Not `error > budget`: NaN must fail.
    return {"outcome": PASSED if error <= budget else FAILED, "error": error, "budget": budget}


def _tests(path: str, limit_s: float, device: Device) -> dict[str, Any] | None:
    """``pytest -m gpu`` of a file, where finding no GPU fails instead of skipping; None if cut."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", path]
        owed = {} if device.dry else {"CK_REQUIRE_CUDA": "1"}
        try:
            subprocess.run(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **owed},
                check=False,
                capture_output=True,
                timeout=max(limit_s, 1),
            )
        except subprocess.TimeoutExpired:
            return None
        if not report.exists():
            return {"outcome": FAILED, "reason": "pytest wrote no report"}
        return _read(ElementTree.parse(report).getroot())


def _read(root: ElementTree.Element) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    failures = []
    for test in root.iter("testcase"):
        problem = next((x for x in test if x.tag in ("failure", "error", "skipped")), None)
        counts[problem.tag if problem is not None else "passed"] += 1
        if problem is not None and problem.tag != "skipped":
            message = (problem.get("message") or "").splitlines()
            failures.append(f"{test.get('classname')}::{test.get('name')}: {message[:1]}"[:300])
    outcome = FAILED if failures else PASSED if counts["passed"] else ABSENT
    reason = "" if outcome == PASSED else f"{counts['skipped']} skipped, none selected or passed"
    return {
        "outcome": outcome,
        "counts": dict(counts),
        "failures": failures,
        "reason": f"{len(failures)} failed" if failures else reason,
    }
