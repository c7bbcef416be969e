"""The device of these tests: CUDA, or where CK_DRY says so the CPU at tiny sizes, to see they run.

``python -m benchmarks correctness`` gives each file a fresh seed in CK_SEED.
"""

import os

import pytest
import torch

DRY = os.environ.get("CK_DRY") == "1"


@pytest.fixture(autouse=True)
def fresh_inputs(seed):
    torch.manual_seed(int(os.environ.get("CK_SEED", "0")))


@pytest.fixture
def device():
    return torch.device("cpu" if DRY else "cuda")


@pytest.fixture
def cuda(device):
    if DRY:
        pytest.skip("a dry run has no CUDA device")
    return device


@pytest.fixture
def scale():
    """Make a size that is for a GPU tiny in a dry run, and leave it odd."""
    return lambda *sizes: tuple(min(size, 19) for size in sizes) if DRY else sizes
