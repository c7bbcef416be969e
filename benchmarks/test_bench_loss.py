"""Single-arm statistics with pytest-benchmark; an arm that disagrees is not timed.

Ratios between arms belong to ``benchmarks.run``, which interleaves them in one process.
"""

from functools import cache, partial

import pytest
import torch

from benchmarks.loss_arms import SUBJECTS, embeddings, forward, forward_backward
from benchmarks.parity import check, oracle

_SIZES = [
    *((n, 128) for n in (256, 512, 1024, 2048, 4096)),
    pytest.param(8192, 128, marks=pytest.mark.slow),
    (1024, 512),
]
_TEMPERATURE = {"nt_xent": 0.1, "clip": 0.07}
_LARGE_N = 2048


@cache
def _expected(subject, n, d):
    return oracle(subject, *embeddings(n, d), _TEMPERATURE[subject])


@pytest.mark.parametrize("run", [forward, forward_backward], ids=lambda run: run.__name__)
@pytest.mark.parametrize(("n", "d"), _SIZES)
@pytest.mark.parametrize(
    ("subject", "arm_name"),
    [(subject, name) for subject, arms in SUBJECTS.items() for name in arms],
)
def test_loss(benchmark, subject, arm_name, n, d, run):
    arm = SUBJECTS[subject][arm_name]
    if arm.largest_n is not None and n > arm.largest_n:
        pytest.skip(f"memory grows with N³: not beyond N = {arm.largest_n}")
    try:
        loss = arm.build(_TEMPERATURE[subject])
    except ImportError as error:
        pytest.skip(f"{arm_name} is not installed: {error}")
    torch.compiler.reset()
    z1, z2 = embeddings(n, d)
    check(loss, z1, z2, _expected(subject, n, d), _TEMPERATURE[subject])
    benchmark.group = f"{subject} {run.__name__} N={n} D={d}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    small = n < _LARGE_N
    benchmark.pedantic(
        partial(run, loss, z1, z2),
        rounds=20 if small else 5,
        iterations=5 if small else 1,
        warmup_rounds=1,
    )
