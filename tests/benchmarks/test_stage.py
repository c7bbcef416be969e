"""The method of the GPU benchmarks: what is kept, what is left out, and what a target says."""

import json
import subprocess
from functools import partial

import pytest
import torch

from benchmarks import gpu_augment, gpu_correctness, gpu_loss
from benchmarks.gpu_arms import EAGER, GPU_SUBJECTS, PRECISIONS, GpuArm, Setting, gate
from benchmarks.gpu_check_losses import poisoned
from benchmarks.gpu_correctness import _outcome
from benchmarks.gpu_device import Device
from benchmarks.gpu_loss import Case
from benchmarks.gpu_store import DeviceBroken, OutOfTime, Store
from benchmarks.gpu_targets import augment_targets, loss_targets
from benchmarks.interleaved import time_survivors
from benchmarks.loss_arms import OURS

ABOUT = {"device": "a card", "driver": "1", "source": "abc"}
CASE = Case("nt_xent", 8, 4, "fp32", compiled=False)
DEVICE = Device(dry=True)


@pytest.fixture
def store(tmp_path):
    return partial(Store, tmp_path / "stage.json", ABOUT, dry=True, force=False, limit_s=60)


def _arm(monkeypatch, call):
    """Let one more arm take part, and no other than ours."""
    arms = {OURS: GPU_SUBJECTS["nt_xent"][OURS], "other": GpuArm(lambda s: call, "nt_xent")}
    monkeypatch.setitem(GPU_SUBJECTS, "nt_xent", arms)


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
    with pytest.raises(ValueError, match=f"begun with {name}"):
        Store(tmp_path / "stage.json", {**ABOUT, name: "other"}, dry=True, force=False, limit_s=1)


def test_a_dry_run_is_not_taken_for_a_real_one(store):
    store().finish()
    with pytest.raises(ValueError, match="is of a dry run"):
        store(dry=False)


def test_no_case_starts_that_would_not_fit(store):
    stage = store(limit_s=10)
    stage.check_time()
    stage.add({"n": 1}, {}, seconds=9.0)
    with pytest.raises(OutOfTime):
        stage.check_time()


