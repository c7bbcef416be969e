"""Where the Triton kernels run: why not here, and what kind of device it is."""

import contextlib
import functools
import os
from typing import Any

import torch

from contrastive_kit import _gpu
from contrastive_kit.ops.problem import Problem
from contrastive_kit.ops.triton import configs

# Triton then runs kernels on the CPU, for tests; it reads this when it is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_OLDEST_CAPABILITY = (8, 0)


def refusal(problem: Problem) -> str | None:
    """Why this backend cannot run on these tensors, or None if it can."""
    device = problem.q.device
    if device.type != "cuda" and not _INTERPRETED:
        return f"it needs tensors on a CUDA device, got {device}"
    if torch.float64 in (problem.q.dtype, problem.keys().dtype):
        return "it computes in float32 at most, got float64"
    return _gpu.refusal(device, _OLDEST_CAPABILITY)


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The row of the table of configurations for a device."""
    if device.type != "cuda":
        return configs.INTERPRETED
    if torch.version.hip:
        return "hip"
    properties = torch.cuda.get_device_properties(device)
    return configs.architecture(properties.major, properties.minor)


def processors(device: torch.device) -> int:
    """How many multiprocessors a device has."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches go to ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
