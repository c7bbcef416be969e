"""On CUDA the host never waits, and what is launched does not depend on the batch: without a GPU.

Fake CUDA tensors carry shapes and devices and no data, so anything that reads a value (`item`,
`tolist`, `bool`, a copy to the host, a data-dependent shape) raises or is recorded here.
"""

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_kit import SimCLRAugment
from contrastive_kit.augment import (
    BYOL,
    GOOGLE_RESEARCH,
    ColorJitter,
    GaussianBlur,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarize,
    SimCLRView,
)
from contrastive_kit.augment.backends import triton

VIEWS = {"view", "expand", "slice", "select", "unsqueeze", "permute", "transpose", "t", "alias"}
VIEWS |= {"unbind", "split", "squeeze", "_unsafe_view", "detach", "empty", "as_strided"}


class Record(TorchDispatchMode):
    """The device work of a call, its copies between devices among it."""

    def __init__(self):
        super().__init__()
        self.launches, self.to_device, self.blocking = [], 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        target = result.device.type if isinstance(result, torch.Tensor) else None
        if target == "cuda" and name not in VIEWS:
            self.launches.append(name)
        for source in tensors:
            if source.device.type == "cuda" and target == "cpu":
                self.blocking.append(name)
            if source.device.type == "cpu" and target == "cuda" and source.ndim:
                self.to_device += 1
                if not kwargs.get("non_blocking"):
                    self.blocking.append(name)
        return result


def run(monkeypatch, module, batch, size=64, dtype=torch.uint8):
    with FakeTensorMode():
        # There is no fake for pin_memory.
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        images = torch.empty(batch, 3, 80, 72, dtype=dtype, device="cuda")
        with Record() as record:
            result = module(images)
    views = result if isinstance(result, tuple) else (result,)
    assert all(view.device.type == "cuda" for view in views)
    return record


RECIPES = {
    "simclr": lambda **o: SimCLRAugment(64, **o),
    "normalized half": lambda **o: SimCLRAugment(
        64, normalize=((0.5,) * 3, (0.2,) * 3), dtype=torch.float16, **o
    ),
    "google": lambda **o: SimCLRAugment(64, recipe=GOOGLE_RESEARCH, **o),
    "byol": lambda **o: SimCLRAugment(64, recipe=BYOL, **o),
}


@pytest.mark.indexes_fakes
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_views_are_made_without_waiting(name, dtype, monkeypatch):
    record = run(monkeypatch, RECIPES[name](backend="torch"), 8, dtype=dtype)
    assert record.blocking == []
    assert record.to_device == 1, "the parameters are one copy"
    more = run(monkeypatch, RECIPES[name](backend="torch"), 64, dtype=dtype)
    assert more.launches == record.launches, "what is launched depends on the batch"


@pytest.mark.parametrize("name", RECIPES)
def test_kernels_are_few_and_do_not_wait(name, monkeypatch):
    kernels = pytest.importorskip("contrastive_kit.augment.backends.triton_kernels")
    # Under fake tensors the op would not run its body.
    monkeypatch.setattr(triton, "_op", triton._launch)
    launched = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append((self.name, grid))

    for kernel in ("crop_kernel", "color_kernel", "blur_kernel"):
        monkeypatch.setattr(kernels, kernel, Kernel(kernel))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    record = run(monkeypatch, RECIPES[name](), 8)
    assert record.blocking == []
    assert record.to_device == 1
    assert [kernel for kernel, _ in launched] == [
        "crop_kernel", "color_kernel", "blur_kernel", "blur_kernel"
    ]  # fmt: skip
    assert launched[0][1] == (16 * 64 * 64 // triton.BLOCK,)
    assert len(launched) + len(record.launches) <= 7


MODULES = {
    "crop": lambda: RandomResizedCrop(64),
    "flip": RandomHorizontalFlip,
    "jitter": lambda: ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
    "grayscale": RandomGrayscale,
    "blur": lambda: GaussianBlur(7),
    "solarize": RandomSolarize,
    "view": lambda: SimCLRView(SimCLRAugment(64, views=1, backend="torch")),
}


@pytest.mark.indexes_fakes
@pytest.mark.parametrize("name", MODULES)
def test_our_part_of_the_modules_does_not_wait(name, monkeypatch):
    """Kornia's own bases wait in some releases; the parameters and the operation never do."""
    module = MODULES[name]()

    def parameters_and_operation(images):
        params = module.generate_parameters(images.shape)
        matrix = module.compute_transformation(images, params, module.flags)
        return module.apply_transform(images, params, module.flags, matrix)

    assert run(monkeypatch, parameters_and_operation, 8, dtype=torch.float32).blocking == []


@pytest.mark.indexes_fakes
def test_the_record_notices_a_wait(monkeypatch):
    def waits(images):
        return images * images.float().mean().cpu().to("cuda")

    assert run(monkeypatch, waits, 2).blocking
    with pytest.raises(Exception, match=r"item|local_scalar"):
        run(monkeypatch, lambda images: images * images.sum().item(), 2)
