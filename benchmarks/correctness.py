"""Is everything right on this GPU? The tests that need one, before anything is timed."""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from benchmarks.harness.device import Device
from benchmarks.harness.machine import REPOSITORY
from benchmarks.harness.report import Results, introduction, table
from benchmarks.harness.store import OutOfTime, Store

_WHOLE_S = 300  # a file of tests that is cut short with less than this left is run again


class Case(NamedTuple):
    """A file of tests."""

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
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        try:
            done = subprocess.run(
                [*command, f"--junitxml={report}", case.file],
                cwd=REPOSITORY,
                env={**os.environ, **owed},
                check=False,
                capture_output=True,
                text=True,
                timeout=None if left_s == float("inf") else max(left_s, 1),
            )
        except subprocess.TimeoutExpired:
            if left_s < _WHOLE_S:
                raise OutOfTime from None
            return {"seed": seed, "failed": f"not done in {left_s:.0f} s", "counts": {}}
        if not report.exists():
            return {"seed": seed, "failed": f"no report: {done.stderr[-300:]}", "counts": {}}
        return {"seed": seed, **read(ElementTree.parse(report).getroot())}


def read(root: ElementTree.Element) -> dict[str, Any]:
    """Counts, failures and reasons of skips of a JUnit report."""
    found: Counter[str] = Counter()
    messages: dict[str, dict[str, None]] = {"failures": {}, "skipped": {}}
    for test in root.iter("testcase"):
        problem = next((x for x in test if x.tag in ("failure", "error", "skipped")), None)
        found["passed" if problem is None else problem.tag] += 1
        if problem is not None:
            text = (problem.get("message") or "").partition("\n")[0][:300]
            skipped = problem.tag == "skipped"
            name = text if skipped else f"{test.get('classname')}::{test.get('name')}: {text}"
            messages["skipped" if skipped else "failures"][name] = None
    result: dict[str, Any] = {"counts": dict(found)} | {k: list(v) for k, v in messages.items()}
    if result["failures"]:
        result["failed"] = "; ".join(result["failures"])[:500]
    return result


def markdown(results: Results) -> str:
    """A row for each file, and what failed."""
    rows = []
    for c in results["cases"]:
        counts = Counter(c["counts"])
        failed = counts["failure"] + counts["error"] or int(bool(c.get("failed")))
        reasons = "; ".join(c.get("skipped", [])) or "–"
        cells = [counts["passed"], f"**{failed}**" if failed else 0, counts["skipped"], reasons]
        rows.append([c["case"]["file"], *cells, c["seed"]])
    header = ["", "passed", "failed", "skipped", "skipped why", "seed"]
    text = (
        "Each backend of losses and views against float64, on random inputs of the seed "
        "(`CK_SEED`) and memory full of NaN, every result twice and bit for bit the same; streams, "
        "CUDA graphs, `torch.compile`, large batches; and every other test that needs a GPU."
    )
    parts = [introduction("Correctness on a GPU", "correctness", results, text)]
    parts.append(table(header, rows, results["dry"]))
    parts += [f"{c['case']['file']}: {c['failed']}" for c in results["cases"] if c.get("failed")]
    return "\n\n".join(parts) + "\n"


def beside(timed: Results, path: Path) -> str:
    """A section of a page with figures: whether what was timed had been checked."""
    import json

    title = "\n## Correctness\n\n"
    if not path.exists():
        return title + "**Not checked: `correctness` has not run.**\n"
    checked = json.loads(path.read_text())
    passed = sum(c["counts"].get("passed", 0) for c in checked["cases"])
    failed = [c["case"]["file"] for c in checked["cases"] if c.get("failed")]
    text = f"{passed} tests passed; failing files: {', '.join(failed) or 'none'}."
    if not checked["complete"]:
        text += " **Incomplete.**"
    if any(checked["machine"][k] != timed["machine"][k] for k in ("source", "device")):
        text += " **Of another source or device than was timed.**"
    return f"{title}{text} See `correctness_gpu.md`.\n"
