"""A run of the trainer: its files, stopping and resuming anywhere, what it says to bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from trainer import assert_same, checkpoint, command, make_image_folder, resume

from train import learner, run, system
from train.config import UserError
from train.learner import Learner, warmup_cosine
from train.run import main

TRAINER = Path(__file__).parents[2] / "examples" / "train"


def curve(out):
    return [row["loss"] for row in checkpoint(out)["progress"]["history"]]


def before_step(monkeypatch, number, act):
    """Let `act` happen in the step of this number; an epoch has five."""
    steps, update = [], Learner.update

    def wrapper(*args):
        steps.append(1)
        if len(steps) == number:
            act()
        return update(*args)

    monkeypatch.setattr(Learner, "update", wrapper)


def test_run_folder(root, tmp_path, capsys):
    out = tmp_path / "run"
    scores = main(command(root, out=out, epochs=2, pictures=True, baselines=True, eval_z=True))
    pictures = {"pairs.png", "curve.png", "neighbors.png", "map.png"}
    others = {"checkpoint.pt", "config.json", "encoder.pt", "results.json"}
    assert {path.name for path in out.iterdir()} == pictures | others
    for name in pictures:
        assert np.asarray(Image.open(out / name)).std() > 10
    config = json.loads((out / "config.json").read_text())
    assert (config["seed"], config["size"], config["load_size"]) == (0, 8, 8)
    assert config["about"]["torch"] == torch.__version__
    assert config["about"]["commit"] == system.git("rev-parse", "HEAD")
    results = json.loads((out / "results.json").read_text())
    assert results.pop("kNN settings") == {"k": 5, "temperature": 0.1}
    assert results["training"]["images per second"] > 0
    assert results.pop("training")["seconds"] > 0
    history = results.pop("history")
    assert history == checkpoint(out)["progress"]["history"]
    assert list(results) == ["raw pixels", "random encoder", "SimCLR", "SimCLR, z"]
    assert results["SimCLR"] == scores["SimCLR"]._asdict() != results["SimCLR, z"]
    assert [row["epoch"] for row in history] == [1, 2]
    assert all(0 < row["loss"] < math.log(15) + 10 for row in history)
    assert all(0 <= row["accuracy"] <= 1 for row in history)
    assert history[-1]["knn"] == scores["SimCLR"].knn
    said = capsys.readouterr().out
    assert "random encoder" in said
    assert "images/s  data " in said
    assert_same(torch.load(out / "encoder.pt", weights_only=True), checkpoint(out)["encoder"])


def test_other_seeds_give_other_runs(root, tmp_path):
    for seed in (0, 1):
        main(command(root, out=tmp_path / str(seed), epochs=1, seed=seed))
    with pytest.raises(AssertionError):
        assert_same(*(checkpoint(tmp_path / str(seed))["encoder"] for seed in (0, 1)))


def test_each_epoch_has_an_order_of_its_own(root, tmp_path, monkeypatch):
    seen, update = [], Learner.update
    monkeypatch.setattr(
        Learner, "update", lambda self, x, *rest: (seen.append(x), update(self, x, *rest))[1]
    )
    main(command(root, out=tmp_path / "run", epochs=2))
    first, second = torch.cat(seen[:5]), torch.cat(seen[5:])
    assert not torch.equal(first, second)
    assert len(first.flatten(1).unique(dim=0)) == 40  # no image twice


def test_a_run_stopped_after_an_epoch_is_the_whole_run(root, whole, tmp_path):
    parts = tmp_path / "parts"
    assert main(command(root, out=parts, stop_after=2)) is None
    assert len(curve(parts)) == 2
    torch.manual_seed(1234)
    assert main(resume(parts)) == whole[0]
    assert_same(checkpoint(parts), checkpoint(whole[1]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_by_a_signal_is_the_whole_run(
    root, whole, tmp_path, number, monkeypatch, capsys
):
    parts = tmp_path / "parts"
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        before_step(patch, 8, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stopped:
            main(command(root, out=parts))
    assert stopped.value.code == 128 + number
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    said = capsys.readouterr().out
    assert f"epoch 2 after 3 of 5 steps ({number.name}); continue with --resume {parts}" in said
    state = checkpoint(parts)
    assert (state["progress"]["step"], len(state["progress"]["history"])) == (3, 1)
    config = state["config"]
    factor = warmup_cosine(5 + 3, 5 * config["warmup_epochs"], 5 * config["epochs"])
    for group in state["optimizer"]["param_groups"]:  # a new rate at every step, not every epoch
        assert group["lr"] == pytest.approx(group["initial_lr"] * factor)
    torch.manual_seed(1234)
    assert main(resume(parts)) == whole[0]
    assert_same(checkpoint(parts), checkpoint(whole[1]))


@pytest.mark.parametrize(
    "changes",
    [
        {"stream": True, "norm": "group", "chunk_size": 3, "optimizer": "sgd"},
        {"amp": True, "channels_last": True, "head_layers": 1, "loss": "sogclr"},
    ],
)
def test_so_it_is_with_other_settings(root, tmp_path, changes, monkeypatch):
    out, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"epochs": 2, **changes}
    expected = main(command(root, out=out, **changes))
    with monkeypatch.context() as patch:
        before_step(patch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            main(command(root, out=parts, **changes))
    torch.manual_seed(1234)
    assert main(resume(parts)) == expected
    assert_same(checkpoint(parts), checkpoint(out))


def test_the_clock_stops_a_run_in_stages(root, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(root, out=out, epochs=1, minutes=1e-6)) is None
    assert "epoch 1 after 1 of 5 steps (time is up); continue with" in capsys.readouterr().out
    assert not (out / "results.json").exists()
    assert main(resume(out)) is not None


def test_long_epochs_are_saved_within(root, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LOOK_EVERY", 2)
    steps = []
    monkeypatch.setattr(
        run,
        "write_atomically",
        lambda path, write: (
            steps.append(write.args[0]["progress"]["step"]) if path.suffix == ".pt" else None
        ),
    )
    main(command(root, out=tmp_path / "run", save_minutes=1e-9, stop_after=2))
    assert steps == [0, 2, 4, 0, 2, 4, 0]


def test_a_second_signal_acts_at_once():
    # A shell starts a background job with SIGINT ignored, and so would this test then run.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with system.StopRequest(None) as stop:
            assert not stop
            signal.raise_signal(signal.SIGINT)
            assert stop
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_supervised_comparison_learns_the_labels(root, tmp_path):
    out = tmp_path / "run"
    changes = {"supervised": True, "epochs": 12, "augment": ["flip"], "eval_every": 12}
    scores = main(command(root, out=out, **changes))
    history = curve(out)
    assert history[0] > 0.9
    assert history[-1] < 0.7
    assert list(scores) == ["supervised"]


def test_a_batch_of_16_chunks_has_the_loss_curve_of_the_whole(tmp_path):
    root = make_image_folder(tmp_path / "images", train=43)
    shared = {"epochs": 2, "norm": "group"}
    main(command(root, out=tmp_path / "whole", batch_size=64, **shared))
    main(command(root, out=tmp_path / "chunked", batch_size=64, chunk_size=4, **shared))
    expected = curve(tmp_path / "whole")
    # rounding differs with the number of images at a time, and each step passes it on
    assert curve(tmp_path / "chunked") == pytest.approx(expected, rel=1e-4)
    assert abs(expected[0] - expected[-1]) > 1e-3
    # the small batch alone is another objective
    main(command(root, out=tmp_path / "small", batch_size=4, **shared))
    assert curve(tmp_path / "small") != pytest.approx(expected, rel=0.1)


def test_without_a_head_h_is_z(root, tmp_path):
    scores = main(command(root, out=tmp_path / "run", epochs=1, head_layers=0, eval_z=True))
    assert scores["SimCLR"] == scores["SimCLR, z"]


@pytest.fixture(scope="module")
def stopped_once(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    main(command(root, out=folder / "run", epochs=2, stop_after=1))
    return folder / "run"


@pytest.fixture
def stopped(stopped_once, tmp_path):
    return shutil.copytree(stopped_once, tmp_path / "stopped")


def test_checkpoints_that_cannot_be_resumed(stopped, tmp_path):
    path = stopped / "checkpoint.pt"
    whole = path.read_bytes()
    foreign, unsafe = tmp_path / "foreign.pt", tmp_path / "unsafe.pt"
    torch.save({"model": torch.ones(3)}, foreign)
    torch.save({"model": SimpleNamespace()}, unsafe)
    for content in (
        whole[: len(whole) // 2], b"", b"some text", unsafe.read_bytes(), foreign.read_bytes()
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged or no checkpoint of this version \(.*\)$"):
            main(resume(stopped))
        assert path.read_bytes() == content
    path.unlink()
    with pytest.raises(UserError, match="nothing to resume"):
        main(resume(stopped))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["config"].update(new_option=1),
        lambda state: state.update(format="another"),
        lambda state: state.pop("views"),
        lambda state: state["progress"].pop("step"),
        lambda state: state["encoder"].popitem(),
    ],
)
def test_a_checkpoint_of_another_version(stopped, change):
    path = stopped / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"is damaged or no checkpoint of this version \(.*\)$"):
        main(resume(stopped))


def test_resume_takes_no_new_settings(stopped):
    with pytest.raises(UserError, match="omit --out, --lr"):
        main(resume(stopped, out="x", lr=1))


def test_resume_takes_no_other_data(stopped, root, tmp_path):
    other = shutil.copytree(root, tmp_path / "images")
    (other / "train" / "red" / "0.png").unlink()
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    state["config"]["root"] = str(other)
    torch.save(state, stopped / "checkpoint.pt")
    with pytest.raises(UserError, match="the data are not those that the run began with"):
        main(resume(stopped))


def test_a_run_is_not_overwritten(stopped, root):
    before = (stopped / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match="holds a run"):
        main(command(root, out=stopped))
    assert (stopped / "checkpoint.pt").read_bytes() == before


def test_a_full_disk_keeps_the_last_checkpoint(stopped, monkeypatch):
    before = (stopped / "checkpoint.pt").read_bytes()

    def full(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(system.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left.*unchanged"):
        main(resume(stopped))
    assert (stopped / "checkpoint.pt").read_bytes() == before
    assert list(stopped.glob("*.tmp")) == []


def test_a_folder_that_became_read_only(tmp_path, monkeypatch):
    def read_only(*_args, **_options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(UserError, match=r"cannot write .*Read-only"):
        system.write_json(tmp_path / "config.json", {})


def test_nan_loss_stops_and_keeps_the_last_checkpoint(stopped, monkeypatch):
    before = (stopped / "checkpoint.pt").read_bytes()

    class NaNLoss(learner.NTXent):
        def forward(self, *views, **options):
            loss, stats = super().forward(*views, **options)
            return loss * math.nan, stats

    monkeypatch.setattr(learner, "NTXent", NaNLoss)
    with pytest.raises(UserError, match="the loss is nan in epoch 2; the checkpoint"):
        main(resume(stopped))
    assert (stopped / "checkpoint.pt").read_bytes() == before


def test_weights_that_are_not_finite_are_not_saved(stopped, monkeypatch):
    before = (stopped / "checkpoint.pt").read_bytes()

    def spoil(learns, *batch, update=Learner.update):
        result = update(learns, *batch)
        with torch.no_grad():
            next(learns.encoder.parameters())[0, 0] = math.nan
        return torch.zeros_like(result)

    monkeypatch.setattr(Learner, "update", spoil)
    with pytest.raises(UserError, match="the weights are not finite in epoch 2"):
        main(resume(stopped))
    assert (stopped / "checkpoint.pt").read_bytes() == before


def test_an_image_that_breaks_in_the_course_of_training(root, tmp_path, monkeypatch):
    """The steps before it are saved; once it is repaired, the run goes on as it would have."""
    root = shutil.copytree(root, tmp_path / "images")
    out, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"epochs": 2, "stream": True}
    expected = main(command(root, out=out, **changes))

    def damage():
        for path in (root / "train").rglob("*.png"):
            path.rename(path.with_suffix(".kept"))
            path.write_text("no image")

    with monkeypatch.context() as patch:
        before_step(patch, 7, damage)
        with pytest.raises(UserError, match=r"cannot read .*the run is saved: .*--resume"):
            main(command(root, out=broken, **changes))
    assert checkpoint(broken)["progress"]["step"] == 2
    for path in (root / "train").rglob("*.kept"):
        path.rename(path.with_suffix(".png"))
    assert main(resume(broken)) == expected
    assert_same(checkpoint(broken), checkpoint(out))


def test_a_test_image_that_breaks_costs_no_epoch(root, tmp_path, monkeypatch):
    root = shutil.copytree(root, tmp_path / "images")
    damage = next((root / "test").rglob("*.png")).write_text
    before_step(monkeypatch, 5, lambda: damage("no image"))
    with pytest.raises(UserError, match=r"cannot read .*the run is saved: .*--resume"):
        main(command(root, out=tmp_path / "run", stream=True, eval_every=1))
    assert len(curve(tmp_path / "run")) == 1


def test_interruption_names_the_way_back(stopped, root, tmp_path, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "finish", interrupt)
    with pytest.raises(UserError, match=r"interrupted; .*--resume"):
        main(resume(stopped))
    assert len(curve(stopped)) == 2
    monkeypatch.setattr(run, "begin", interrupt)
    with pytest.raises(UserError, match="interrupted; nothing had been learned"):
        main(command(root, out=tmp_path / "run"))


def test_tensorboard(root, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    main(command(root, out=out, epochs=2, tensorboard=True))
    written = events.EventAccumulator(str(out / "tensorboard")).Reload()
    assert {"loss", "accuracy", "knn", "images per second"} <= set(written.Tags()["scalars"])
    assert [event.value for event in written.Scalars("loss")] == pytest.approx(curve(out))


def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="--device nonesuch cannot be used"):
        main(["--device", "nonesuch"])


@pytest.mark.slow
def test_the_command_on_the_default_data_until_it_is_told_to_end(tmp_path):
    small = ("--size", 16, "--train-images", 256, "--batch-size", 32, "--epochs", 500)
    arguments = (*small, "--no-baselines", "--no-pictures", "--device", "cpu")
    whole = [sys.executable, str(TRAINER), *map(str, arguments)]
    with subprocess.Popen(whole, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("epoch    1") for line in lines)
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
        assert process.wait(60) == 128 + signal.SIGTERM
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name.startswith("photos-")
    assert f"(SIGTERM); continue with --resume {Path('runs') / out.name}" in said
    assert len(curve(out)) >= 1


@pytest.mark.slow
def test_the_command_shows_one_line_for_an_error_in_a_worker(tmp_path):
    root = make_image_folder(tmp_path / "images")
    (root / "test" / "red" / "2.png").write_bytes(b"")
    arguments = command(root, out=tmp_path / "run", stream=True, workers=1, baselines=True)
    done = subprocess.run(
        [sys.executable, str(TRAINER), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: cannot read")
    assert "2.png" in line
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
