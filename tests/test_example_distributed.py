"""The reference training loop in several processes: the run of one process at the same batch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budgets import relative_error

SCRIPT = Path(__file__).parents[1] / "examples" / "simclr.py"
SMALL = (
    *("--size", 16, "--train-images", 288, "--batch-size", 48, "--epochs", 4, "--stop-after", 2),
    *("--device", "cpu", "--norm", "group", "--optimizer", "sgd", "--no-baselines"),
    "--no-pictures",
    # at a much larger rate a run is chaotic, and rounding alone parts it from its twin
    *("--lr", 0.005, "--temperature", 0.5),
)
# Starting two processes takes longer than the three runs do. Each run leaves its process group, and
# the store of the launcher serves only one.
PROGRAM = f"""
import os, sys
import torch.distributed as dist
sys.path.insert(0, {str(SCRIPT.parent)!r})
import simclr

def run(name, *options):
    if name != "plain":
        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo", init_method=f"file://{{os.getcwd()}}/{{name}}.store",
                                rank=rank, world_size=2)
    simclr.main([*sys.argv[1:], "--out", name, *options])

run("plain")
run("chunked", "--chunk-size", "5")
simclr.LOOK_EVERY = 4
run("stopped", "--minutes", "1e-6")
"""
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
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def checkpoint(folder, run="run"):
    return torch.load(folder / run / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run_script(1, *SMALL, "--out", "run", cwd=folder)
    return checkpoint(folder)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Three runs in two processes, started once: plain, in chunks, and stopped by the clock."""
    folder = tmp_path_factory.mktemp("together")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    whole = command(2, *SMALL)
    whole[whole.index(str(SCRIPT))] = str(program)
    done = subprocess.run(
        whole, cwd=folder, env=environment(), capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def assert_same_losses(history, expected):
    """Sums in another order make other roundings, which each step passes on to the next."""
    for row, wanted in zip(history, expected, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert row == pytest.approx(wanted, abs=0.02)  # accuracies: a few images of hundreds


@pytest.mark.parametrize("run", ["plain", "chunked"])
def test_two_processes_follow_the_run_of_one(alone, together, run):
    folder, said = together
    assert "2 processes" in said
    assert said.count("epoch    1") == 2  # once a run, not once a process
    found = checkpoint(folder, run)
    assert_same_losses(found["history"], alone["history"])
    assert "knn" in found["history"][-1]
    # The momentum is the sum of the gradients. Where rounding moves a value across the corner of a
    # ReLU, it differs by a hundredth; without the mean over processes, by a half.
    for i, state in alone["optimizer"]["state"].items():
        momentum = found["optimizer"]["state"][i]["momentum_buffer"]
        assert relative_error(momentum, state["momentum_buffer"]) < 0.1
    losses = [row["loss"] for row in alone["history"]]
    assert losses[0] - losses[1] > 0.02  # it learns: these are runs that move


def test_two_processes_stop_together_and_are_resumed_by_one(alone, together, tmp_path):
    """They agree on the step at which the clock stops them; what they saved, one can go on with."""
    folder, said = together
    assert "stopped in epoch 1 after 4 of 6 steps (time is up)" in said
    assert checkpoint(folder, "stopped")["step"] == 4
    shutil.copytree(folder / "stopped", tmp_path / "run")
    run_script(1, "--resume", "run", "--stop-after", 2, "--device", "cpu", cwd=tmp_path)
    assert_same_losses(checkpoint(tmp_path)["history"], alone["history"])