def test_out_of_memory_is_a_row(monkeypatch, store):
    _arm(monkeypatch, _raise(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 34 GiB")))
    result = gpu_loss.measure(CASE, store(), DEVICE)
    assert result["absent"]["other"] == "out of memory"
    assert OURS in result["times"]["forward+backward"]["milliseconds"]


def test_another_loss_is_not_timed(monkeypatch, store):
    _arm(monkeypatch, lambda z1, z2: 1.1 * (z1 - z2).square().mean())
    result = gpu_loss.measure(CASE, store(), DEVICE)
    assert "Disagreement: relative errors" in result["absent"]["other"]
    assert "other" not in result["times"]["forward"]["milliseconds"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("subject", GPU_SUBJECTS)
def test_the_gate_is_as_wide_as_the_products_are_coarse(subject, precision):
    gates = {
        name: gate(arm, Setting(0.1, precision, "cpu"))
        for name, arm in GPU_SUBJECTS[subject].items()
    }
    exact = {"fp32": 1e-5, "tf32": 1e-2, "bf16": 8.8e-2}[precision]
    assert gates[OURS] == gates[EAGER] == pytest.approx(exact)
    assert gates["inf_cl"] == pytest.approx(max(exact, 1e-2))
    assert max(gates.values()) < 0.1, "a loss that is a tenth off would pass"


def test_ours_failing_leaves_the_others_their_times(monkeypatch, store):
    arms = {OURS: GpuArm(lambda s: _raise(ValueError("no")), "nt_xent")}
    arms[EAGER] = GPU_SUBJECTS["nt_xent"][EAGER]
    monkeypatch.setitem(GPU_SUBJECTS, "nt_xent", arms)
    result = gpu_loss.measure(CASE, store(), DEVICE)
    assert result["absent"][OURS] == "ValueError: no"
    timed = result["times"]["forward"]
    assert set(timed["milliseconds"]) == {EAGER}
    assert timed["times_ours"] == {}


def test_an_arm_that_breaks_the_device_is_left_out_by_the_next_process(monkeypatch, store):
    _arm(monkeypatch, _raise(RuntimeError("CUDA error: an illegal memory access")))
    with pytest.raises(DeviceBroken):
        gpu_loss.measure(CASE, store(), DEVICE)
    after = store()
    result = gpu_loss.measure(CASE, after, DEVICE)
    assert "broke the device" in result["absent"]["other"]
    assert OURS in result["times"]["forward"]["milliseconds"]


def test_an_arm_that_cannot_be_captured_keeps_its_other_times(monkeypatch, store):
    _arm(monkeypatch, GPU_SUBJECTS["nt_xent"][EAGER].build(Setting(0.1, "fp32", "cpu")))
    case = CASE._replace(graph=True)
    error = "CUDA error: operation not permitted when stream is capturing"
    device = Device(dry=True)
    monkeypatch.setattr(device, "graphed", _raise(RuntimeError(error)))
    for _ in (OURS, "other"):
        with pytest.raises(DeviceBroken):
            gpu_loss.measure(case, store(), device)
    result = gpu_loss.measure(case, store(), device)
    assert set(result["times"]["forward"]["milliseconds"]) == {OURS, "other"}
    assert "broke the device" in result["absent"][f"other, {gpu_loss.GRAPH}"]


def test_a_test_file_that_is_cut_short_is_run_again(monkeypatch, store):
    cut = _raise(subprocess.TimeoutExpired("pytest", 1))
    monkeypatch.setattr(gpu_correctness.subprocess, "run", cut)
    for module in (gpu_correctness.gpu_check_losses, gpu_correctness.gpu_check_views):
        monkeypatch.setattr(module, "checks", lambda device: iter(()))
    late, times = store(), iter([60.0, 60.0, 20.0])
    monkeypatch.setattr(late, "left_s", lambda: next(times))
    with pytest.raises(OutOfTime):
        gpu_correctness.run(late, DEVICE)
    assert late.results["cases"] == []
    alone = store()
    gpu_correctness.run(alone, DEVICE)
    assert [case["outcome"] for case in alone.results["cases"]] == ["failed"]


def test_an_arm_that_fails_while_it_is_timed_costs_the_others_nothing():
    calls = {"good": 0, "bad": 0}

    def arm(name, fails_at):
        calls[name] += 1
        if calls[name] == fails_at:
            raise MemoryError(name)

    failed = {}
    samples = time_survivors(
        {"good": partial(arm, "good", 0), "bad": partial(arm, "bad", 5)},
        failed.setdefault,
        budget_s=0.0,
        sample_s=0.0,
    )
    assert len(samples["good"]) == 5
    assert set(samples) == {"good"}
    assert isinstance(failed["bad"], MemoryError)


@pytest.mark.parametrize(
    ("check", "outcome"),
    [
        (lambda: (0.5, 1.0), "passed"),
        (lambda: (2.0, 1.0), "failed"),
        (lambda: (float("nan"), 1.0), "failed"),
        (_raise(AssertionError("two runs differ")), "failed"),
        (_raise(ValueError("backend 'triton' cannot run here: no")), "absent"),
        (_raise(ValueError("z1 must have at least 2 rows")), "failed"),
    ],
)
def test_outcome_of_a_check(store, check, outcome):
    assert _outcome({"check": "it"}, check, store())["outcome"] == outcome


def test_poisoned_memory_is_nan():
    with poisoned(DEVICE):
        like = torch.ones(3)
        for x in (torch.empty(3), torch.empty_like(like), like.new_empty(3)):
            assert x.isnan().all()
        assert torch.empty(3, dtype=torch.int64).shape == (3,)
    assert torch.empty(3).shape == (3,)


def test_sizes_are_those_that_were_promised():
    full = gpu_loss.cases(dry=False)
    assert len(full) == len({case[:5] for case in full})
    of_bf16 = [case for case in full if case.precision == "bf16"]
    assert {case.n for case in of_bf16} == {2**power for power in range(8, 17)}
    assert {case.d for case in of_bf16} == {64, 128, 256, 512, 2048}
    assert {case.d for case in full if case.precision == "fp32"} >= {128, 512, 2048}
    assert {case.size for case in gpu_augment.cases(dry=False)} == {32, 96, 224}


def _spread(value):
    return {"median": value, "q1": value, "q3": value}


def _loss_case(n, d, eager, fraction, launches=4):
    ratios = {"eager": _spread(eager), "compiled eager": _spread(eager / 3)}
    timed = {
        "milliseconds": {OURS: _spread(1.0)},
        "times_ours": ratios,
        "of_gemm": _spread(fraction),
    }
    return {
        "case": Case("nt_xent", n, d, graph=n <= 512)._asdict(),
        "times": {"forward+backward": timed, "CUDA graph": timed},
        "launches": {OURS: {"kernels": launches, "copies": 0}},
        "extra_mib": {OURS: n / 100},
    }


def test_targets_of_the_losses():
    cases = [
        _loss_case(256, 128, 2.0, 0.1),
        _loss_case(512, 128, 0.9, 0.1, launches=6),
        _loss_case(4096, 128, 10.0, 0.3),
        _loss_case(8192, 128, 9.5, 0.3),
        _loss_case(8192, 512, 4.0, 0.7),
        _loss_case(65536, 128, 12.0, 0.3),
    ]
    rows = {t.what: t for t in loss_targets({"cases": cases})}
    at_128 = rows["NT-Xent forward+backward, bf16, N ≥ 4096, D = 128, against eager"]
    assert at_128.met
    assert at_128.measured == "9.50× [9.50, 9.50] at N = 8192, D = 128"
    assert rows["NT-Xent forward+backward, bf16, N ≥ 4096, D = 512, against eager"].met is False
    assert rows["NT-Xent forward+backward, bf16, N ≥ 4096, D = 2048, against eager"].met is None
    (gemm,) = (t for what, t in rows.items() if "over that of GEMM" in what)
    assert gemm.met
    assert "N = 8192, D = 512" in gemm.measured
    launches = rows["Kernel launches, NT-Xent forward+backward, N ≤ 512"]
    assert (launches.measured, launches.met) == ("6", False)
    assert rows["NT-Xent forward+backward, bf16, N ≤ 512, against eager"].met is False
    assert rows["NT-Xent forward+backward, N ≤ 512, in a CUDA graph"].measured == "2 of 2 sizes"
    assert rows["MiB beyond the inputs, NT-Xent, N = 65,536, D = 128"].met


def test_targets_of_the_views_take_the_faster_kornia():
    case = {
        "case": gpu_augment.Case(256, 224, 256)._asdict(),
        "times_ours": {
            gpu_augment.KORNIA: _spread(40.0),
            gpu_augment.KORNIA_RESAMPLE: _spread(14.0),
        },
        "views_per_second": {gpu_augment.OURS: _spread(1.2e6)},
    }
    rows = {t.what: t for t in augment_targets({"cases": [case]})}
    assert rows["256 → 224, 256 images, against Kornia"].met is False
    assert rows["256 → 224, 256 images: views/s"].met
    assert rows["32 → 32, 256 images, against Kornia"].met is None
    assert json.dumps(rows["32 → 32, 256 images, against Kornia"].measured) == '"not measured"'


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_the_instruments():
    device = Device(dry=False)
    x = torch.randn(1024, 1024, device="cuda")
    assert device.launches(lambda: x.exp().sin()) == {"kernels": 2, "copies": 0}
    assert device.extra_mib(lambda: x + 1) == pytest.approx(4, abs=0.1)
    assert device.extra_mib(lambda: x.add_(1)) == pytest.approx(0, abs=0.1)
    replay, result = device.graphed(lambda: x * 2)
    x.fill_(3)
    replay()
    assert result.eq(6).all()
    product, flops = device.rate_calls("fp32")["GEMM"]
    once, several = device.seconds(product, 1), device.seconds(product, 5)
    assert once == pytest.approx(several, rel=0.5)
    assert 1e11 < flops / several < 1e15
