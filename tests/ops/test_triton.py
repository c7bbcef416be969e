"""Backend ``triton`` against float64: every kernel, and every way through the host's part.

The tests run on CUDA where there is a device. Elsewhere Triton's interpreter runs the same kernels
on CPU tensors, in a process of its own: it must be chosen before the first import of triton. That
process also runs what every backend must pass, test_lse.py.
"""

import contextlib
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from budgets import VALUE, assert_within
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_kit import _gpu, reference
from contrastive_kit.functional import info_nce, nt_xent, siglip
from contrastive_kit.ops import (
    BACKENDS,
    Exclusion,
    Pairs,
    Problem,
    kept_logsumexp,
    pair_loss_for,
    which_backend,
)
from contrastive_kit.ops.registered import registered
from contrastive_kit.ops.triton import configs, device, host, pair, softplus

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HERE = Path(__file__).parent

# The largest |logit| for which no maximum is subtracted is 69.
WITHOUT_SHIFT, WITH_SHIFT = 0.1, 0.01


def on_device(test):
    return test if INTERPRETED else pytest.mark.gpu(test)


def not_interpreted(test):
    return pytest.mark.skipif(INTERPRETED, reason="no kernel runs here")(test)


def budget(operands, temperature):
    """Relative error of a gradient."""
    least, slope = {
        "float32": (2e-6, 2e-7),
        "tf32": (2e-3, 1e-4),
        "bfloat16": (4e-3, 2e-4),
        "float16": (1e-3, 5e-5),
    }[operands]
    return max(least, slope / temperature)


@not_interpreted
def test_in_the_interpreter():
    """All tests of kernels in this file, and those of every backend, on the CPU."""
    files = [__file__, str(HERE / "test_lse.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", *files],
        check=False, capture_output=True, text=True, cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 100, done.stdout


def unit_rows(n, d, temperature):
    return F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1) / temperature**0.5


def oracle(q, k, exclusion, both, grad):
    """Logsumexp and gradients from the definition."""
    q = q.clone().requires_grad_()
    columns = q if k is None else k.clone().requires_grad_()
    mask = exclusion.mask(len(q), len(columns), q.device)
    logits = (q @ columns.T).masked_fill(mask, -torch.inf)
    lse = logits.logsumexp(1)
    if both:
        lse = torch.cat([lse, logits.logsumexp(0)])
    inputs = [q] if k is None else [q, columns]
    return lse, torch.autograd.grad((lse * grad).sum(), inputs)


def to_device(x):
    return None if x is None else x.to(DEVICE)


def run(q, k, exclusion, both, bound, grad, operands):
    """Logsumexp and gradients by the kernels, on the CPU."""
    q, k = to_device(q.float()), None if k is None else to_device(k.float())
    exclusion = Exclusion(exclusion.period, *map(to_device, exclusion[1:]))
    problem = Problem(q, k, exclusion, both, bound, mma_dtype=operands)
    lse, gradients = differentiated(problem, to_device(grad.float()))
    return lse.cpu(), [x.cpu() for x in gradients]


def differentiated(problem, grad):
    """Logsumexp and gradients of both matrices by the two ops."""
    lse, lse_lo, _, no_tiles = registered("triton_logsumexp")(*problem.flat(), True)
    backward = registered("triton_logsumexp_backward")
    dq, dk = backward(grad, lse, lse_lo, no_tiles, *problem.flat(), True, problem.k is not None)
    return lse, [dq] if problem.k is None else [dq, dk]


def check(rows, columns, d, temperature, operands, exclusion, both=False):
    q = unit_rows(rows, d, temperature).float().double()
    k = None if columns is None else unit_rows(columns, d, temperature).float().double()
    grad = torch.rand(rows + (columns if both else 0), dtype=torch.float64) / rows
    expected_lse, expected = oracle(q, k, exclusion, both, grad)
    lse, grads = run(q, k, exclusion, both, 1.001 / temperature, grad, operands)
    exact = operands == "float32"
    assert_within(lse, expected_lse, 1e-6 if exact else budget(operands, temperature))
    for actual, wanted in zip(grads, expected, strict=True):
        assert_within(actual, wanted, budget(operands, temperature))


SELF = [
    ("float32", 126, 63, 7),
    ("float32", 300, 100, 100),
    ("float32", 258, 129, 384),
    ("tf32", 260, 130, 60),
    ("tf32", 130, 65, 130),
    ("bfloat16", 300, 150, 100),
    ("bfloat16", 260, 130, 200),
    ("float16", 130, 65, 128),
    ("float16", 190, 95, 513),
]


@on_device
@pytest.mark.parametrize("temperature", [WITHOUT_SHIFT, WITH_SHIFT])
@pytest.mark.parametrize(("operands", "rows", "period", "d"), SELF)
@pytest.mark.usefixtures("poisoned_empty")
def test_self_similarity_triton(operands, rows, period, d, temperature):
    check(rows, None, d, temperature, operands, Exclusion(period))


TWO = [
    ("float32", 65, 200, 33, 65, True),
    ("float32", 200, 65, 300, 0, True),
    ("tf32", 70, 300, 60, 0, False),
    ("bfloat16", 150, 270, 100, 150, True),
    ("bfloat16", 100, 300, 100, 0, False),
    ("bfloat16", 129, 129, 384, 129, True),
    ("float16", 270, 150, 250, 270, True),
]


@on_device
@pytest.mark.parametrize("temperature", [WITHOUT_SHIFT, WITH_SHIFT])
@pytest.mark.parametrize(("operands", "rows", "columns", "d", "period", "both"), TWO)
@pytest.mark.usefixtures("poisoned_empty")
def test_two_matrices_triton(operands, rows, columns, d, period, both, temperature):
    check(rows, columns, d, temperature, operands, Exclusion(period), both)


@on_device
@pytest.mark.parametrize("temperature", [WITHOUT_SHIFT, WITH_SHIFT])
@pytest.mark.parametrize(("dtype", "d"), [(torch.int64, 96), (torch.int64, 300), (torch.uint8, 96)])
@pytest.mark.usefixtures("poisoned_empty")
def test_equal_ids_triton(dtype, d, temperature):
    ids = torch.randint(0, 40, (200,)).to(dtype)
    check(200, None, d, temperature, "bfloat16", Exclusion(100, ids))
    if dtype == torch.int64:
        large = ids + 2**40
        check(200, 130, d, temperature, "float16", Exclusion(0, large, large[:130]), True)


