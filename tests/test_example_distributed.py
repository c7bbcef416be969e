"""The reference training loop in several processes: the run of one process at the same batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "simclr.py"
SMALL = (
    *("--size", 16, "--train-images", 288, "--batch-size", 48, "--epochs", 4, "--stop-after", 2),
    *("--device", "cpu", "--norm", "group", "--optimizer", "sgd", "--no-baselines"),
    "--no-pictures",
    # at a much larger rate a run is chaotic, and rounding alone parts it from its twin
    *("--lr", 0.005, "--temperature", 0.5, "--out", "run"),
)
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


def command(processes, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run_script(processes, *arguments, cwd):
    done = subprocess.run(
        command(processes, *arguments), cwd=cwd, env=environment(),
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def checkpoint(folder):
    return torch.load(folder / "run" / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run_script(1, *SMALL, cwd=folder)
    return checkpoint(folder)


@pytest.mark.parametrize("options", [(), ("--chunk-size", 5)])
def test_two_processes_follow_the_run_of_one(alone, tmp_path, options):
    said = run_script(2, *SMALL, *options, cwd=tmp_path)
    assert "2 processes" in said
    assert said.count("epoch    1") == 1
    found = checkpoint(tmp_path)
    for row, expected in zip(found["history"], alone["history"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row == pytest.approx(expected, rel=1e-3, abs=2e-3)
    assert "knn" in row
    for part in ("encoder", "head"):
        for name, weight in alone[part].items():
            torch.testing.assert_close(found[part][name], weight, rtol=1e-5, atol=1e-6)
    losses = [row["loss"] for row in alone["history"]]
    assert losses[0] - losses[1] > 0.02  # it learns: these are runs that move


def test_two_processes_stop_together_and_are_resumed_by_one(alone, tmp_path):
    """They agree on the step at which the clock stops them; what they saved, one can go on with."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport simclr\n"
        "simclr.LOOK_EVERY = 4\nsimclr.main(sys.argv[1:])\n"
    )
    whole = command(2, *SMALL, "--minutes", 1e-6)
    whole[whole.index(str(SCRIPT))] = str(program)
    done = subprocess.run(
        whole, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stopped in epoch 1 after 4 of 6 steps (time is up)" in done.stdout
    assert checkpoint(tmp_path)["step"] == 4
    run_script(1, "--resume", "run", "--stop-after", 2, "--device", "cpu", cwd=tmp_path)
    for row, expected in zip(checkpoint(tmp_path)["history"], alone["history"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
