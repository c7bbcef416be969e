"""Peak memory of forward and backward, in fresh processes: linear in N, never N × N."""

import subprocess
import sys

import pytest

MEASURE = """
import sys, torch
from contrastive_kit.functional import info_nce, nt_xent

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024

loss_fn, n = {"nt_xent": nt_xent, "info_nce": info_nce}[sys.argv[1]], int(sys.argv[2])
def step(n):
    a, b = (torch.randn(n, 128).requires_grad_() for _ in range(2))
    return lambda: loss_fn(a, b, temperature=0.1).backward()
step(64)()
run = step(n)
before = peak()
run()
print(peak() - before)
"""


def extra_mebibytes(loss, n):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, loss, str(n)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("loss", ["nt_xent", "info_nce"])
def test_extra_memory_is_linear_in_n(loss):
    small, large = extra_mebibytes(loss, 2048), extra_mebibytes(loss, 8192)
    assert large <= 96  # the similarity matrix alone would be 1024 for nt_xent, 256 for info_nce
    assert large <= 4.5 * max(small, 12)
