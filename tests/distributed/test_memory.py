"""Peak memory of a process that compares its rows with those of all: rows, never own × all."""

import re
import sys
from pathlib import Path

import pytest
import torch

from contrastive_kit.functional import info_nce, nt_xent


def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024


def check_memory(rank, size, clip, n):
    def step(n):
        a, b = (torch.randn(n, 128, requires_grad=True) for _ in range(2))
        options = {"temperature": 0.1, "gather_distributed": True}
        loss = info_nce(a, b, symmetric=True, **options) if clip else nt_xent(a, b, **options)
        return loss.backward

    step(64)()
    # The peak so far is that of earlier checks; from here it is that of this step.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    step(n)()
    return peak() - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("clip", "n", "limit"),
    # One matrix of own rows times all, of several that eager would keep, has 288 and 128 MiB; the
    # tiles that stay for the backward have 32.
    [pytest.param(False, 3072, 96, id="nt_xent"), pytest.param(True, 4096, 96, id="clip")],
)
def test_extra_memory_is_that_of_rows(pair, clip, n, limit):
    assert max(pair.run(check_memory, clip, n)) <= limit
