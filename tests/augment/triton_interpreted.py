"""Run the kernels in Triton's interpreter and print their errors against torchvision as JSON.

A process of its own: the interpreter must be chosen before Triton is first imported.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import importlib.util
from pathlib import Path

import torch

from contrastive_kit import SimCLRAugment
from contrastive_kit.augment import _triton

NORMALIZE = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
CASES = {
    "no blur": ((16, 16), (8, 24, 20), {}),
    "everything, odd sizes": (
        (33, 20),
        (4, 50, 41),
        {"blur": True, "kernel_size": 5, "normalize": NORMALIZE, "solarize": 0.5},
    ),
    "wide hue": ((16, 16), (6, 16, 16), {"colors": (0.8, 0.8, 0.8, 0.5)}),
    "aliasing": ((16, 16), (4, 30, 30), {"antialias": False}),
    "bicubic": ((16, 16), (3, 24, 20), {"interpolation": "bicubic"}),
}


def oracle():
    path = Path(__file__).with_name("conftest.py")
    spec = importlib.util.spec_from_file_location("augment_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def error(size, shape, options, dtype, result_dtype, memory_format):
    torch.manual_seed(0)
    torchvision = oracle()
    augment = SimCLRAugment(size, **options)
    images = torchvision.make_images(*shape, dtype)
    if memory_format == torch.channels_last:
        images = images.contiguous(memory_format=memory_format)
    params = augment.draw(images)
    out = torch.full((2 * shape[0], 3, *size), float("nan"), dtype=result_dtype)
    out = out.contiguous(memory_format=memory_format)
    _triton.render(images, params, augment.settings, out)
    source = images.float() / 255 if dtype == torch.uint8 else images
    rows = params.flatten(0, 1)
    expected = [
        torchvision.torchvision_view(source[i % shape[0]], row, augment.settings)
        for i, row in enumerate(rows)
    ]
    return (out.float() - torch.stack(expected)).abs().max().item()


if __name__ == "__main__":
    plain, last = torch.contiguous_format, torch.channels_last
    errors = {
        name: error(*case, torch.float32, torch.float32, plain) for name, case in CASES.items()
    }
    case = CASES["no blur"]
    errors["uint8, channels_last"] = error(*case, torch.uint8, torch.float32, last)
    errors["half"] = error(*case, torch.uint8, torch.float16, plain)
    print(json.dumps(errors))
