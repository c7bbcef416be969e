"""The trainer in several processes: the run of one process at the same batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budgets import relative_error
from trainer import checkpoint, resume

from train import run
from train.config import arguments

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = arguments(
    {
        "size": 16, "train_images": 288, "batch_size": 48, "epochs": 4, "stop_after": 2,
        "device": "cpu", "norm": "group", "optimizer": "sgd", "baselines": False,
        "pictures": False,
        # at a much larger rate a run is chaotic, and rounding alone parts it from its twin
        "lr": 0.005, "temperature": 0.5,
    }
)  # fmt: skip
ONE_STEP = ["--minutes=1e-6"]
# Starting two processes takes longer than the runs do. Each run leaves its process group, and the
# store of the launcher serves only one.
PROGRAM = f"""
import os, sys
import torch.distributed as dist
sys.path.insert(0, {str(EXAMPLES)!r})
from train import run

def train(name, look_every, *options):
    run.LOOK_EVERY = look_every
    if name != "plain":
        dist.init_process_group("gloo", init_method=f"file://{{os.getcwd()}}/{{name}}.store",
                                rank=int(os.environ["RANK"]), world_size=2)
    run.main([*sys.argv[1:], "--out", name, *options])

train("plain", 10)
train("chunked", 10, "--chunk-size=5")
train("plain, one step", 1, *{ONE_STEP})
train("chunked, one step", 1, "--chunk-size=5", *{ONE_STEP})
train("stopped", 4, *{ONE_STEP})
"""
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in this process, whole and after one step."""
    folder = tmp_path_factory.mktemp("alone")
    run.main([*SMALL, "--out", str(folder / "whole")])
    run.main([*SMALL, "--out", str(folder / "one step"), *ONE_STEP])
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The runs of PROGRAM in two processes, and what they said."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node=2", "program.py", *SMALL],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def history(folder):
    return checkpoint(folder)["progress"]["history"]


def assert_same_losses(found, expected):
    """Sums in another order are rounded differently, and each step passes that on to the next."""
    assert len(found) == len(expected) == 2
    for row, wanted in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert row == pytest.approx(wanted, abs=0.02)  # accuracies: a few images of hundreds


@pytest.mark.parametrize("kind", ["plain", "chunked"])
def test_two_processes_follow_the_run_of_one(alone, together, kind):
    folder, said = together
    assert "2 processes" in said
    assert said.count("epoch    1") == 2  # of two whole runs: once a run, not once a process
    expected = history(alone / "whole")
    assert_same_losses(history(folder / kind), expected)
    assert "knn" in expected[-1]
    assert expected[0]["loss"] - expected[1]["loss"] > 0.02  # it learns: these are runs that move


@pytest.mark.parametrize("kind", ["plain", "chunked"])
def test_the_first_gradient_is_that_of_one_process(alone, together, kind):
    """After one step the momentum is the gradient, of weights that are still equal bit for bit."""
    found, expected = checkpoint(together[0] / f"{kind}, one step"), checkpoint(alone / "one step")
    assert found["progress"]["step"] == expected["progress"]["step"] == 1
    gradients = expected["optimizer"]["state"]
    assert found["optimizer"]["state"].keys() == gradients.keys() != set()
    for i, state in gradients.items():
        momentum = found["optimizer"]["state"][i]["momentum_buffer"]
        # 2e-6 by rounding; 0.08 with the negatives of one process, 0.7 without the mean over both
        assert relative_error(momentum, state["momentum_buffer"]) < 1e-3


def test_two_processes_stop_together_and_are_resumed_by_one(alone, together):
    """They agree on the step at which the clock stops them; what they saved, one can go on with."""
    folder, said = together
    assert "stopped in epoch 1 after 4 of 6 steps (time is up)" in said
    assert checkpoint(folder / "stopped")["progress"]["step"] == 4
    run.main(resume(folder / "stopped", stop_after=2))
    assert_same_losses(history(folder / "stopped"), history(alone / "whole"))
