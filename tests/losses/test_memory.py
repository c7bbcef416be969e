"""Peak memory of forward and backward, in fresh processes: linear in N, never N × N."""

import subprocess
import sys

import pytest

MEASURE = """
import sys, torch
from contrastive_kit.functional import info_nce, nt_xent, siglip, sup_con

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024

losses = {
    "nt_xent": nt_xent,
    "info_nce": info_nce,
    "smoothed": lambda a, b, **k: nt_xent(a, b, label_smoothing=0.1, weights=a[:, 0], **k),
    "hardness": lambda a, b, **k: nt_xent(a, b, hardness=0.5, **k),
    "sup_con": lambda a, b, **k: sup_con(a, b, labels=torch.arange(len(a)) // 4, **k),
    "sup_con in": lambda a, b, **k: sup_con(
        a, b, labels=torch.arange(len(a)) // 4, variant="in", **k
    ),
    "siglip": siglip,
}
loss_fn, n = losses[sys.argv[1]], int(sys.argv[2])
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
@pytest.mark.parametrize(
    ("loss", "limit"),
    [
        ("nt_xent", 96),
        ("info_nce", 96),
        ("smoothed", 160),
        ("hardness", 160),
        ("sup_con", 160),
        ("sup_con in", 160),
        ("siglip", 96),
    ],
)
def test_extra_memory_is_linear_in_n(loss, limit):
    small, large = extra_mebibytes(loss, 2048), extra_mebibytes(loss, 8192)
    assert large <= limit  # the similarity matrix alone would be 1024 for nt_xent, 256 for info_nce
    assert large <= 6 * max(small, 16)  # a matrix would be 16 times as large
