"""The Triton backend against torchvision and against the torch backend in float64.

The parity tests run on CUDA where there is a device. Elsewhere Triton's interpreter runs the same
kernels on CPU tensors, in a process of its own: it must be chosen before the first import of
triton, and nothing else can be compiled in its process.
"""

import contextlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_kit import SimCLRAugment
from contrastive_kit.augment.backends import batched
from contrastive_kit.augment.parameters import unpack
from contrastive_kit.augment.recipe import BYOL, GOOGLE_RESEARCH, IMAGENET_NORMALIZATION

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def on_device(test):
    return test if INTERPRETED else pytest.mark.gpu(test)


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch):
    """The interpreter's time goes by programs, not by pixels."""
    from contrastive_kit.augment.backends import triton

    if INTERPRETED:
        monkeypatch.setattr(triton, "BLOCK", 4096)
        allow_runtime_bounds(monkeypatch)


def allow_runtime_bounds(monkeypatch):
    """Triton 3.5 and 3.6 make ints of loop bounds, arrays of one element, as NumPy 2.4 forbids."""
    import numpy as np
    from triton.runtime import interpreter

    name = "_patch_lang_tensor"
    original = getattr(interpreter, name)

    def patched(tensor, *scope):
        original(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr  # Triton 3.5 has no scope
        set_attribute(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    monkeypatch.setattr(interpreter, name, patched)


def test_in_the_interpreter():
    """All parity tests of this file, on the CPU."""
    if INTERPRETED:
        pytest.skip("this is the interpreter's process")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 25, done.stdout


def make_views(images, table, augment):
    from contrastive_kit.augment.backends import triton

    out = torch.full((table[..., 0].numel(), 3, *augment.recipe.size), math.nan)
    out = out.to(DEVICE, augment.dtype, memory_format=augment.memory_format)
    triton.render_into(images.to(DEVICE), table.to(DEVICE), augment.recipe, out)
    return out.cpu()


def without_gates(table):
    """The crop and nothing else."""
    bare = table.clone()
    p = unpack(bare)
    for gate in (p.jitter, p.grayscale, p.blur, p.solarize):
        gate.zero_()
    return bare


def in_float64(images, table, recipe):
    """The views of floating images by the torch backend in float64."""
    return batched.render(
        images.double(), table.double(), recipe, torch.float64, torch.contiguous_format
    )


def after_the_crop(crops, table, recipe):
    """The views of images that are already cropped and mirrored, one for each row of the table."""
    rows = table.flatten(0, 1)[None].clone()
    box = unpack(rows).box
    box[..., :2], box[..., 2], box[..., 3] = 0, crops.shape[-2], crops.shape[-1]
    unpack(rows).flip.zero_()
    return in_float64(crops, rows, recipe)


CASES = {
    "32 from 32": (32, (8, 32, 32), {"blur": True}),
    "33x20 from 50x41": ((33, 20), (6, 50, 41), {"blur": True, "kernel_size": 5}),
    "96 from 64x128, normalized": (96, (2, 64, 128), {"normalize": IMAGENET_NORMALIZATION}),
    "224 from 256": (224, (2, 256, 256), {"views": 1}),
    "16 from 97x130": (16, (2, 97, 130), {"blur": False}),
    "bicubic": (24, (4, 60, 40), {"interpolation": "bicubic"}),
    "bicubic, no antialias": (24, (4, 60, 40), {"interpolation": "bicubic", "antialias": False}),
    "no antialias": (24, (4, 60, 40), {"antialias": False}),
    "hue of half a turn": (16, (8, 30, 30), {"blur": True, "colors": (0.8, 0.8, 0.8, 0.5)}),
    "narrow blur": (20, (4, 20, 20), {"blur": 1.0, "sigma": (0.95, 1.0), "kernel_size": 11}),
    "three views": (17, (2, 30, 31), {"views": 3}),
}


@on_device
@pytest.mark.parametrize("case", CASES)
def test_floats_equal_float64(case, make_images, poisoned_empty):
    size, shape, options = CASES[case]
    augment = SimCLRAugment(size, backend="torch", **options)
    images = make_images(*shape)
    table = augment.draw(images)
    result = make_views(images, table, augment)
    atol = 1e-5 / (0.225 if augment.recipe.normalize else 1)
    expected = in_float64(images, table, augment.recipe).float()
    torch.testing.assert_close(result, expected, atol=atol, rtol=0)


RECIPES = {
    "google": SimCLRAugment(24, recipe=GOOGLE_RESEARCH, blur=True),
    "byol": SimCLRAugment(24, recipe=BYOL, solarize=0.5, sigma=(0.1, 3.0), kernel_size=11),
}


@on_device
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_equal_float64(name, make_images, poisoned_empty):
    augment = RECIPES[name]
    images = make_images(6, 50, 40)
    table = augment.draw(images)
    result = make_views(images, table, augment)
    expected = in_float64(images, table, augment.recipe).float()
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@on_device
@pytest.mark.parametrize(
    "case", ["32 from 32", "33x20 from 50x41", "bicubic", "bicubic, no antialias"]
)
def test_uint8_is_cropped_in_levels_then_equals_float64(
    case, make_images, torchvision_view, poisoned_empty
):
    size, shape, options = CASES[case]
    augment = SimCLRAugment(size, backend="torch", **options)
    images = make_images(*shape, torch.uint8)
    table = augment.draw(images)
    bare = without_gates(table)
    levels = make_views(images, bare, augment) * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)

    theirs = [
        torchvision_view(images[number % len(images)], row, augment.recipe) * 255
        for number, row in enumerate(bare.flatten(0, 1))
    ]
    # torchvision's weights are whole numbers of 15 bits: half a level may round the other way.
    off = (levels - torch.stack(theirs)).abs()
    if augment.recipe.interpolation == "bicubic":
        assert off.max() < 2.01
        assert off.mean() < 0.05
    else:
        # Rounded once: between the axes no bilinear crop leaves its range.
        assert off.max() < 1.01

    result = make_views(images, table, augment)
    expected = after_the_crop(levels.round() / 255, table, augment.recipe).float()
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@on_device
def test_floats_equal_torchvision(make_images, torchvision_view):
    augment = SimCLRAugment((32, 40), blur=True, backend="torch", solarize=0.3)
    images = make_images(6, 40, 60)
    table = augment.draw(images)
    result = make_views(images, table, augment)
    for number, row in enumerate(table.flatten(0, 1)):
        expected = torchvision_view(images[number % 6], row, augment.recipe)
        torch.testing.assert_close(result[number], expected, atol=1e-5, rtol=0)


@on_device
def test_crops_of_one_pixel_and_every_order_of_the_colors(make_images):
    import itertools

    augment = SimCLRAugment(9, views=1, blur=False)
    images = make_images(24, 12, 13)
    table = augment.draw(images)
    p = unpack(table)
    p.jitter.fill_(1)
    p.order.copy_(torch.tensor(list(itertools.permutations(range(4)))))
    p.hue[0, ::3], p.hue[0, 1::3] = 0.5, -0.5
    p.box[0, ::4] = torch.tensor([11.0, 12.0, 1.0, 1.0])
    p.box[0, 1::4] = torch.tensor([0.0, 3.0, 1.0, 7.0])
    result = make_views(images, table, augment)
    expected = in_float64(images, table, augment.recipe).float()
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@on_device
@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [
        (torch.float16, torch.channels_last),
        (torch.bfloat16, torch.contiguous_format),
        (torch.float32, torch.channels_last),
    ],
)
def test_dtype_and_memory_format_of_the_views(dtype, memory_format, make_images, poisoned_empty):
    images = make_images(3, 30, 33, torch.uint8)
    options = {"blur": True, "normalize": IMAGENET_NORMALIZATION}
    plain = SimCLRAugment(20, **options)
    table = plain.draw(images)
    augment = SimCLRAugment(20, dtype=dtype, memory_format=memory_format, **options)
    wide = make_views(images, table, plain)
    result = make_views(images, table, augment)
    # The interpreter truncates to bfloat16 where a GPU rounds.
    spacing = torch.finfo(dtype).eps * wide.abs().max() if dtype == torch.bfloat16 else 0
    if INTERPRETED and spacing:
        torch.testing.assert_close(result.float(), wide, atol=float(spacing), rtol=0)
    else:
        assert torch.equal(result, wide.to(dtype))


