"""The method itself: the gate refuses, rounds interleave, the peak is seen, the report says no."""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import plan
from benchmarks.harness.device import Device
from benchmarks.harness.measure import spread, time_interleaved
from benchmarks.harness.processes import fresh, world
from benchmarks.losses.arms import (
    ARMS,
    EAGER,
    OURS,
    PRECISIONS,
    SUBJECTS,
    Setting,
    arms_of,
    eager_clip,
    eager_info_nce,
    eager_nt_xent,
    eager_siglip,
    embeddings,
    gate,
)
from benchmarks.losses.bench import Case, _memory, cases
from benchmarks.losses.oracle import Disagreement, check, oracle, relative_errors

TEMPERATURE = 0.1


def _self_as_negative(z1, z2):
    u = F.normalize(torch.cat([z1, z2]), dim=1)
    return F.cross_entropy(u @ u.T / TEMPERATURE, torch.arange(len(u)).roll(len(z1)))


def _twice(z1, z2):
    return 2 * eager_nt_xent(z1, z2, TEMPERATURE)


def _one_sided_gradient(z1, z2):
    return eager_nt_xent(z1, z2.detach(), TEMPERATURE) + 0 * z2.sum()


def _gradient_a_little_off(z1, z2):
    loss = eager_nt_xent(z1, z2, TEMPERATURE)
    return loss + 1e-4 * (loss - loss.detach())


def _not_a_number(z1, z2):
    return eager_nt_xent(z1, z2, TEMPERATURE) * torch.nan


@pytest.mark.parametrize(
    "wrong",
    [_self_as_negative, _twice, _one_sided_gradient, _gradient_a_little_off, _not_a_number],
)
def test_the_gate_refuses_a_wrong_loss(wrong):
    z1, z2 = embeddings(37, 19)
    expected = oracle("nt_xent", z1, z2, TEMPERATURE)
    budget = gate(ARMS[OURS], Setting("nt_xent", TEMPERATURE, "fp32", Device("cpu")))
    right = partial(eager_nt_xent, temperature=TEMPERATURE)
    check(relative_errors(right, z1, z2, expected), budget)
    with pytest.raises(Disagreement):
        check(relative_errors(wrong, z1, z2, expected), budget)


@pytest.mark.parametrize(
    ("subject", "eager"),
    [
        ("nt_xent", eager_nt_xent),
        ("clip", eager_clip),
        ("info_nce", eager_info_nce),
        ("siglip", eager_siglip),
        ("nt_xent_with_self", lambda z1, z2, _: _self_as_negative(z1, z2)),
    ],
)
@pytest.mark.parametrize("n", [2, 300])
def test_the_oracle_is_the_formula_in_float64(subject, eager, n):
    z1, z2 = (z.detach().double().requires_grad_() for z in embeddings(n, 33, noise=1.5))
    loss = eager(z1, z2, TEMPERATURE)
    expected = oracle(subject, z1, z2, TEMPERATURE)
    torch.testing.assert_close(expected.loss, loss.detach(), rtol=1e-12, atol=1e-14)
    grad = torch.stack(torch.autograd.grad(loss, (z1, z2)))
    torch.testing.assert_close(expected.grad, grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_gate_is_as_wide_as_the_products_are_coarse(subject, precision):
    setting = Setting(subject, TEMPERATURE, precision, Device("cpu"))
    gates = {name: gate(arm, setting) for name, arm in arms_of(subject, "cuda").items()}
    exact = {"fp32": 1e-5, "tf32": 1e-2, "bf16": 8.8e-2}[precision]
    assert gates[OURS] == gates[EAGER] == pytest.approx(exact)
    if subject != "siglip":
        assert gates["inf_cl"] == pytest.approx(max(exact, 1e-2))
    assert max(gates.values()) < 0.1, "a loss that is a tenth off would pass"


def test_every_round_holds_one_sample_of_each_arm():
    order = []
    arms = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = time_interleaved(arms, budget_s=0.0, sample_s=0.0, min_rounds=6)
    assert {name: len(values) for name, values in samples.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = [order[start : start + 3] for start in range(len(order) - 18, len(order), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1


def test_spread():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}


def test_an_arm_that_fails_while_it_is_timed_costs_the_others_nothing():
    calls = {"good": 0, "bad": 0}

    def arm(name, fails_at):
        calls[name] += 1
        if calls[name] == fails_at:
            raise MemoryError(name)

    arms = {"good": partial(arm, "good", 0), "bad": partial(arm, "bad", 5)}
    failed = {}
    samples = time_interleaved(arms, budget_s=0.0, sample_s=0.0, failed=failed.setdefault)
    assert len(samples["good"]) == 5
    assert set(samples) == {"good"}
    assert isinstance(failed["bad"], MemoryError)
    calls["bad"] = 0
    with pytest.raises(MemoryError):
        time_interleaved(arms, budget_s=0.0, sample_s=0.0)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.slow
def test_the_peak_of_eager_holds_its_logits():
    case = Case("nt_xent", 1024, 128, "fp32")
    ours, eager = (fresh(_memory, case, name)["extra_mib"] for name in (OURS, EAGER))
    logits_mib = (2 * case.n) ** 2 * 4 / 2**20
    assert eager > 2 * logits_mib
    assert 2 * case.n * case.d * 4 / 2**20 <= ours < 2 * logits_mib


def rank_and_sum(rank, value):
    total = torch.tensor(float(value + rank))
    torch.distributed.all_reduce(total)
    return rank, total.item()


@pytest.mark.distributed
def test_a_world_answers_by_rank():
    assert world(rank_and_sum, 2, 10) == [(0, 21.0), (1, 21.0)]


def test_sizes_are_those_that_were_promised():
    full = [case for case in cases("cuda", quick=False) if isinstance(case, Case)]
    assert len(full) == len({case[:5] for case in full})
    of_bf16 = [case for case in full if case.precision == "bf16"]
    assert {case.n for case in of_bf16} == {2**power for power in range(8, 17)}
    assert {case.d for case in of_bf16} == {64, 128, 256, 512, 768, 2048}
    assert {case.d for case in full if case.precision == "fp32"} >= {128, 512, 2048}
    on_cpu = [case for case in cases("cpu", quick=False) if isinstance(case, Case)]
    assert {case.precision for case in on_cpu} == {"fp32"}
    assert {case.n for case in on_cpu if case.memory} == {1024, 2048, 4096, 8192}
    assert {case.n for case in on_cpu if case.allocator == "tuned"} == {2**p for p in range(7, 13)}


@pytest.mark.parametrize(
    ("subject", "kind"),
    [("losses", "cpu"), ("losses", "cuda"), ("views", "cpu"), ("views", "cuda"), ("steps", "cpu")],
)
def test_a_case_is_measured_once(subject, kind):
    from importlib import import_module

    found = import_module(f"benchmarks.{subject}").cases(kind, quick=False)
    assert len(found) == len(set(found)) > 5


def test_a_list_is_a_case_each_unless_its_field_is_one():
    found = plan.read(Case, "losses", "cpu", quick=False)
    assert {case.directions for case in found} == {("forward+backward",), ("forward",)}
    assert [case.n for case in found[:3]] == [128, 256, 512]
