"""What the kernels of the augmentation must hold on the device: the sizes that are timed."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_check_losses import Check, Outcome, poisoned
from benchmarks.gpu_device import Device
from contrastive_kit import SimCLRAugment
from contrastive_kit.augment.parameters import unpack

BACKENDS = ("triton", "torch")

# Floats are rounded nowhere. A crop of uint8 images is, to a level, after each of its two passes
# or once after both, and the colours amplify that.
_FLOAT_BUDGET = 1e-5
_LEVELS = 1.01
_UINT8_MEAN = 5e-3


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

    The error is that of all pixels, and for uint8 also that of the crop alone, each in units of
    its budget.
    """
    images = make(dtype)
    exact_images = images.double() / (255 if dtype == torch.uint8 else 1)
    exact = SimCLRAugment(size, blur=True, backend="torch", dtype=torch.float64)
    augment = SimCLRAugment(size, blur=True, backend=backend)
    table = exact.draw(images)

    def difference(parameters: Tensor) -> Tensor:
        expected = exact(exact_images, params=parameters, concat=True)
        with poisoned(device):
            actual = augment(images, params=parameters, concat=True)
            again = augment(images, params=parameters, concat=True)
        if not torch.equal(actual, again):
            raise AssertionError("two runs on the same images differ, or there is a NaN")
        return (actual - expected).abs()

    if dtype != torch.uint8:
        return Outcome(float(difference(table).max()) / _FLOAT_BUDGET, 1.0)
    crop = table.clone()
    p = unpack(crop)
    for gate in (p.jitter, p.grayscale, p.blur):
        gate.zero_()
    levels = float(difference(crop).max()) * 255 / _LEVELS
    return Outcome(max(levels, float(difference(table).mean()) / _UINT8_MEAN), 1.0)


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
