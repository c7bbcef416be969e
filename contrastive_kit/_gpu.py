"""Which GPUs and releases of Triton the kernels of losses and views run on."""

import importlib.metadata
import importlib.util

import torch

_OLDEST_TRITON = (3, 5)
# Those of AMD's whose matrix units and waves of 64 threads the kernels are compiled for in tests.
_AMD = ("gfx90a", "gfx942", "gfx950")


def missing_package(package: str) -> str | None:
    """What is wrong with the installed package of Triton, if anything is."""
    if importlib.util.find_spec(package) is None:
        return "it needs the package triton, which is not installed"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # a build under another name, such as those for AMD
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"it needs triton 3.5 or later, version {version} is installed"
    return None


# Looked up once: a compiled graph reads it, and may not search for packages.
_MISSING = missing_package("triton")


def refusal(device: torch.device, oldest_capability: tuple[int, int]) -> str | None:
    """Why kernels cannot run on a device, or None if they can.

    A device that is not CUDA counts as Triton's interpreter, and a fake one as any.
    """
    if _MISSING is not None:
        return _MISSING
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        architecture = properties.gcnArchName.split(":")[0]
        if architecture not in _AMD:
            return f"it needs one of {', '.join(_AMD)}, {properties.name} is {architecture}"
    elif (properties.major, properties.minor) < oldest_capability:
        capability = f"{properties.major}.{properties.minor}"
        oldest = ".".join(map(str, oldest_capability))
        return f"it needs compute capability {oldest} or higher, {properties.name} has {capability}"
    return None
