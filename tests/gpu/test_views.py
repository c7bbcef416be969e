"""What the kernels of the augmentation must hold on a GPU, at the sizes that are timed."""

import pytest
import torch

from benchmarks.harness.device import forbid_waiting
from contrastive_kit import SimCLRAugment

pytestmark = pytest.mark.gpu

# Floats are rounded nowhere. A crop of uint8 images is, to a level, after each of its two passes
# or once after both, and the colors amplify that.
FLOAT_BUDGET = 1e-5
LEVELS = 1.01 / 255
UINT8_MEAN = 5e-3

CASES = [((256, 256), 224, 8), ((96, 96), 96, 16), ((32, 32), 32, 64), ((97, 130), (33, 20), 8)]


@pytest.fixture(params=["triton", "torch"])
def kernels(request, device):
    try:
        SimCLRAugment(8, backend=request.param)(torch.zeros(1, 3, 8, 8, device=device))
    except ValueError as reason:
        pytest.skip(str(reason))
    return request.param


def crops_only(drawn):
    """The same parameters, without what comes after the crop and the flip."""
    from contrastive_kit.augment.parameters import unpack

    crops = drawn.clone()
    p = unpack(crops)
    for gate in (p.jitter, p.grayscale, p.blur):
        gate.zero_()
    return crops


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize(("shape", "size", "batch"), CASES)
def test_views_against_float64(kernels, shape, size, batch, dtype, device, scale):
    """Against the torch backend in float64, twice the same bits."""
    shape = scale(*shape)
    size = scale(*size) if isinstance(size, tuple) else scale(size)[0]
    ramp = torch.linspace(0, 1, shape[-1], device=device)
    images = 0.5 * torch.rand(batch, 3, *shape, device=device) + 0.5 * ramp
    if dtype == torch.uint8:
        images = (images * 255).round().to(torch.uint8)
    exact = SimCLRAugment(size, blur=True, backend="torch", dtype=torch.float64)
    augment = SimCLRAugment(size, blur=True, backend=kernels)
    drawn = exact.draw(images)

    def difference(parameters):
        floats = images.double() / (255 if dtype == torch.uint8 else 1)
        expected = exact(floats, params=parameters, concat=True)
        actual = augment(images, params=parameters, concat=True)
        again = augment(images, params=parameters, concat=True)
        assert torch.equal(actual, again), "two runs on the same images differ, or there is a NaN"
        return (actual - expected).abs()

    if dtype == torch.uint8:
        assert difference(crops_only(drawn)).max() <= LEVELS
        assert difference(drawn).mean() <= UINT8_MEAN
    else:
        # Positions of pixels are float32 numbers up to the side.
        assert difference(drawn).max() <= max(FLOAT_BUDGET, 2**-23 * max(shape))


def test_waits_for_nothing(kernels, cuda):
    images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8, device=cuda)
    augment = SimCLRAugment(64, backend=kernels)
    augment(images)
    torch.cuda.synchronize()
    with forbid_waiting():
        augment(images)
