"""Each arm by itself with pytest-benchmark: ``pytest benchmarks --benchmark-only``.

An arm that computes something else is not timed. Ratios between arms belong to
``python -m benchmarks``, which interleaves them in one process.
"""

from functools import cache, partial

import pytest
import torch

from benchmarks import views
from benchmarks.harness.device import Device
from benchmarks.losses.arms import SUBJECTS, Setting, embeddings, gate
from benchmarks.losses.bench import DIRECTIONS
from benchmarks.losses.oracle import check, oracle, relative_errors

KIND = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [
    *((n, 128) for n in (256, 512, 1024, 2048, 4096)),
    pytest.param(8192, 128, marks=pytest.mark.slow),
    (1024, 512),
]
TEMPERATURE = {"nt_xent": 0.1, "clip": 0.07}


@cache
def expected(formula, n, d):
    temperature = TEMPERATURE["clip" if formula == "clip" else "nt_xent"]
    return oracle(formula, *embeddings(n, d), temperature)


def build(name, function):
    try:
        return function()
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize(
    ("subject", "name"),
    [
        (subject, name)
        for subject, arms in SUBJECTS.items()
        for name, arm in arms.items()
        if KIND == "cuda" or not arm.gpu_only
    ],
)
def test_loss(benchmark, subject, name, n, d, direction):
    arm, device = SUBJECTS[subject][name], Device(KIND)
    if n > (largest := arm.largest_n.get(KIND, n)):
        pytest.skip(f"memory grows with N³: not beyond N = {largest}")
    setting = Setting(TEMPERATURE[subject], "fp32", device)
    loss = build(name, lambda: arm.build(setting))
    torch.compiler.reset()
    z = [x.detach().to(device.device).requires_grad_() for x in embeddings(n, d)]
    oracle_here = expected(arm.formula, n, d)
    oracle_here = type(oracle_here)(*(x.to(device.device) for x in oracle_here))
    check(relative_errors(loss, *z, oracle_here), gate(arm, setting))
    benchmark.group = f"{subject} {direction} N={n} D={d}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    rounds, iterations = (20, 5) if n < 2048 else (5, 1)
    benchmark.pedantic(
        device.waited(partial(DIRECTIONS[direction], loss, *z)),
        rounds=rounds,
        iterations=iterations,
        warmup_rounds=1,
    )


@pytest.mark.parametrize(("source", "size"), [(32, 32), (96, 96), (256, 224)])
@pytest.mark.parametrize(
    "name", [n for n, arm in views.ARMS.items() if KIND in arm.kinds and "compiled" not in n]
)
def test_views(benchmark, name, source, size):
    device = Device(KIND)
    of = views.inputs(views.Case(source, size, 64, 0.0), device)
    arm = build(name, lambda: views.ARMS[name].build(of, **views.ARMS[name].options))
    benchmark.group = f"views {source} to {size}"
    benchmark.extra_info["images"] = arm.images
    benchmark.pedantic(device.waited(arm.call), rounds=5, warmup_rounds=1)
