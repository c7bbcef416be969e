"""How a subject is measured: what is kept, what is left out, and what a target says."""

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from benchmarks import correctness, views
from benchmarks.harness import stage
from benchmarks.harness.device import Device
from benchmarks.harness.machine import Environment
from benchmarks.harness.store import DeviceBroken, OutOfTime, Store
from benchmarks.losses import arms, bench
from benchmarks.losses.arms import ARMS, EAGER, GEMM, OURS, Arm, Setting
from benchmarks.losses.bench import Case
from benchmarks.targets import losses_on_cpu, losses_on_gpu, views_on_gpu

ABOUT = {"device": "a card", "driver": "1", "source": "abc"}
CASE = Case("nt_xent", 8, 4, "fp32", compiled=False)
DEVICE = Device("cuda", dry=True)


@pytest.fixture
def store(tmp_path):
    return partial(Store, tmp_path / "stage.json", ABOUT, quick=True, dry=True, limit_s=60)


def _arm(monkeypatch, call):
    """Let one more arm take part, and no other than ours."""
    monkeypatch.setattr(arms, "ARMS", {OURS: ARMS[OURS], "other": Arm(lambda s: call)})


def _raise(error):
    def call(*_, **__):
        raise error

    return call


def test_measured_cases_survive_and_are_not_measured_again(store):
    first = store()
    first.add({"n": 1}, {"x": 2}, seconds=1.0)
    with pytest.raises(KeyboardInterrupt), first.running({"n": 2}, "arm"):
        raise KeyboardInterrupt
    again = store()
    assert again.has({"n": 1})
    assert not again.has({"n": 2})
    assert not again.broke({"n": 2}, "arm")
    again.finish()
    assert store().complete
    assert not store(force=True).complete


@pytest.mark.parametrize("name", ABOUT)
def test_an_unfinished_stage_goes_on_only_with_the_same_card_driver_and_code(tmp_path, store, name):
    store().add({"n": 1}, {}, seconds=1.0)
    with pytest.raises(ValueError, match=f"begun with {name} "):
        Store(tmp_path / "stage.json", {**ABOUT, name: "other"}, quick=True, dry=True)


def test_results_of_another_source_are_measured_anew(tmp_path, store):
    first = store()
    first.add({"n": 1}, {}, seconds=1.0)
    first.finish()
    again = Store(tmp_path / "stage.json", {**ABOUT, "source": "other"}, quick=True, dry=True)
    assert not again.complete
    assert not again.has({"n": 1})


def test_a_dry_run_is_not_taken_for_a_real_one(store):
    store().finish()
    with pytest.raises(ValueError, match="begun with dry True"):
        store(dry=False)


def test_no_case_starts_that_would_not_fit(store):
    stage = store(limit_s=10)
    stage.check_time()
    stage.add({"n": 1}, {}, seconds=9.0)
    with pytest.raises(OutOfTime):
        stage.check_time()


