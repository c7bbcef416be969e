"""The oracle of the augmentations: torchvision's own operations, image by image."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as v1
from torchvision.transforms.v2 import functional as v2

from contrastive_kit.augment.parameters import unpack

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def make_images(batch, height, width, dtype=torch.float32, seed=0):
    """Noise over a ramp, with gray, saturated, black, white and tied pixels among it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, 3, height, width, generator=generator)
    ramp = torch.linspace(0, 1, width) * torch.linspace(0.2, 1, height)[:, None]
    x = 0.5 * x + 0.5 * ramp
    flat = x.flatten(2)
    special = torch.tensor(
        [
            *itertools.product((0.0, 1.0), repeat=3),
            *((0.5, 0.5, 0.5), (0.3, 0.3, 0.7), (0.7, 0.3, 0.3), (0.3, 0.7, 0.7)),
        ]
    )
    places = torch.randint(0, flat.shape[-1], (batch, len(special)), generator=generator)
    for sample, place in zip(flat, places, strict=True):
        sample[:, place] = special.T
    if dtype == torch.uint8:
        return (x * 255).round().to(torch.uint8)
    return x.to(dtype)


def torchvision_jitter(x, order, factors):
    operations = (v1.adjust_brightness, v1.adjust_contrast, v1.adjust_saturation, v1.adjust_hue)
    for operation in order:
        x = operations[int(operation)](x, float(factors[int(operation)]))
    return x


def torchvision_view(image, row, recipe):
    """One view of one image by torchvision, from its row of the parameter table."""
    p = unpack(row)
    box = [int(value) for value in p.box]
    size, mode = list(recipe.size), MODES[recipe.interpolation]
    if image.dtype == torch.uint8 and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        # Without AVX2 torchvision resizes in floats, and not by torch's operation for uint8.
        crop = v2.crop(image, *box)[None]
        x = F.interpolate(crop, size, mode=recipe.interpolation, antialias=recipe.antialias)[0]
    else:
        x = v2.resized_crop(image, *box, size, mode, antialias=recipe.antialias)
    if image.dtype == torch.uint8:
        x = x.float() / 255
    elif recipe.interpolation == "bicubic":
        x = x.clamp(0, 1)
    if p.flip:
        x = v1.hflip(x)
    if p.jitter:
        x = torchvision_jitter(x, p.order, (p.brightness, p.contrast, p.saturation, p.hue))
    if p.grayscale:
        x = v1.rgb_to_grayscale(x, 3)
    if p.blur and recipe.taps:
        x = v1.gaussian_blur(x, [recipe.taps] * 2, [float(p.sigma)] * 2)
    if p.solarize:
        x = v1.solarize(x, recipe.solarize_threshold)
    if recipe.normalize is not None:
        x = v1.normalize(x, *map(list, recipe.normalize))
    return x


@pytest.fixture(name="make_images")
def make_images_fixture():
    return make_images


@pytest.fixture(name="torchvision_view")
def torchvision_view_fixture():
    return torchvision_view


@pytest.fixture(name="torchvision_jitter")
def torchvision_jitter_fixture():
    return torchvision_jitter