def limits_between(logits):
    """For each row a limit that leaves some logits out, far from all that rounding could move."""
    ordered = logits.sort(1).values
    middle = slice(ordered.shape[1] // 4, ordered.shape[1] * 3 // 4)
    gap, place = ordered.diff(dim=1)[:, middle].max(1)
    rows = torch.arange(len(ordered))
    return ordered[rows, place + middle.start] + gap / 2


LIMITED = [
    ("float32", 150, None, 33, 75, False),
    ("tf32", 130, None, 130, 65, False),
    ("float16", 140, None, 300, 0, False),
    ("float32", 65, 140, 33, 65, True),
    ("float16", 140, 65, 60, 0, True),
    ("float16", 70, 140, 520, 70, True),
    ("bfloat16", 70, 140, 60, 0, False),
]


@on_device
@pytest.mark.parametrize(("operands", "rows", "columns", "d", "period", "both"), LIMITED)
@pytest.mark.usefixtures("poisoned_empty")
def test_limits_triton(operands, rows, columns, d, period, both):
    q = unit_rows(rows, d, WITHOUT_SHIFT).float().double()
    k = None if columns is None else unit_rows(columns, d, WITHOUT_SHIFT).float().double()
    logits = q @ (q if k is None else k).T
    limits = limits_between(logits)
    if both:
        limits = torch.cat([limits, limits_between(logits.T)])
    exact = Problem(q, k, Exclusion(period), both, statistics=True, limits=limits)
    grad = torch.rand(len(limits), dtype=torch.float64) / rows
    inputs = [x.clone().requires_grad_() for x in (q, k) if x is not None]
    oracle = exact._replace(q=inputs[0], k=None if k is None else inputs[1])
    lse, figures = BACKENDS["reference"].logsumexp(oracle)
    expected = torch.autograd.grad((lse * grad).sum(), inputs)
    there = exact._replace(
        q=to_device(q.float()),
        k=None if k is None else to_device(k.float()),
        limits=to_device(limits.float()),
        mma_dtype=operands,
    )
    actual, grads = differentiated(there, to_device(grad.float()))
    within = budget(operands, WITHOUT_SHIFT)
    assert_within(actual.cpu(), lse, 1e-6 if operands == "float32" else within)
    for ours, theirs in zip(grads, expected, strict=True):
        assert_within(ours.cpu(), theirs, within)
    stats = registered("triton_logsumexp")(*there.flat(), True)[2].cpu()
    assert torch.equal(stats[3].double(), figures.kept)
    for ours, theirs in zip(stats[:3], figures[1:4], strict=True):
        assert_within(ours, theirs, 100 * within)


SOFTPLUS = [
    ("float32", 65, 140, 33, 65, True, -10.0),
    ("float32", 140, 65, 300, 0, False, 3.0),
    ("tf32", 70, 130, 60, 130, True, 3.0),
    ("bfloat16", 100, 130, 100, 0, True, -10.0),
    ("float16", 140, 70, 130, 70, True, 3.0),
    ("float16", 70, 140, 513, 140, False, -10.0),
]


@on_device
@pytest.mark.parametrize(
    ("operands", "rows", "columns", "d", "period", "weighted", "number"), SOFTPLUS
)
@pytest.mark.usefixtures("poisoned_empty")
def test_softplus_triton(operands, rows, columns, d, period, weighted, number, monkeypatch):
    """Value and gradients of the total and of the sums, over several strips."""
    monkeypatch.setattr(softplus, "STRIP_ROWS", 1)
    q, k = (unit_rows(n, d, WITHOUT_SHIFT).float().double() for n in (rows, columns))
    exact = [x.requires_grad_() for x in (q, k, torch.tensor(number, dtype=torch.float64))]
    weights = torch.rand(rows, dtype=torch.float64) * 1e-30 if weighted else None
    rule = Exclusion(period)
    sums = reference.kept_softplus_sum(*exact, rule.mask(rows, columns, q.device))
    expected = (sums if weights is None else sums * weights).sum()
    wanted = torch.autograd.grad(expected, exact)
    inputs = [to_device(x.detach().float()).requires_grad_() for x in exact]
    problem = Problem(*inputs[:2], rule, bound=10.01, mma_dtype=operands)
    there = None if weights is None else to_device(weights.float())
    total = BACKENDS["triton"].softplus_total(problem, inputs[2], there)
    each = BACKENDS["triton"].softplus_sum(problem, inputs[2])
    within = budget(operands, WITHOUT_SHIFT)
    assert_within(total.cpu(), expected, 2e-6 if operands == "float32" else within)
    assert_within(each.cpu(), sums, 2e-6 if operands == "float32" else within)
    ones = torch.ones(rows) if there is None else there.cpu()
    for results in (
        torch.autograd.grad(total, inputs),
        torch.autograd.grad(each, inputs, to_device(ones)),
    ):
        for ours, theirs in zip(results, wanted, strict=True):
            assert_within(ours.cpu(), theirs, within)


@on_device
@pytest.mark.usefixtures("poisoned_empty")
def test_softplus_of_any_logit_keeps_its_digits_triton():
    """Far below 0 it is an exponential, far above it the logit; NaN and inf stay what they are."""
    logits = torch.tensor([-80.0, -17.0, -10.0, -1.0, -1e-3, 0.0, 1e-3, 2.0, 40.0, 1e4])
    q, k = logits[:, None], torch.ones(1, 1)
    zero = to_device(torch.zeros(()))
    sums = BACKENDS["triton"].softplus_sum(Problem(to_device(q), to_device(k)), zero)
    torch.testing.assert_close(
        sums.cpu().double(), F.softplus(logits.double(), threshold=50), rtol=3e-7, atol=0
    )
    for bad in (math.nan, math.inf):
        sums = BACKENDS["triton"].softplus_sum(Problem(to_device(q * bad), to_device(k)), zero)
        assert not sums[7].isfinite()


@on_device
def test_siglip_is_that_of_the_tiles_triton():
    a, b = pairs("related", 70, 40)
    for dtype, within in ((torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 8e-3)):
        x, y = (z.to(dtype).requires_grad_() for z in (a, b))
        exact = [z.detach().double().requires_grad_() for z in (x, y)]
        for options in ({}, {"reduction": "sum", "sample_weight": torch.rand(70)}):
            ids = torch.arange(70) // 2
            expected = siglip(*exact, ids=ids, backend="reference", **options)
            on_there = {n: to_device(v) if torch.is_tensor(v) else v for n, v in options.items()}
            there = [to_device(z.detach()).requires_grad_() for z in (x, y)]
            loss = siglip(*there, ids=to_device(ids), backend="triton", **on_there)
            assert_within(loss.cpu(), expected, within)
            wanted = torch.autograd.grad(expected, exact)
            for ours, theirs in zip(torch.autograd.grad(loss, there), wanted, strict=True):
                assert_within(ours.cpu(), theirs, 4 * within)


@on_device
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck_of_softplus_triton(weighted):
    q, k = to_device(torch.randn(40, 6)), to_device(torch.randn(23, 6))
    bias, weights = to_device(torch.tensor(-2.0)), to_device(torch.rand(40)) if weighted else None
    flat = Problem(q, k, Exclusion(30), mma_dtype="float16" if weighted else "float32").flat()
    op = registered("triton_softplus_total")
    for needs in ((False, False, False), (True, True, False), (True, True, True)):
        torch.library.opcheck(op, (bias, weights, *flat, *needs))
    torch.library.opcheck(registered("triton_softplus_sum"), (bias, *flat))
    backward = registered("triton_softplus_sum_backward")
    torch.library.opcheck(backward, (to_device(torch.rand(40)), bias, *flat, True, True))


@on_device
@pytest.mark.parametrize(("temperature", "d"), [(WITHOUT_SHIFT, 60), (WITH_SHIFT, 300)])
@pytest.mark.usefixtures("poisoned_empty")
def test_many_panels_chunks_and_strips_triton(temperature, d, monkeypatch):
    """What large batches are divided into, at a size the interpreter can bear."""
    monkeypatch.setattr(host, "SUM_BYTES", 2000)
    monkeypatch.setattr(host, "STRIP_ROWS", 1)
    monkeypatch.setattr(device, "processors", lambda where: 4)
    check(400, None, d, temperature, "bfloat16", Exclusion(200))
    check(140, 300, d, temperature, "bfloat16", Exclusion(140), True)


@on_device
@pytest.mark.parametrize("architecture", ["sm_80", "hip"])
def test_tiles_of_every_architecture_triton(architecture, monkeypatch):
    if not INTERPRETED and architecture != device.architecture_of(torch.device(DEVICE)):
        pytest.skip("the tiles of another architecture")
    monkeypatch.setattr(device, "architecture_of", lambda where: architecture)
    for operands, d in (("float16", 100), ("float16", 200), ("float16", 300), ("tf32", 100)):
        check(200, None, d, WITHOUT_SHIFT, operands, Exclusion(100))


@on_device
@pytest.mark.parametrize("operands", ["bfloat16", "float16"])
@pytest.mark.parametrize("two_matrices", [False, True])
@pytest.mark.usefixtures("poisoned_empty")
def test_statistics_in_half_precision_triton(two_matrices, operands, monkeypatch):
    monkeypatch.setattr(host, "SUM_BYTES", 2000)
    q = unit_rows(300, 70, 0.05)
    k = unit_rows(170, 70, 0.05) if two_matrices else None
    rule = Exclusion(150)
    exact = kept_logsumexp(
        q, k, exclusion=rule, both=two_matrices, statistics=True, backend="reference"
    )[1]
    columns = None if k is None else to_device(k.float())
    rounded = getattr(torch, operands)
    actual = kept_logsumexp(
        to_device(q.float()), columns, exclusion=rule, both=two_matrices, statistics=True,
        mma_dtype=rounded, backend="triton",
    )[1]  # fmt: skip
    assert torch.equal(actual.kept.cpu().double(), exact.kept)
    for name in ("maximum", "expected", "total"):
        assert_within(getattr(actual, name).cpu(), getattr(exact, name), 2e-2)


@on_device
@pytest.mark.parametrize("operands", ["float32", "float16"])
def test_gradients_of_any_size_triton(operands):
    """Neither a loss scaled for half precision nor a tiny weight leaves the range of a weight."""
    q = unit_rows(150, 60, 0.1)
    rule, bound, grad = Exclusion(75), 10.01, torch.rand(150, dtype=torch.float64)
    _, (expected,) = run(q, None, rule, False, bound, grad, operands)
    for power in (-100, 40):
        _, (actual,) = run(q, None, rule, False, bound, grad * 2.0**power, operands)
        torch.testing.assert_close(actual, expected * 2.0**power, rtol=1e-6, atol=0)
    _, (zero,) = run(q, None, rule, False, bound, grad * 0, operands)
    assert not zero.any()


@on_device
def test_logits_without_bound_triton():
    """Rows of any length, no bound known: logits of thousands, and rows of zeros among them."""
    q = torch.randn(130, 40, dtype=torch.float64) * torch.linspace(0, 12, 130)[:, None]
    grad = torch.rand(130, dtype=torch.float64)
    expected, (expected_grad,) = oracle(q, None, Exclusion(65), False, grad)
    assert expected.abs().max() > 1000
    lse, (dq,) = run(q, None, Exclusion(65), False, torch.inf, grad, "float32")
    assert_within(lse, expected, VALUE[torch.float32])
    assert_within(dq, expected_grad, 1e-4)


@on_device
def test_same_bits_every_run_and_any_stride_triton():
    base = torch.randn(70, 2 * 300)
    q = to_device(base).T[::2]
    grad = to_device(torch.rand(())).expand(300)
    runs = []
    for rows in (q, q.contiguous(), q.contiguous()):
        problem = Problem(rows, None, Exclusion(150), mma_dtype="bfloat16")
        lse, (dq,) = differentiated(problem, grad)
        runs.append((lse, dq))
    for lse, dq in runs[1:]:
        assert torch.equal(lse, runs[0][0])
        assert torch.equal(dq, runs[0][1])


def pairs(kind, n, d):
    first, second = torch.randn(2, n, d)
    return first, first + {"related": 1.0, "close": 0.1}[kind] * second


def exact_nt_xent(views, temperature):
    """log(1 + Σ exp(s_in - s_ip)) in float64, exact for tiny losses."""
    z = F.normalize(torch.cat([v.double() for v in views]), dim=1)
    m = len(z)
    logits = z @ z.T / temperature
    positive = logits[torch.arange(m), torch.arange(m).roll(m // 2)]
    same = (torch.arange(m)[:, None] - torch.arange(m)[None, :]) % (m // 2) == 0
    return (logits - positive[:, None]).masked_fill(same, -torch.inf).exp().sum(1).log1p().mean()


@on_device
@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_the_loss_stay_within_their_budget_triton(reduction, dtype, temperature):
    """A mean of half precision is one op, see ``ops/triton/pair.py``; the rest is many."""
    views = [v.to(dtype) for v in pairs("related", 126, 60)]
    wanting = [v.double().requires_grad_() for v in views]
    exact_loss = exact_nt_xent(wanting, temperature) * (1 if reduction == "mean" else 252)
    exact = torch.autograd.grad(exact_loss, wanting)
    leaves = [v.to(DEVICE).requires_grad_() for v in views]
    loss = nt_xent(*leaves, temperature=temperature, reduction=reduction, backend="triton")
    assert loss.dtype == torch.float32
    operands = "float32" if dtype == torch.float32 else "bfloat16"
    within = budget(operands, temperature)
    assert float(loss.detach()) == pytest.approx(float(exact_loss.detach()), rel=within)
    # As a gradient scaler does: float16 does not hold the gradient of a tiny loss.
    scale = 2.0 ** -int(torch.stack(exact).abs().max().log2())
    for actual, expected in zip(torch.autograd.grad(loss * scale, leaves), exact, strict=True):
        assert actual.dtype == dtype
        assert_within(actual.cpu(), expected * scale, within)


@on_device
@pytest.mark.parametrize("d", [7, 31, 32])
@pytest.mark.parametrize("n", [2, 5])
def test_few_short_rows_stay_within_the_budget_triton(n, d):
    """Nothing averages out where there are few numbers, so that short rows are not rounded."""
    temperature = 0.02
    for seed in range(8):
        torch.manual_seed(seed)
        views = [v.bfloat16() for v in pairs("related", n, d)]
        wanting = [v.double().requires_grad_() for v in views]
        exact = torch.stack(torch.autograd.grad(exact_nt_xent(wanting, temperature), wanting))
        scale = 2.0 ** -int(exact.abs().max().log2())
        leaves = [v.to(DEVICE).requires_grad_() for v in views]
        loss = nt_xent(*leaves, temperature=temperature, backend="triton") * scale
        actual = torch.stack(torch.autograd.grad(loss, leaves))
        assert_within(actual.cpu(), exact * scale, budget("bfloat16", temperature))


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tiny_loss_triton(dtype):
    """Where a cross entropy in float32 is exactly 0."""
    views = [v.to(dtype) for v in pairs("close", 32, 60)]
    exact = float(exact_nt_xent(views, 0.02))
    assert 1e-16 < exact < 1e-10
    loss = nt_xent(*(v.to(DEVICE) for v in views), temperature=0.02, backend="triton")
    # Logits of negatives up to 50 are rounded to half precision; those of positives never are.
    within = 1e-3 if dtype == torch.float32 else 5e-3
    assert float(loss) == pytest.approx(exact, rel=within)


def with_stats(a, b, t, backend):
    loss, stats = nt_xent(a, b, temperature=t, return_stats=True, backend=backend)
    return loss + stats.entropy


LOSSES = {
    "mean": lambda a, b, t, name: nt_xent(a, b, temperature=0.2, backend=name) + t,
    "nt_xent": lambda a, b, t, name: nt_xent(a, b, temperature=t, backend=name),
    "three views": lambda a, b, t, name: nt_xent(a, b, a + b, temperature=t, backend=name),
    "ids": lambda a, b, t, name: nt_xent(
        a, b, temperature=t, ids=torch.arange(len(a), device=a.device) // 2, backend=name
    ),
    "stats": with_stats,
    "clip": lambda a, b, t, name: info_nce(a, b, temperature=t, symmetric=True, backend=name),
    "queue": lambda a, b, t, name: info_nce(a, b, b.detach() + 1, temperature=t, backend=name),
}


@on_device
@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_the_formula_triton(name):
    a, b = pairs("related", 77, 45)
    inputs = [x.double().requires_grad_() for x in (a, b, torch.tensor(0.2))]
    exact = LOSSES[name](*inputs, "reference")
    expected = torch.autograd.grad(exact, inputs)
    inputs = [x.detach().float().to(DEVICE).requires_grad_() for x in inputs]
    loss = LOSSES[name](*inputs, "triton")
    assert_within(loss.cpu(), exact, 1e-6)
    for actual, wanted in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        assert_within(actual.cpu(), wanted, budget("float32", 0.2))


NT_XENT_OPTIONS = {
    "more_views": None,  # given as views
    "ids": torch.arange(40) // 2,
    "sample_weight": (torch.arange(40) < 5).float(),
    "decoupled": True,
    "label_smoothing": 0.2,
    "hardness": 0.5,
    "positive_prior": 0.2,
    "margin": 0.2,
    "false_negative_margin": 0.1,
    "reduction": "sum",
    "return_stats": True,
}


@on_device
@pytest.mark.parametrize("name", NT_XENT_OPTIONS)
def test_every_option_counts_where_one_op_takes_the_views_triton(name):
    """None is lost on the way that is for the defaults alone."""
    a, b = (x.half() for x in pairs("related", 40, 45))
    if name == "false_negative_margin":
        b = b.roll(1, 0)  # or nothing is nearer than the positive
    assert pair.pair_loss(to_device(a), to_device(b), 0.2) is not None
    options = {} if name == "more_views" else {name: NT_XENT_OPTIONS[name]}
    views = [a, b, a + b] if name == "more_views" else [a, b]

    def results(backend, *views, **options):
        result = nt_xent(*views, temperature=0.2, backend=backend, **options)
        return (
            torch.stack([x.double().cpu() for x in (result[0], *result[1])])
            if isinstance(result, tuple)
            else result.double().cpu()[None]
        )

    expected = results("reference", *views, **options)
    on_there = {k: to_device(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    actual = results("triton", *map(to_device, views), **on_there)
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
    plain = results("reference", a, b)
    assert actual.shape != plain.shape or not torch.allclose(actual, plain, rtol=1e-2)


@not_interpreted
def test_no_option_of_nt_xent_is_missing_above():
    import inspect

    others = {"z1", "z2", "temperature", "gather_distributed", "process_group", "backend"}
    parameters = set(inspect.signature(nt_xent).parameters)
    assert parameters - others == set(NT_XENT_OPTIONS)


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@on_device
@pytest.mark.parametrize("temperature", [WITHOUT_SHIFT, WITH_SHIFT])
@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 7), (100, 128)])
@pytest.mark.usefixtures("tf32", "poisoned_empty")
def test_one_op_equals_many_triton(n, d, temperature, monkeypatch):
    monkeypatch.setattr(pair, "WIDTH", 32)
    monkeypatch.setattr(device, "processors", lambda where: 4)
    a, b = pairs("related", n, d)
    # Rows of any length and layout, one of them of zeros.
    a *= torch.logspace(-18, 18, n)[:, None]
    b = (b.T * torch.arange(n)).T
    wide = torch.zeros(d, 2 * n)
    wide[:, ::2] = a.T
    a, b = to_device(wide).T[::2].requires_grad_(), to_device(b).requires_grad_()
    exact = nt_xent(a.double().cpu(), b.double().cpu(), temperature=temperature)
    expected = torch.autograd.grad(exact, (a, b))
    loss = pair.pair_loss(a, b, temperature)
    within = budget("tf32", temperature)
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=within)
    for actual, wanted, x in zip(torch.autograd.grad(loss, (a, b)), expected, (a, b), strict=True):
        length = x.detach().norm(dim=1, keepdim=True).clamp(min=1e-30)
        if d > 1:  # a number has no direction to change
            assert_within((actual * length).cpu(), (wanted * length).cpu(), within)
    assert not torch.autograd.grad(pair.pair_loss(a, b, temperature), b)[0][0].any()


@on_device
@pytest.mark.parametrize("exponent", [-120, -124, -126, -128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.usefixtures("tf32", "poisoned_empty")
def test_the_gradient_of_a_loss_near_the_least_float32_triton(dtype, exponent):
    """What it is divided by to be in range has a reciprocal in range, and keeps it right."""
    a = torch.ones(2, 64, dtype=torch.float64)
    a[1] = -1
    a += 0.2 * torch.randn(2, 64, dtype=torch.float64)
    b = (a + 0.1 * torch.randn(2, 64, dtype=torch.float64)).to(dtype)
    a = a.to(dtype)
    cosines = F.normalize(a.double(), dim=1) @ F.normalize(b.double(), dim=1).T
    temperature = float((cosines[0, 0] - cosines[0, 1]) / (-exponent * math.log(2)))
    exact = [x.double().requires_grad_() for x in (a, b)]
    expected = torch.autograd.grad(1e36 * exact_nt_xent(exact, temperature), exact)
    leaves = [to_device(x).requires_grad_() for x in (a, b)]
    loss = pair.pair_loss(*leaves, temperature)
    for actual, wanted in zip(torch.autograd.grad(1e36 * loss, leaves), expected, strict=True):
        assert_within(actual.cpu(), wanted, 0.1)


@on_device
@pytest.mark.usefixtures("tf32")
def test_tf32_is_rounded_and_not_truncated_triton():
    """Tensor cores cut operands off, which makes every logit too small by half a thousandth."""
    q = unit_rows(70, 60, 0.002)
    problem = Problem(to_device(q.float()), None, Exclusion(35), mma_dtype="tf32")
    lse, (dq,) = differentiated(problem, to_device(torch.ones(70)))
    expected, (wanted,) = oracle(q, None, Exclusion(35), False, torch.ones(70).double())
    assert_within(lse.cpu(), expected, 2e-4)
    assert_within(dq.cpu(), wanted, 2e-2)
    temperature = 0.01
    views = pairs("related", 300, 128)
    wanting = [v.double().requires_grad_() for v in views]
    exact = exact_nt_xent(wanting, temperature)
    leaves = [to_device(v).requires_grad_() for v in views]
    loss = pair.pair_loss(*leaves, temperature)
    within = budget("tf32", temperature)
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=within)
    expected = torch.autograd.grad(exact, wanting)
    for actual, wanted in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert_within(actual.cpu(), wanted, within)


@on_device
@pytest.mark.usefixtures("tf32")
def test_every_nan_reaches_a_loss_in_tf32_triton():
    """Also that which rounding its bits would turn into 0."""
    a, b = map(to_device, pairs("related", 5, 33))
    a.view(torch.int32)[2, 3] = 0x7FFFFFFF
    assert pair.pair_loss(a, b, 0.5).isnan()
    problem = Problem(a, None, Exclusion(5), mma_dtype="tf32")
    assert registered("triton_logsumexp")(*problem.flat(), False)[0].isnan().all()


@on_device
def test_the_largest_rows_in_float16_triton():
    """No scale may take them out of float16. Large entries do not meet: all logits are exact."""
    q = torch.randn(20, 16, dtype=torch.float64).sign() / 32
    q[:16].fill_diagonal_(56000)
    grad = torch.rand(20, dtype=torch.float64)
    expected, (wanted,) = oracle(q, None, Exclusion(10), False, grad)
    lse, (dq,) = run(q, None, Exclusion(10), False, torch.inf, grad, "float16")
    assert_within(lse, expected, 1e-6)
    assert_within(dq, wanted, 1e-3)


@on_device
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_reaches_the_loss_of_one_op_triton(bad):
    a, b = (to_device(x).half() for x in pairs("related", 40, 33))
    a[17, 3] = bad
    assert pair.pair_loss(a, b, 0.5).isnan()


@on_device
@pytest.mark.usefixtures("tf32")
def test_what_one_op_does_not_take_triton():
    a = to_device(torch.randn(4, 60))
    b = a + 1
    asked = Pairs(a, b, 0.1)
    loss, statistics = pair_loss_for(asked, "auto")
    assert torch.equal(loss, pair.pair_loss(a, b, 0.1))
    assert statistics is None
    for more in (
        {"temperature": to_device(torch.tensor(0.1))},
        {"ids": to_device(torch.arange(4))},
        {"sample_weight": to_device(torch.ones(4))},
        {"between": True},
        {"between": True, "both": True},
        {"decoupled": True},
        {"reduction": "sum"},
        {"statistics": True},
    ):
        assert pair_loss_for(asked._replace(**more), "auto") is None, more
    assert pair.pair_loss(a, a, 0.1) is None
    assert pair.pair_loss(a, b.half(), 0.1) is None
    assert pair.pair_loss(*to_device(torch.randn(2, 4, 300)), 0.1) is None
    torch.set_float32_matmul_precision("highest")
    assert pair.pair_loss(a, b, 0.1) is None


@on_device
def test_opcheck_of_one_op_triton():
    a, b = (to_device(x).half() for x in pairs("related", 9, 40))
    forward, backward = (registered(f"triton_pair_loss{x}") for x in ("", "_backward"))
    torch.library.opcheck(forward, (a, b, 0.1, "float16"))
    _, *saved = forward(a, b, 0.1, "float16")
    grad = to_device(torch.tensor(2.0))
    torch.library.opcheck(backward, (grad, a, b, *saved, 0.1, "float16"))


@not_interpreted
def test_either_way_to_ask_for_tf32_is_followed():
    code = """
        import torch
        from contrastive_kit.ops.triton.host import multiplied_as
        assert multiplied_as("float32") == "float32"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert multiplied_as("float32") == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert multiplied_as("float32") == "float32"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@on_device
@pytest.mark.parametrize(
    ("name", "dtype", "precision"),
    [
        ("mean", torch.float32, "high"),
        ("clip", torch.bfloat16, "highest"),
    ],
)
def test_compiles_to_one_graph_triton(name, dtype, precision, request):
    if precision == "high":
        request.getfixturevalue("tf32")
    torch.compiler.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for n in (5, 33):
        a, b = (x.to(DEVICE, dtype).requires_grad_() for x in pairs("related", n, 40))
        temperature = torch.tensor(0.2, device=DEVICE)
        expected = LOSSES[name](a, b, temperature, "triton")
        actual = compiled(a, b, temperature, "triton")
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, (a, b)), torch.autograd.grad(expected, (a, b))
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@on_device
def test_functional_gradient_triton():
    a, b = (x.to(DEVICE) for x in pairs("related", 9, 5))
    wanting = a.clone().requires_grad_()
    expected = torch.autograd.grad(nt_xent(wanting, b, backend="triton"), wanting)[0]
    actual = torch.func.grad(lambda a, b: nt_xent(a, b, backend="triton"))(a, b)
    torch.testing.assert_close(actual, expected)


@on_device
@pytest.mark.parametrize(
    ("mma_dtype", "two_matrices", "statistics", "limited"),
    [
        ("bfloat16", False, False, False),
        ("float32", True, True, False),
        ("float32", False, True, True),
        ("float16", True, False, True),
    ],
)
def test_opcheck_triton(mma_dtype, two_matrices, statistics, limited):
    q = to_device(torch.randn(40, 6)).T.contiguous().T
    k = to_device(torch.randn(23, 6)) if two_matrices else None
    ids = to_device(torch.arange(40) // 2)
    rule = Exclusion(0, ids, ids[:23] if two_matrices else None)
    problem = Problem(q, k, rule, two_matrices, statistics=statistics, mma_dtype=mma_dtype)
    if limited:
        problem = problem._replace(limits=to_device(torch.randn(problem.n_results())))
    forward = registered("triton_logsumexp")
    backward = registered("triton_logsumexp_backward")
    torch.library.opcheck(forward, (*problem.flat(), True))
    lse, lse_lo, _, no_tiles = forward(*problem.flat(), True)
    assert no_tiles.numel() == 0
    saved = (torch.randn_like(lse), lse, lse_lo, no_tiles)
    for needs in ((True, False), (True, True)):
        torch.library.opcheck(backward, (*saved, *problem.flat(), *needs))


@on_device
def test_matmul_precision_decides_what_float32_is_multiplied_as_triton():
    """What the op is told, as a dispatch mode sees it."""

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "logsumexp" in func.name():
                asked.append(next(x for x in args if isinstance(x, str)))
            return func(*args, **(kwargs or {}))

    asked = []
    q = to_device(torch.randn(9, 5))
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            with Asked():
                kept_logsumexp(q, exclusion=Exclusion(3), backend="triton")
    finally:
        torch.set_float32_matmul_precision(before)
    with Asked():
        kept_logsumexp(q.bfloat16(), exclusion=Exclusion(3), backend="triton")
    assert asked == ["float32", "tf32", "tf32", "bfloat16"]


@on_device
def test_auto_takes_this_backend_triton():
    q = to_device(torch.randn(4, 3))
    assert which_backend(q) == ("triton", {})
    assert which_backend(q.double()).refusals == {
        "triton": "it computes in float32 at most, got float64"
    }


def specialization(parameter, value):
    """What Triton compiles an argument for."""
    if isinstance(value, torch.Tensor):
        address = value.storage_offset() * value.element_size()
        aligned = parameter.do_not_specialize_on_alignment or address % 16 == 0
        return value.dtype, aligned
    if isinstance(value, float) or parameter.do_not_specialize:
        return type(value)
    return 1 if value == 1 else value % 16 == 0


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def launches(monkeypatch, run, compiled=None, architecture="sm_90"):
    """Names of the kernels and torch operations that are run on fake tensors, and the grids.

    What the kernels would be compiled for is added to the set ``compiled``.
    """
    from contrastive_kit.ops.triton import backward_kernels, kernels, pair_kernels, softplus_kernels

    names, grids = [], []

    class Recorded:
        def __init__(self, kernel):
            self.recorded = getattr(kernel, "recorded", kernel)  # which may be recorded before

        def __getitem__(self, grid):
            names.append(self.recorded.__name__)
            grids.append(grid)
            return self.launch

        def launch(self, *args, **constants):
            if compiled is not None:
                params = self.recorded.params[: len(args)]
                special = (specialization(*pair) for pair in zip(params, args, strict=True))
                flat = tuple(sorted(constants.items()))
                compiled.add((self.recorded.__name__, *special, *flat))

    for module in (kernels, backward_kernels, pair_kernels, softplus_kernels):
        for name in [x for x in dir(module) if x.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorded(getattr(module, name)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(device, "processors", lambda where: 132)
    monkeypatch.setattr(device, "architecture_of", lambda where: architecture)
    with FakeTensorMode(), Operations() as operations:
        run()
    quiet = "empty new_empty empty_like slice select unbind view transpose t alias detach device"
    return names, grids, [x for x in operations.names if x not in quiet.split()]


def primitive(rows, columns, d):
    """A forward and a backward of the primitive on fake CUDA tensors."""
    q = torch.empty(rows, d, device="cuda")
    k = None if columns is None else torch.empty(columns, d, device="cuda")
    problem = Problem(q, k, Exclusion(rows), bound=10.0, mma_dtype="bfloat16")
    no_tiles = q.new_empty(0)
    lse, lse_lo, _ = host.forward(problem, no_tiles)
    dq, dk = host.backward(problem, lse, lse, lse_lo, no_tiles, (True, True))
    assert (dq.shape, dk.shape) == (q.shape, (0,) if k is None else k.shape)


@not_interpreted
@pytest.mark.indexes_fakes
def test_launches_do_not_depend_on_the_batch_and_nothing_waits(monkeypatch):
    """Fake CUDA tensors have no data: to read a value raises, to copy it to the host is listed."""
    for rows in (8, 512, 16384):
        kernels, _, operations = launches(monkeypatch, lambda rows=rows: primitive(rows, None, 128))
        assert len(kernels) <= 7
        assert operations == ["linalg_vector_norm"]  # with the kernels eight launches
    kernels, _, operations = launches(monkeypatch, lambda: primitive(1024, None, 512))
    assert len(kernels) <= 6  # one strip
    assert set(operations) <= {"linalg_vector_norm", "zero_", "addmm", "mul_"}


@not_interpreted
@pytest.mark.indexes_fakes
@pytest.mark.parametrize(("n", "strips"), [(512, 1), (5000, 3)])
def test_siglip_takes_three_products_triton(n, strips, monkeypatch):
    """6 · N² · D operations for value and gradients: a kernel a strip, and two products."""
    d, products = 256, []

    def step():
        q, k = (torch.empty(n, d, device="cuda") for _ in range(2))
        bias = torch.empty((), device="cuda")
        problem = Problem(q, k, Exclusion(n), bound=10.0, mma_dtype="float16")
        _, _, dq, dk = softplus.total(problem, bias, None, (True, True, True))
        assert dq.shape == dk.shape == (n, d)

    def add_product(total, a, b, packed):
        products.append(2 * a.shape[0] * a.shape[1] * b.shape[1])

    monkeypatch.setattr(softplus, "add_product", add_product)
    kernels, grids, _ = launches(monkeypatch, step)
    assert kernels == ["pack_kernel"] * 2 + ["softplus_kernel"] * strips
    assert sum(products) == 4 * n * n * d
    tile = configs.softplus(torch.float16)
    pairs = sum(down * across for down, across in grids[2:]) * tile.rows * tile.columns
    assert n * n <= pairs < 1.1 * n * n + 2 * tile.rows * n


@not_interpreted
@pytest.mark.indexes_fakes
def test_strips_stay_in_half_precision_where_no_library_adds_their_product(monkeypatch):
    """Twice the memory, and multiplied as float32 at an eighth of the rate."""
    step = lambda: primitive(1024, None, 512)  # noqa: E731
    kernels, _, operations = launches(monkeypatch, step, architecture="hip")
    assert kernels.count("add_product_kernel") == 2 * kernels.count("weights_kernel") - 1
    assert set(operations) <= {"linalg_vector_norm", "zero_", "mul_"}


def one_op(n):
    """A forward and a backward of the loss that is one op on fake CUDA tensors."""
    z1, z2 = (torch.empty(n, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    loss, *saved = pair._forward(z1, z2, 0.1, "float16")
    gradients = pair._backward(loss, z1, z2, *saved, 0.1, "float16")
    assert [x.shape for x in gradients] == [z1.shape, z2.shape]


@not_interpreted
@pytest.mark.indexes_fakes
def test_no_size_of_a_batch_compiles_a_kernel_anew(monkeypatch):
    """The last batch of an epoch is of any size, and must not wait for a compiler."""

    def clip(n, d):
        q, k = (torch.empty(n, d, device="cuda") for _ in range(2))
        problem = Problem(q, k, Exclusion(n), True, statistics=True, mma_dtype="float16")
        lse, lse_lo, _ = host.forward(problem, q.new_empty(0))
        host.backward(problem, lse, lse, lse_lo, q.new_empty(0), (True, True))

    steps = {
        "one op": one_op,
        "rows": lambda n: primitive(n, None, 128),
        "two matrices": lambda n: clip(n, 128),
        "strips": lambda n: clip(n, 512),
    }
    for name, step in steps.items():
        usual, odd = set(), set()
        launches(monkeypatch, lambda step=step: step(256), usual)
        for n in (255, 250, 129, 17):
            launches(monkeypatch, lambda step=step, n=n: step(n), odd)
        assert len(usual) >= 5
        assert odd <= usual, name


@not_interpreted
def test_a_whole_loss_is_five_launches(monkeypatch):
    kernels, _, operations = launches(monkeypatch, lambda: one_op(256))
    assert len(kernels) <= 5
    assert operations == []


@not_interpreted
def test_a_step_is_six_launches_of_which_one_is_autograds(monkeypatch):
    """As a profiler counts them: a loss gets a gradient of one, which a launch fills in."""
    # Autograd wants a context of CUDA even for fake tensors there.
    monkeypatch.setattr(device, "_INTERPRETED", True)

    def step():
        z1, z2 = (torch.empty(256, 128, dtype=torch.half, requires_grad=True) for _ in range(2))
        torch.autograd.grad(nt_xent(z1, z2, temperature=0.1, backend="triton"), (z1, z2))

    kernels, _, operations = launches(monkeypatch, step)
    assert len(kernels) <= 5
    assert [x for x in operations if "triton" not in x] == ["ones_like"]


@not_interpreted
def test_every_architecture_has_tiles_for_one_op():
    for arch in configs.ARCHITECTURES:
        for depth in (16, 128, 256):
            assert configs.backward(arch, torch.float16, "ieee", depth) is not None
        if arch != "hip":
            assert configs.backward(arch, torch.float32, "tf32", 128) is not None


@not_interpreted
def test_memory_stays_linear(monkeypatch):
    """65,536 pairs: what is allocated beyond inputs and gradients is far below their logits."""
    sizes = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "empty" in str(func):
                sizes.append(result.numel() * result.element_size())
            return result

    with Allocations():
        launches(monkeypatch, lambda: primitive(131072, None, 128))
    assert sum(sizes) < 2**30


@not_interpreted
@pytest.mark.indexes_fakes
def test_a_huge_batch_has_grids_that_a_gpu_takes(monkeypatch):
    for size in ((2**20, None, 128), (2**17, None, 512), (2**20, 2**20, 128)):
        _, grids, _ = launches(monkeypatch, lambda size=size: primitive(*size))
        assert all(0 < grid[0] < 2**31 for grid in grids)
        assert all(0 < grid[1] < 2**16 for grid in grids if len(grid) > 1)


@not_interpreted
def test_reasons_to_refuse(monkeypatch):
    def refuse(*matrices):
        return BACKENDS["triton"].refuse(Problem(*matrices))

    assert refuse(torch.ones(2, 2)) == "it needs tensors on a CUDA device, got cpu"
    with pytest.raises(ValueError, match="'triton' cannot run here: it needs tensors on a CUDA"):
        nt_xent(torch.ones(2, 2), torch.ones(2, 2), backend="triton")
    with FakeTensorMode():
        q = torch.empty(6, 3, device="cuda")
        assert refuse(q) is None
        assert refuse(q.double()) == "it computes in float32 at most, got float64"
        assert refuse(q, q.double()) == "it computes in float32 at most, got float64"
        assert which_backend(q).name == "triton"
        lse, stats = kept_logsumexp(q, q.narrow(0, 0, 2), both=True, statistics=True)
        assert lse.shape == stats.kept.shape == (8,)
        monkeypatch.setattr(_gpu, "_MISSING", _gpu.missing_package("no_such_module"))
        assert refuse(q) == "it needs the package triton, which is not installed"
        monkeypatch.setattr(_gpu.importlib.metadata, "version", lambda name: "3.1.0")
        monkeypatch.setattr(_gpu, "_MISSING", _gpu.missing_package("triton"))
        assert refuse(q) == "it needs triton 3.5 or later, version 3.1.0 is installed"
        assert which_backend(q).name == "tiled"


@not_interpreted
def test_an_old_device_is_refused(monkeypatch):
    class Turing:
        name, major, minor = "Tesla T4", 7, 5

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Turing)
    with FakeTensorMode():
        reason = BACKENDS["triton"].refuse(Problem(torch.empty(6, 3, device="cuda")))
    assert reason == "it needs compute capability 8.0 or higher, Tesla T4 has 7.5"


@not_interpreted
@pytest.mark.parametrize(("architecture", "taken"), [("gfx942:sramecc+", True), ("gfx1100", False)])
def test_a_device_of_amd_is_taken_if_its_kernels_were_compiled(architecture, taken, monkeypatch):
    class Amd:
        name, major, minor, gcnArchName = "Radeon", 9, 4, architecture

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Amd)
    with FakeTensorMode():
        choice = which_backend(torch.empty(6, 3, device="cuda"))
    assert choice.name == ("triton" if taken else "tiled")
    reason = "it needs one of gfx90a, gfx942, gfx950, Radeon is gfx1100"
    assert choice.refusals == ({} if taken else {"triton": reason})


class TestOnCuda:
    """What only a device can show."""

    pytestmark = pytest.mark.gpu

    def step(self, a, b, **options):
        leaves = [x.detach().requires_grad_() for x in (a, b)]
        loss = nt_xent(*leaves, temperature=0.1, backend="triton", **options)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def views(self, n, d, dtype=torch.bfloat16):
        return [x.to("cuda", dtype) for x in pairs("related", n, d)]

    @pytest.mark.parametrize("d", [128, 200, 512])
    def test_nothing_waits(self, d):
        views = self.views(300, d)
        self.step(*views)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.step(*views)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("d", [128, 512])
    def test_graph_capture(self, d):
        views = self.views(300, d)
        expected = self.step(*views)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(*views)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self.step(*views)
        graph.replay()
        for actual, wanted in zip(captured, expected, strict=True):
            assert torch.equal(actual, wanted)

    def test_several_streams(self):
        batches = [self.views(700, 128) for _ in range(4)]
        expected = [self.step(*views) for views in batches]
        streams = [torch.cuda.Stream() for _ in batches]
        torch.cuda.synchronize()
        results = []
        for stream, views in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                results.append(self.step(*views))
        torch.cuda.synchronize()
        for actual, wanted in zip(results, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))

    def test_deterministic_algorithms(self, monkeypatch):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        try:
            self.step(*self.views(300, 128))
        finally:
            torch.use_deterministic_algorithms(False)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
    def test_the_device_of_the_tensors_is_used(self):
        views = [x.to("cuda:1") for x in self.views(65, 60)]
        expected = self.step(*(x.to("cuda:0") for x in views))
        for actual, wanted in zip(self.step(*views), expected, strict=True):
            assert actual.device.index == 1
            assert torch.equal(actual.cpu(), wanted.cpu())

    def test_autocast_changes_nothing(self):
        views = self.views(65, 60, torch.float32)
        expected = self.step(*views)
        with torch.autocast("cuda", torch.bfloat16):
            for actual, wanted in zip(self.step(*views), expected, strict=True):
                assert torch.equal(actual, wanted)

    def test_a_large_batch(self):
        """65,536 pairs in less than a GiB beyond inputs and gradients."""
        views = self.views(65536, 128)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss, *grads = self.step(*views)
        assert torch.cuda.max_memory_allocated() - before < 2**30
        part = nt_xent(*(x.float() for x in views), temperature=0.1, backend="tiled")
        assert float(loss) == pytest.approx(float(part), rel=1e-3)
        assert all(g.isfinite().all() for g in grads)