def test_out_of_memory_is_a_row(monkeypatch, store):
    _arm(monkeypatch, _raise(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 34 GiB")))
    result = bench.measure(CASE, store(), DEVICE)
    assert result["absent"]["other"] == "out of memory"
    assert OURS in result["times"]["forward+backward"]["milliseconds"]


def test_another_loss_is_not_timed(monkeypatch, store):
    _arm(monkeypatch, lambda z1, z2: 1.1 * (z1 - z2).square().mean())
    result = bench.measure(CASE, store(), DEVICE)
    assert "Disagreement: relative error of the loss" in result["absent"]["other"]
    assert "other" not in result["times"]["forward"]["milliseconds"]


def _logits_at_once(setting):
    return lambda rows, columns, positive: F.cross_entropy(
        rows @ columns.T / setting.temperature, positive
    )


@pytest.mark.parametrize("subject", [x for x in arms.SUBJECTS if x != "siglip"])
@pytest.mark.slow
def test_an_arm_is_one_entry(monkeypatch, store, subject):
    """Of a peer without a mask: its NT-Xent counts the anchor, and is judged by that."""
    arm = Arm(partial(arms.one_way, _logits_at_once), tuple(arms.SUBJECTS), masks_itself=False)
    monkeypatch.setitem(ARMS, "one more", arm)
    result = bench.measure(CASE._replace(subject=subject), store(), DEVICE)
    assert result["errors"]["one more"]["gradient"] < 1e-5
    assert "one more" in result["times"]["forward+backward"]["times_ours"]


@pytest.mark.slow
def test_linear_cross_entropy_of_torch_is_timed_or_left_out(monkeypatch, store):
    name = "torch linear_cross_entropy"
    case = CASE._replace(subject="info_nce", n=40)
    result = bench.measure(case, store(), DEVICE)
    has_it = hasattr(F, "linear_cross_entropy")
    assert (name in result["times"]["forward+backward"]["milliseconds"]) == has_it
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    result = bench.measure(case, store(force=True), DEVICE)
    assert result["absent"][name].startswith("not installed (cannot import name")
    assert name not in result["times"]["forward+backward"]["milliseconds"]


def test_ours_failing_leaves_the_others_their_times(monkeypatch, store):
    broken = Arm(lambda s: _raise(ValueError("no")))
    monkeypatch.setattr(arms, "ARMS", {OURS: broken, EAGER: ARMS[EAGER]})
    result = bench.measure(CASE, store(), DEVICE)
    assert result["absent"][OURS] == result["failed"] == "ValueError: no"
    timed = result["times"]["forward"]
    assert set(timed["milliseconds"]) - set(timed["rates"]) == {EAGER}
    assert timed["times_ours"] == {}


def test_an_arm_that_breaks_the_device_is_left_out_by_the_next_process(monkeypatch, store):
    _arm(monkeypatch, _raise(RuntimeError("CUDA error: an illegal memory access")))
    with pytest.raises(DeviceBroken):
        bench.measure(CASE, store(), DEVICE)
    after = store()
    result = bench.measure(CASE, after, DEVICE)
    assert "broke the device" in result["absent"]["other"]
    assert OURS in result["times"]["forward"]["milliseconds"]


@pytest.mark.slow
def test_an_arm_that_cannot_be_captured_keeps_its_other_times(monkeypatch, store):
    _arm(monkeypatch, ARMS[EAGER].build(Setting("nt_xent", 0.1, "fp32", DEVICE)))
    case = CASE._replace(graph=True)
    error = "CUDA error: operation not permitted when stream is capturing"
    device = Device("cuda", dry=True)
    monkeypatch.setattr(device, "graphed", _raise(RuntimeError(error)))
    for _ in (OURS, "other"):
        with pytest.raises(DeviceBroken):
            bench.measure(case, store(), device)
    result = bench.measure(case, store(), device)
    assert {OURS, "other"} <= set(result["times"]["forward"]["milliseconds"])
    assert "broke the device" in result["absent"][f"other, {bench.GRAPH}"]


@pytest.mark.parametrize(
    ("status", "output", "failed"),
    [
        (0, "3 passed in 1s", False),
        (5, "2 deselected in 1s", False),
        (1, "FAILED a.py::b - assert 1 == 2\n1 failed in 1s", True),
        (2, "", True),
    ],
)
def test_what_pytest_says_is_kept(monkeypatch, store, status, output, failed):
    done = SimpleNamespace(returncode=status, stdout=output, stderr="")
    monkeypatch.setattr(correctness.subprocess, "run", lambda *_, **__: done)
    result = correctness.measure(correctness.Case("a.py"), store(), DEVICE)
    assert ("failed" in result) == failed
    assert result["summary"] == (output.splitlines() or ["no output"])[-1]


def test_a_test_file_that_is_cut_short_is_run_again(monkeypatch, store):
    cut = correctness.subprocess.TimeoutExpired("pytest", 1)
    monkeypatch.setattr(correctness.subprocess, "run", _raise(cut))
    with pytest.raises(OutOfTime):
        correctness.measure(correctness.Case("a.py"), store(limit_s=20), DEVICE)
    result = correctness.measure(correctness.Case("a.py"), store(limit_s=600), DEVICE)
    assert "not done in" in result["failed"]


class Step(NamedTuple):
    """A case of the subject below."""

    action: str
    threads: int | None = None


def subject(*steps):
    """In the place of a module of benchmarks: what its process does in each case."""

    def measure(case, store, device):
        with store.running(case._asdict(), "arm"):
            if case.action == "crash" and not store.broke(case._asdict(), "arm"):
                faulthandler.disable()  # which would print where, as if something were wrong
                os.kill(os.getpid(), signal.SIGABRT)
            if case.action == "break" and not store.broke(case._asdict(), "arm"):
                raise RuntimeError("CUDA error: an illegal memory access")
            if case.action == "hang":
                time.sleep(60)
        return {"threads": torch.get_num_threads(), "failed": case.action == "fail"}

    cases = [Step(*step) for step in steps]
    return SimpleNamespace(cases=lambda kind, quick: cases, measure=measure)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a subject in processes that inherit it; returns the status and what was kept."""
    if sys.platform != "linux":
        pytest.skip("the subject is passed on by a fork")
    monkeypatch.setattr(stage, "SPAWN", multiprocessing.get_context("fork"))
    path = tmp_path / "stage.json"

    def run(*steps, limit_s=600.0):
        made = subject(*steps)
        monkeypatch.setattr(stage, "import_module", lambda name: made)
        made_up = stage.Stage("made-up", path, "cuda", quick=True, dry=True)
        status = stage.run(made_up, force=False, limit_s=limit_s)
        return status, json.loads(path.read_text())

    return run


@pytest.mark.parametrize("action", ["crash", "break"])
def test_a_process_that_breaks_is_started_again(run, action):
    status, results = run(("pass",), (action,), ("pass", 1))
    assert status == 0
    assert results["complete"]
    assert [action for action, _ in (c["case"].values() for c in results["cases"])] == [
        "pass", action, "pass",
    ]  # fmt: skip
    assert results["broke"] == [[{"action": action, "threads": None}, "arm"]]


def test_each_environment_has_a_process(run):
    _, results = run(("pass", 1), ("pass", 2))
    assert [c["threads"] for c in results["cases"]] == [1, 2]
    assert Environment(threads=2).variables() == {"OMP_NUM_THREADS": "2"}
    assert "MALLOC_MMAP_MAX_" in Environment("tuned").variables()


def test_a_case_that_fails_is_the_status(run, capfd):
    status, results = run(("fail",), ("pass", 1))
    assert (status, results["complete"]) == (1, True)
    assert "FAILED" in capfd.readouterr().err


def test_a_process_that_hangs_is_ended(run, monkeypatch):
    monkeypatch.setattr(stage, "_GRACE_S", 0.5)
    status, results = run(("hang",), limit_s=1.0)
    assert status == stage.UNFINISHED
    assert results["cases"] == []


def _spread(value):
    return {"median": value, "q1": value, "q3": value}


def _loss_case(n, d, eager, fraction, launches=4):
    ratios = {"eager": _spread(eager), "compiled eager": _spread(eager / 3)}
    timed = {
        "milliseconds": {OURS: _spread(1.0)},
        "times_ours": ratios,
        "fractions": {GEMM: _spread(fraction)},
    }
    return {
        "case": Case("nt_xent", n, d, graph=n <= 512)._asdict(),
        "times": {"forward+backward": timed, "CUDA graph": timed},
        "launches": {OURS: {"kernels": launches, "copies": 0}},
        "memory": {OURS: {"extra_mib": n / 100}},
    }


def test_targets_of_the_losses():
    cases = [
        _loss_case(256, 128, 2.0, 0.1),
        _loss_case(512, 128, 0.9, 0.1, launches=7),
        _loss_case(4096, 128, 10.0, 0.3),
        _loss_case(8192, 128, 9.5, 0.3),
        _loss_case(8192, 512, 4.0, 0.7),
        _loss_case(65536, 128, 12.0, 0.3),
    ]
    rows = {t.what: t for t in losses_on_gpu({"cases": cases})}
    at_128 = rows["NT-Xent forward+backward, bf16, N ≥ 4096, D = 128, against eager"]
    assert at_128.met
    assert at_128.measured == "9.50× [9.50, 9.50] at N = 8192, D = 128"
    assert rows["NT-Xent forward+backward, bf16, N ≥ 4096, D = 512, against eager"].met is False
    assert rows["NT-Xent forward+backward, bf16, N ≥ 4096, D = 2048, against eager"].met is None
    (gemm,) = (t for what, t in rows.items() if "over that of GEMM" in what)
    assert gemm.met
    assert "N = 8192, D = 512" in gemm.measured
    launches = rows["Kernel launches, NT-Xent forward+backward, N ≤ 512"]
    assert (launches.measured, launches.met) == ("7", False)
    assert rows["NT-Xent forward+backward, bf16, N ≤ 512, against eager"].met is False
    assert rows["NT-Xent forward+backward, N ≤ 512, in a CUDA graph"].measured == "2 of 2 sizes"
    assert rows["MiB beyond the inputs, NT-Xent, N = 65,536, D = 128"].met


def test_targets_of_the_views_take_the_faster_kornia():
    ours, slow, fast = [0.8e-6] * 3, [32e-6] * 3, [11.2e-6] * 3
    samples = {views.OURS: ours, views.KORNIA: slow, views.RESAMPLED: fast}
    kornias = (views.KORNIA, views.RESAMPLED)
    found = views_on_gpu({"256 → 224, 256 images": samples}, views.OURS, kornias)
    rows = {t.what: t for t in found}
    assert rows["256 → 224, 256 images, against Kornia"].met is False
    assert rows["256 → 224, 256 images, against Kornia"].measured.startswith("14.00×")
    assert rows["256 → 224, 256 images: views/s"].met
    assert rows["32 → 32, 256 images, against Kornia"].met is None
    assert rows["32 → 32, 256 images, against Kornia"].measured == "not measured"


def test_targets_without_results_are_not_measured():
    assert {t.met for t in losses_on_cpu({"cases": []})} == {None}
    assert {t.met for t in losses_on_gpu({"cases": []})} == {None}