@on_device
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16])
def test_strides_and_dtypes_of_the_images(dtype, make_images):
    augment = SimCLRAugment(16, views=1, blur=True)
    images = make_images(2, 20, 25, dtype)
    table = augment.draw(images)
    source = images if dtype == torch.uint8 else images.float()
    expected = make_views(source, table, augment)
    last = images.contiguous(memory_format=torch.channels_last)
    cut = torch.nn.functional.pad(images.float(), (3, 2, 1, 4)).to(dtype)[:, :, 1:-4, 3:-2]
    backwards = images.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    for laid_out in (images, last, cut, backwards):
        assert torch.equal(make_views(laid_out, table, augment), expected)
    same = images[:1].expand(2, -1, -1, -1)
    assert torch.equal(
        make_views(same, table, augment), make_views(same.contiguous(), table, augment)
    )


@on_device
def test_boxes_outside_the_image_are_moved_into_it(make_images):
    augment = SimCLRAugment(8, views=1, blur=False)
    images = make_images(4, 20, 25)
    table = augment.draw(images)
    moved = table.clone()
    nan = math.nan
    outside = [[-5, 30, 10, 10], [500, -500, 4, 6], [0, 0, 99, 99], [nan, nan, nan, nan]]
    inside = [[0, 15, 10, 10], [16, 0, 4, 6], [0, 0, 20, 25], [0, 0, 1, 1]]
    unpack(table).box[0], unpack(moved).box[0] = torch.tensor(outside), torch.tensor(inside)
    result = make_views(images, table, augment)
    assert torch.equal(result[:3], make_views(images, moved, augment)[:3])


