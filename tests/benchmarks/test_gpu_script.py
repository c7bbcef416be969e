"""benchmarks/gpu.sh runs end to end without a GPU, writes no figures, and refuses to pretend."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
SCRIPT = REPOSITORY / "benchmarks" / "gpu.sh"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux"),
]


def run(*arguments, **environment):
    return subprocess.run(
        ["bash", SCRIPT, *map(str, arguments)],
        check=False, capture_output=True, text=True,
        env={**ENVIRONMENT, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of a dry run of all stages, in which no peer but Kornia is installed."""
    missing = tmp_path_factory.mktemp("missing")
    for name in ("lightly", "open_clip", "pytorch_metric_learning", "inf_cl", "cut_cross_entropy"):
        (missing / f"{name}.py").write_text('raise ImportError("left out by the test")\n')
    before = contents(RESULTS)
    out = tmp_path_factory.mktemp("out")
    done = run("--dry", "--out", out, PYTHONPATH=str(missing))
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(RESULTS) == before
    return out


def test_every_stage_leaves_its_files(dry):
    assert {path.name for path in dry.iterdir()} == {
        f"{stem}_gpu.{kind}"
        for stem in ("correctness", "loss", "augment")
        for kind in ("json", "md")
    }
    for path in dry.glob("*.json"):
        results = json.loads(path.read_text())
        assert results["complete"]
        assert results["dry"]
        assert results["machine"]["device"] == "CPU, dry run"


@pytest.mark.parametrize("name", ["loss_gpu.md", "augment_gpu.md"])
def test_every_table_says_that_it_has_no_figures(dry, name):
    lines = (dry / name).read_text().splitlines()
    tables = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    assert len(tables) >= 5
    assert all(lines[i - 3] == "*dry run: no figures*" for i in tables)
    start = lines.index("## Targets")
    end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith("## "))
    targets = [line for line in lines[start:end] if line.startswith("| ")][2:]
    assert len(targets) >= 4
    assert all(line.endswith("| dry run: no figures |  |") for line in targets)


def test_what_is_absent_has_its_reason(dry):
    report = (dry / "loss_gpu.md").read_text()
    for peer in ("lightly", "open_clip", "pytorch-metric-learning", "inf_cl", "cut-cross-entropy"):
        assert re.search(rf"^- .*: {peer} at N = \d+: not installed \(left out", report, re.M)
    assert "backend triton at N = 8: " in report
    assert "CUDA graphs need a CUDA device" in report


def test_ours_and_eager_are_checked_and_timed(dry):
    for c in json.loads((dry / "loss_gpu.json").read_text())["cases"][:2]:
        for direction in ("forward", "forward+backward"):
            assert {"contrastive-kit", "contrastive-kit, tiled", "eager"} <= set(
                c["times"][direction]["milliseconds"]
            )
        assert c["errors"]["contrastive-kit"]["gradient"] < 0.02
    (c,) = json.loads((dry / "augment_gpu.json").read_text())["cases"]
    assert {"SimCLRAugment, uint8", "SimCLRAugment, torch", "Kornia, uint8"} <= set(
        c["seconds_per_view"]
    )
    checks = json.loads((dry / "correctness_gpu.json").read_text())["cases"]
    passed = [re.match(r"(\d+) passed", c["summary"]) for c in checks]
    assert sum(int(match[1]) for match in passed if match) >= 30
    assert not any(c.get("failed") for c in checks)


def test_a_stage_that_is_done_is_skipped(dry):
    before = contents(dry)
    done = run("--dry", "--out", dry, "views")
    assert done.returncode == 0
    assert "results are there" in done.stdout
    assert contents(dry) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry"], "--dry needs --out"),
        (["--dry", "--out", RESULTS, "losses"], "has no figures, and does not write into"),
        (["everything"], "unknown argument: everything"),
    ],
)
def test_refusals(arguments, message):
    before = contents(RESULTS)
    done = run(*arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert contents(RESULTS) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", tmp_path, "losses")
    assert done.returncode == 1
    assert "there is no CUDA device here" in done.stderr
    assert not list(tmp_path.iterdir())
