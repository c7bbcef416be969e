"""What the kernels of the augmentation must hold on the device: the sizes that are timed."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_check_losses import Check, Outcome, poisoned
from benchmarks.gpu_device import Device
from contrastive_kit import SimCLRAugment

BACKENDS = ("triton", "torch")

# A crop of uint8 images is rounded to whole levels, where one backend may round the other way; the
# colours can amplify that level. Floats are rounded nowhere.
_FLOAT_BUDGET = 1e-5
_UINT8_BUDGET = 5e-4


def checks(device: Device) -> Iterator[tuple[str, Check]]:
    """Name and check of everything, for each backend."""
    cases = [((256, 256), 224, 8), ((96, 96), 96, 16), ((32, 32), 32, 64), ((97, 130), (33, 20), 8)]
    if device.dry:
        cases = [((20, 24), 12, 3)]
    for backend in BACKENDS:
        for shape, size, batch in cases:
            make = partial(_images, (batch, 3, *shape), device)
            name = f"views: {backend}: {shape} to {size}"
            for dtype in (torch.float32, torch.uint8):
                check = partial(_against_float64, backend, make, dtype, size, device)
                yield f"{name} {str(dtype).removeprefix('torch.')}", check
        if not device.dry:
            yield f"views: {backend}: waits for nothing", partial(_waits_for_nothing, backend)


def _images(shape: tuple[int, ...], device: Device, dtype: torch.dtype) -> Tensor:
    """Fresh random images: noise over a ramp."""
    ramp = torch.linspace(0, 1, shape[-1], device=device.device)
    x = 0.5 * torch.rand(shape, device=device.device) + 0.5 * ramp
    return (x * 255).round().to(torch.uint8) if dtype == torch.uint8 else x


def _against_float64(
    backend: str,
    make: Callable[[torch.dtype], Tensor],
    dtype: torch.dtype,
    size: int | tuple[int, int],
    device: Device,
) -> Outcome:
    """Against the torch backend in float64, twice the same, on poisoned memory.

    The error is the largest of all pixels for floats, and the mean for uint8.
    """
    images = make(dtype)
    exact_images = images if dtype == torch.uint8 else images.double()
    exact = SimCLRAugment(size, blur=True, backend="torch", dtype=torch.float64)
    table = exact.draw(images)
    expected = exact(exact_images, params=table, concat=True)
    augment = SimCLRAugment(size, blur=True, backend=backend)
    with poisoned(device):
        actual = augment(images, params=table, concat=True)
        again = augment(images, params=table, concat=True)
    if not torch.equal(actual, again):
        raise AssertionError("two runs on the same images differ, or there is a NaN")
    difference = (actual - expected).abs()
    if dtype == torch.uint8:
        return Outcome(float(difference.mean()), _UINT8_BUDGET)
    return Outcome(float(difference.max()), _FLOAT_BUDGET)


def _waits_for_nothing(backend: str) -> Outcome:
    images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8, device="cuda")
    augment = SimCLRAugment(64, backend=backend)
    augment(images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Outcome(0.0, 0.0)