@on_device
def test_op_is_well_registered_and_runs_under_compile(make_images):
    from contrastive_kit.augment.backends import triton

    augment = SimCLRAugment(8, blur=True, dtype=torch.float16)
    images = make_images(2, 12, 12)
    table = augment.draw(images)
    expected = make_views(images, table, augment)
    images, table = images.to(DEVICE), table.to(DEVICE)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        op = triton._op
        patch.setattr(triton, "_op", lambda *args: calls.append(args))
        out = torch.zeros(expected.shape, dtype=torch.float16, device=DEVICE)
        triton.render_into(images, table, augment.recipe, out)
    torch.library.opcheck(op, calls[0])

    def run(images, table):
        out = torch.empty(expected.shape, dtype=torch.float16, device=images.device)
        triton.render_into(images, table, augment.recipe, out)
        return out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, table).cpu(), expected)


@on_device
def test_empty_batch():
    augment = SimCLRAugment(8)
    views = make_views(torch.empty(0, 3, 9, 9), torch.empty(2, 0, 18), augment)
    assert views.shape == (0, 3, 8, 8)


@pytest.mark.gpu
def test_module_takes_this_backend_on_cuda(make_images):
    images = make_images(4, 40, 40, torch.uint8).cuda()
    augment = SimCLRAugment(32, blur=True)
    table = augment.draw(images)
    named = SimCLRAugment(32, blur=True, backend="triton")(images, params=table, concat=True)
    assert torch.equal(augment(images, params=table, concat=True), named)
    assert torch.equal(named.cpu(), make_views(images.cpu(), table, augment))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_named_backend_says_why_it_refuses(make_images):
    augment = SimCLRAugment(16, backend="triton")
    with pytest.raises(
        ValueError, match="backend 'triton' cannot run here: it takes images on CUDA, got cpu"
    ):
        augment(make_images(2, 20, 20))


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def launches(monkeypatch, batch, size, **options):
    """Names of the kernels and torch operations that views take, and the kernels' grids."""
    from contrastive_kit.augment.backends import triton, triton_kernels

    kernels, grids = [], []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            kernels.append(self.name)
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("crop_kernel", "color_kernel", "blur_kernel"):
        monkeypatch.setattr(triton_kernels, name, Recorded(name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    recipe = SimCLRAugment(size, **options).recipe
    monkeypatch.setattr(triton, "_op", triton._launch)
    with FakeTensorMode(), Operations() as operations:
        images = torch.empty(batch, 3, 80, 72, dtype=torch.uint8, device="cuda")
        table = torch.empty(2, batch, 18, device="cuda")
        out = torch.empty(2 * batch, 3, size, size, dtype=torch.float16, device="cuda")
        triton.render_into(images, table, recipe, out)
    return kernels, grids, [name for name in operations.names if name != "empty"]


@pytest.mark.skipif(INTERPRETED, reason="nothing is run here")
@pytest.mark.parametrize("blur", [False, True])
def test_launches_do_not_depend_on_the_batch_and_nothing_waits(blur, monkeypatch):
    """Fake CUDA tensors have no data: to read a value raises, to copy it to the host is listed."""
    few = launches(monkeypatch, 2, 64, blur=blur)
    kernels, grids, operations = launches(monkeypatch, 4096, 64, blur=blur)
    assert kernels == few[0] == ["crop_kernel", "color_kernel", *["blur_kernel"] * (2 * blur)]
    assert operations == few[2]
    assert [name for name in operations if name not in ("alias", "detach", "device")] == ["sum"]
    assert {len(grid) for grid in grids} == {1}
    assert grids[0][0] == 2048 * few[1][0][0]


@pytest.mark.skipif(INTERPRETED, reason="nothing is run here")
def test_reasons_to_refuse():
    from contrastive_kit.augment.backends import triton

    recipe = SimCLRAugment(8).recipe
    with FakeTensorMode():
        images = torch.empty(2, 3, 9, 9, device="cuda")
        assert triton.refusal(images, recipe, torch.float16) is None
        needs_grad = images.clone().requires_grad_()
        with torch.no_grad():
            assert triton.refusal(needs_grad, recipe, torch.float32) is None
        huge = torch.empty(1, 3, 30000, 30000, dtype=torch.uint8, device="cuda")
        for refused, dtype, words in (
            (list(images), torch.float32, "takes one batch tensor, got a list"),
            (torch.empty(2, 3, 9, 9), torch.float32, "takes images on CUDA, got cpu"),
            (images.double(), torch.float32, "computes in float32, got float64"),
            (images, torch.float64, "computes in float32, got float64"),
            (needs_grad, torch.float32, "is not differentiable"),
            (huge, torch.float32, "less than 2³¹"),
        ):
            assert words in triton.refusal(refused, recipe, dtype)


@pytest.mark.skipif(INTERPRETED, reason="nothing is run here")
def test_without_triton(monkeypatch):
    from contrastive_kit import _gpu

    monkeypatch.setattr(_gpu, "_MISSING", _gpu.missing_package("no_such_module"))
    with FakeTensorMode():
        name, refusals = SimCLRAugment(8).which_backend(torch.empty(2, 3, 9, 9, device="cuda"))
    assert name == "torch"
    assert refusals["triton"] == "it needs the package triton, which is not installed"


@pytest.mark.skipif(INTERPRETED, reason="nothing is run here")
@pytest.mark.parametrize(
    ("hip", "properties", "reason"),
    [
        (None, ("Tesla V100", 7, 0, ""), None),
        (
            None,
            ("Tesla P100", 6, 0, ""),
            "it needs compute capability 7.0 or higher, Tesla P100 has 6.0",
        ),
        ("6.4", ("Instinct MI300X", 9, 4, "gfx942:sramecc+:xnack-"), None),
        (
            "6.4",
            ("Radeon VII", 9, 0, "gfx906"),
            "it needs one of gfx90a, gfx942, gfx950, Radeon VII is gfx906",
        ),
    ],
)
def test_an_old_card_falls_back_before_a_kernel_fails(hip, properties, reason, monkeypatch):
    card = dict(zip(("name", "major", "minor", "gcnArchName"), properties, strict=True))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**card))
    with FakeTensorMode():
        name, refusals = SimCLRAugment(8).which_backend(torch.empty(2, 3, 9, 9, device="cuda"))
    assert name == ("triton" if reason is None else "torch")
    assert refusals.get("triton") == reason


@pytest.mark.skipif(INTERPRETED, reason="nothing is run here")
def test_views_on_the_cpu_do_not_import_triton():
    code = (
        "import sys, torch, contrastive_kit.augment as a; from contrastive_kit import "
        "SimCLRAugment as S; before = 'triton' in sys.modules; S(8)(torch.rand(2, 3, 9, 9));"
        "assert not before and 'contrastive_kit.augment.backends.triton_kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
