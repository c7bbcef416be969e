"""Each arm by itself with pytest-benchmark: ``pytest benchmarks --benchmark-only``.

An arm that computes something else is not timed. Ratios between arms belong to
``python -m benchmarks``, which interleaves them in one process.
"""

from functools import cache, partial

import pytest
import torch

from benchmarks import views
from benchmarks.harness.device import Device
from benchmarks.losses import arms, bench

DEVICE = Device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [
    *((n, 128) for n in (256, 512, 1024, 2048, 4096)),
    pytest.param(8192, 128, marks=pytest.mark.slow),
    (1024, 512),
]
inputs = cache(partial(bench.Inputs, device=DEVICE))
LOSSES = [(s, name) for s in arms.SUBJECTS for name in arms.arms_of(s, DEVICE.kind)]


@pytest.mark.parametrize("direction", bench.DIRECTIONS)
@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize(("subject", "name"), LOSSES)
def test_loss(benchmark, subject, name, n, d, direction):
    case = bench.Case(subject, n, d, "fp32", 0.07 if subject == "clip" else 0.1)
    if reason := bench.left_out(case, arms.ARMS[name], DEVICE.kind):
        pytest.skip(reason)
    torch.compiler.reset()
    try:
        loss = inputs(case).right_loss(name)
    except ImportError as error:
        pytest.skip(f"not installed: {error}")
    benchmark.group = f"{subject} {direction} N={n} D={d}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    rounds, iterations = (20, 5) if n < 2048 else (5, 1)
    call = DEVICE.waited(partial(bench.DIRECTIONS[direction], loss, *inputs(case).z))
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)


@pytest.mark.parametrize(("source", "size"), [(32, 32), (96, 96), (256, 224)])
@pytest.mark.parametrize("name", views.arms_of(views.Case(32, 32), DEVICE.kind))
def test_views(benchmark, name, source, size):
    try:
        arm = views.ARMS[name].build(views.inputs(views.Case(source, size), DEVICE))
    except ImportError as error:
        pytest.skip(f"not installed: {error}")
    benchmark.group = f"views {source} to {size}"
    benchmark.extra_info["images"] = arm.images
    benchmark.pedantic(DEVICE.waited(arm.call), rounds=5, warmup_rounds=1)
