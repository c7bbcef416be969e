"""The GPU kernels without a GPU: interpreted against torchvision, and compiled ahead of time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contrastive_kit import SimCLRAugment

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(script):
    command = [sys.executable, str(HERE / script)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_interpreted_kernels_equal_torchvision():
    errors = run("triton_interpreted.py")
    assert len(errors) == 7
    assert errors.pop("half") < 6e-4
    # The normalised views are divided by 0.2.
    assert errors.pop("everything, odd sizes") < 5e-5
    assert all(error < 1e-5 for error in errors.values()), errors


def test_kernels_compile_without_spilling():
    resources = run("triton_compile.py")
    assert len(resources) == 9
    for name, used in resources.items():
        assert used["REG"] <= 64, name
        assert used["LOCAL"] == 0, name


IMAGES = torch.rand(2, 3, 20, 20)


def test_named_backend_says_why_it_refuses():
    augment = SimCLRAugment(16, backend="triton")
    with pytest.raises(ValueError, match="backend 'triton' takes images on a CUDA device"):
        augment(IMAGES)
    with pytest.raises(ValueError, match="takes a batch of images of one size, got a list"):
        augment(list(IMAGES))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [32, 96, 224])
def test_on_the_gpu_the_kernels_equal_the_other_backends(size, dtype, make_images):
    images = make_images(8, 200, 256, dtype)
    params = SimCLRAugment(size).draw(images)
    expected = SimCLRAugment(size, backend="cpu")(images, params=params, concat=True)
    if dtype == torch.uint8:
        floats = images.float() / 255
        expected = SimCLRAugment(size, backend="cpu")(floats, params=params, concat=True)
    for backend in ("triton", "torch"):
        augment = SimCLRAugment(size, backend=backend)
        result = augment(images.cuda(), params=params, concat=True)
        if backend == "torch" and dtype == torch.uint8:
            assert (result.cpu() - expected).abs().mean() < 2e-3
        else:
            torch.testing.assert_close(result.cpu(), expected, atol=1e-5, rtol=0)
    auto = SimCLRAugment(size)(images.cuda(), params=params, concat=True)
    triton = SimCLRAugment(size, backend="triton")(images.cuda(), params=params, concat=True)
    assert torch.equal(auto, triton)
    torch.cuda.synchronize()
    with torch.cuda.device("cuda"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            SimCLRAugment(size)(images.cuda(non_blocking=True))
        finally:
            torch.cuda.set_sync_debug_mode("default")
