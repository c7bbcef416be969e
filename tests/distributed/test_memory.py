"""Peak memory of a process that compares its rows with those of all: rows, never own × all."""

import pytest
import torch
from memory import peak_mebibytes

from contrastive_kit.functional import info_nce, nt_xent


def check_memory(rank, size, clip, n):
    a, b = (torch.randn(n, 128, requires_grad=True) for _ in range(2))
    options = {"temperature": 0.1, "gather_distributed": True}

    def step():
        loss = info_nce(a, b, symmetric=True, **options) if clip else nt_xent(a, b, **options)
        loss.backward()

    return peak_mebibytes(step)


@pytest.mark.parametrize(
    ("clip", "n", "limit"),
    # One matrix of own rows times all, of several that eager would keep, has 288 and 128 MiB; the
    # tiles that stay for the backward have 32.
    [pytest.param(False, 3072, 96, id="nt_xent"), pytest.param(True, 4096, 112, id="clip")],
)
def test_extra_memory_is_that_of_rows(pair, clip, n, limit):
    assert max(pair.run(check_memory, clip, n)) <= limit
