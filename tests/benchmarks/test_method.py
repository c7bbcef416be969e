"""The method itself: the gate refuses, rounds interleave, the peak is seen, the report says no."""

import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks import accuracy, machine, memory
from benchmarks.interleaved import spread, time_interleaved
from benchmarks.loss_arms import OURS, SUBJECTS, eager_clip, eager_nt_xent, embeddings
from benchmarks.parity import Disagreement, check, oracle
from benchmarks.report import markdown
from benchmarks.timings import Case, measure

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
    check(lambda a, b: eager_nt_xent(a, b, TEMPERATURE), z1, z2, expected, TEMPERATURE)
    with pytest.raises(Disagreement):
        check(wrong, z1, z2, expected, TEMPERATURE)


@pytest.mark.parametrize(
    ("subject", "eager"),
    [
        ("nt_xent", eager_nt_xent),
        ("clip", eager_clip),
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


def test_a_disagreeing_peer_is_refused_and_ours_ends_the_run(monkeypatch):
    case = Case("nt_xent", "forward+backward", 20, 8, TEMPERATURE, 0.0)
    arms = {name: SUBJECTS["nt_xent"][name] for name in (OURS, "eager")}
    wrong = arms["eager"]._replace(build=lambda temperature: _twice)
    monkeypatch.setitem(SUBJECTS, "nt_xent", {**arms, "eager": wrong})
    result = measure(case)
    assert "Disagreement: relative error of the loss" in result["refused"]["eager"]
    assert "eager" not in result["milliseconds"]
    monkeypatch.setitem(SUBJECTS, "nt_xent", {**arms, OURS: wrong})
    with pytest.raises(Disagreement):
        measure(case)


def test_every_round_holds_one_sample_of_each_arm():
    order = []
    arms = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = time_interleaved(arms, budget_s=0.0, sample_s=0.0, min_rounds=6)
    assert {name: len(values) for name, values in samples.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = [order[start : start + 3] for start in range(len(order) - 18, len(order), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1


def test_spread():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_of_eager_holds_its_logits():
    n = 1024
    ours, eager = memory.measure((OURS, "eager"), (n,))
    logits_mib = (2 * n) ** 2 * 4 / 2**20
    assert eager["extra_mib"] > 2 * logits_mib
    assert 2 * n * 128 * 4 / 2**20 <= ours["extra_mib"] < 2 * logits_mib


def test_the_report_names_what_is_slower():
    timed = {
        "subject": "nt_xent",
        "direction": "forward+backward",
        "n": 4096,
        "d": 128,
        "temperature": 0.1,
        "rounds": 5,
        "milliseconds": {OURS: _flat(10.0), "eager": _flat(9.0), "lightly": _flat(90.0)},
        "times_ours": {"eager": _flat(0.9), "lightly": _flat(9.0)},
        "gflops_per_second": {},
        "fraction_of_gemm": {},
        "refused": {"pytorch-metric-learning": "memory"},
    }
    results = {
        "mode": "full",
        "machine": machine.describe(),
        "load_average_after": 1,
        "seconds": 60,
        "timings": {"default": [timed]},
        "memory": [{"arm": OURS, "n": n, "d": 128, "extra_mib": n / 80} for n in (4096, 8192)],
        "accuracy": accuracy.measure(n=16, d=8, seeds=2),
    }
    report = markdown(results)
    assert "| ≥ 8× | 9.00× [9.00, 9.00] | yes |" in report
    assert "against eager | ≥ 4× | 0.90× [0.90, 0.90] | **no** |" in report
    assert "≤ 96 MiB | 102 MiB | **no** |" in report
    assert "- slower than eager: NT-Xent" in report
    assert "slower than lightly" not in report
    assert "pytorch-metric-learning at N = 4096: memory" in report


def _flat(value):
    return {"median": value, "q1": value, "q3": value}
