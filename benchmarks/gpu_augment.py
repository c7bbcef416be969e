"""Views per second of SimCLR's augmentation on a GPU: the stage ``augment``."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_device import COPY, Call, Device, breaks_the_device
from benchmarks.gpu_loss import reason_of
from benchmarks.gpu_store import DeviceBroken, Store
from benchmarks.interleaved import spread, time_survivors
from benchmarks.parity import Disagreement
from contrastive_kit import SimCLRAugment

OURS = "SimCLRAugment"
TORCH = "SimCLRAugment, torch"
HALF = "SimCLRAugment, float16 views"
GRAPH = "SimCLRAugment, CUDA graph of one drawn table"
KORNIA, KORNIA_RESAMPLE = "Kornia", "Kornia, crop by resampling"

NOTES = {
    OURS: "antialiased, per-sample order of the colours, exact; both views in one call",
    TORCH: "the same with batched torch operations",
    HALF: "the same as the first, views in float16",
    GRAPH: "the same as the first without drawing and sending the parameters",
    KORNIA: "uint8 to float, then its pipeline once for each view: no antialias, one order of the "
    "colours a batch; crops image by image, as is its default",
    KORNIA_RESAMPLE: 'the same with `cropping_mode="resample"`',
}

# A level of uint8, amplified a little.
_MEAN_DIFFERENCE = 5e-3


class Case(NamedTuple):
    """uint8 images of a size, made into two views each of another."""

    source: int
    size: int
    batch: int


def cases(dry: bool) -> list[Case]:
    """Sizes with a target first."""
    if dry:
        return [Case(16, 12, 4)]
    sizes = ((256, 224), (32, 32), (96, 96), (256, 96), (256, 32))
    return [Case(*size, 256) for size in sizes] + [Case(32, 32, 2048), Case(256, 224, 1024)]


def run(store: Store, device: Device) -> None:
    """Measure the cases that are missing.

    Raises:
        OutOfTime: when the next case would not fit; what is measured is kept.
        DeviceBroken: if an arm left the device unusable.
    """
    for case in cases(device.dry):
        if store.has(case._asdict()):
            continue
        store.check_time()
        print(f"{store.left_s():4.0f} s left: {case}", flush=True)
        start = time.monotonic()
        result = measure(case, store, device)
        store.add(case._asdict(), result, time.monotonic() - start)
        device.free()
    store.finish()


def measure(case: Case, store: Store, device: Device) -> dict[str, Any]:
    """Check every arm, then time those that make plausible views, interleaved."""
    images = _images(case, device)
    result: dict[str, Any] = {"absent": {}, "extra_mib": {}, "launches": {}}
    ours = SimCLRAugment(case.size, blur=case.size >= 64)
    table = ours.draw(images)
    result["backend"] = _backend(ours, images)
    expected = SimCLRAugment(case.size, blur=case.size >= 64, backend="torch", dtype=torch.float64)(
        images, params=table, concat=True
    )
    arms: dict[str, Call] = {}
    for name, build in _arms(case, images, device).items():
        if store.broke(case._asdict(), name):
            result["absent"][name] = "broke the device, crashed or hung in this case"
            continue
        try:
            with store.running(case._asdict(), name):
                arm, judge = build(table)
                judge(expected)
                result["extra_mib"][name] = device.extra_mib(arm)
                result["launches"][name] = device.launches(arm)
            arms[name] = arm
        except DeviceBroken:
            raise
        except Exception as error:  # a peer may fail in any way: its row says how
            result["absent"][name] = reason_of(error)
        device.free()
    return result | _times(case, arms, store, device, result["absent"])


def _images(case: Case, device: Device) -> Tensor:
    torch.manual_seed(0)
    shape = (case.batch, 3, case.source, case.source)
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, device=device.device)
    return torch.nn.functional.avg_pool2d(noise.float(), 5, 1, 2).byte()


def _backend(augment: SimCLRAugment, images: Tensor) -> dict[str, Any]:
    """What "auto" takes here, and why not Triton."""
    for name in ("cpu", "triton", "torch"):
        try:
            SimCLRAugment(augment.recipe.size, backend=name)(images[:1])
        except ValueError as reason:
            refusal = str(reason)
            continue
        return {"name": name, "refusal": refusal if name == "torch" else ""}
    raise RuntimeError(f"no backend runs: {refusal}")


Judge = Callable[[Tensor], None]


def _arms(
    case: Case, images: Tensor, device: Device
) -> dict[str, Callable[[Tensor], tuple[Call, Judge]]]:
    """Name to what takes a drawn table and gives the call that is timed, and its judge."""

    def exact(table: Tensor, **options: Any) -> tuple[Call, Judge]:
        augment = SimCLRAugment(case.size, blur=case.size >= 64, **options)
        judge = partial(_judge_pixels, augment, images, table)
        return partial(augment, images), judge

    def graph(table: Tensor) -> tuple[Call, Judge]:
        augment = SimCLRAugment(case.size, blur=case.size >= 64)
        on_device = table.to(device.device)
        call = partial(augment, images, params=on_device, concat=True)
        replay, result = device.graphed(call)

        def judge(expected: Tensor) -> None:
            replay()
            _judge_difference(result, expected)

        return replay, judge

    def kornia(table: Tensor, **crop: str) -> tuple[Call, Judge]:
        pipeline = _kornia(case, **crop)

        def call() -> list[Tensor]:
            return [pipeline(images.float() / 255) for _ in range(2)]

        return call, partial(_judge_statistics, call)

    return {
        OURS: exact,
        TORCH: partial(exact, backend="torch"),
        HALF: partial(exact, dtype=torch.float16),
        GRAPH: graph,
        KORNIA: kornia,
        KORNIA_RESAMPLE: partial(kornia, cropping_mode="resample"),
    }


def _kornia(case: Case, **crop: str) -> Callable[[Tensor], Tensor]:
    import kornia.augmentation as K

    size = (case.size, case.size)
    kernel = case.size // 10 // 2 * 2 + 1
    blur = [K.RandomGaussianBlur((kernel,) * 2, (0.1, 2.0), p=0.5)] if case.size >= 64 else []
    pipeline: Callable[[Tensor], Tensor] = K.AugmentationSequential(
        K.RandomResizedCrop(size, scale=(0.08, 1.0), **crop),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        *blur,
        data_keys=["input"],
    )
    return pipeline


def _judge_pixels(augment: SimCLRAugment, images: Tensor, table: Tensor, expected: Tensor) -> None:
    _judge_difference(augment(images, params=table, concat=True), expected)


def _judge_difference(actual: Tensor, expected: Tensor) -> None:
    """A crop of uint8 images may round to the neighbouring level, the colours amplify that."""
    mean = float((actual - expected).abs().mean())
    if not mean <= _MEAN_DIFFERENCE:
        raise Disagreement(f"views are off by {mean:.1e} in the mean, over {_MEAN_DIFFERENCE:.0e}")


def _judge_statistics(call: Callable[[], list[Tensor]], expected: Tensor) -> None:
    """Random views of another library: as many, as large, and about as bright."""
    views = torch.cat(call())
    if views.shape != expected.shape:
        raise Disagreement(f"views of shape {tuple(views.shape)}, not {tuple(expected.shape)}")
    # Brightness alone moves the mean of one view by 0.2.
    tolerance = len(views) ** -0.5
    for name, statistic in (("mean", torch.mean), ("standard deviation", torch.std)):
        theirs, ours = float(statistic(views)), float(statistic(expected))
        if not abs(theirs - ours) <= tolerance:
            raise Disagreement(f"the {name} of the pixels is {theirs:.3f}, not near {ours:.3f}")


def _times(
    case: Case, arms: dict[str, Call], store: Store, device: Device, absent: dict[str, str]
) -> dict[str, Any]:
    step = "timing"
    if store.broke(case._asdict(), step):
        absent[step] = "broke the device, crashed or hung"
        arms = {}
    copy, copied_bytes = device.rate_calls("fp32")[COPY]

    def failed(name: str, error: BaseException) -> None:
        if breaks_the_device(error):
            raise error
        absent[name] = reason_of(error)
        device.free()

    with store.running(case._asdict(), step):
        samples = time_survivors(
            {**arms, COPY: copy},
            failed,
            budget_s=0.0 if device.dry else 8.0,
            sample_s=0.0 if device.dry else 0.02,
            min_rounds=2 if device.dry else 7,
            seconds=device.seconds,
        )
    arms = {name: arm for name, arm in arms.items() if name in samples}
    views = 2 * case.batch
    rate = [copied_bytes / s for s in samples[COPY]]
    # Each image read once, each view written once.
    n_bytes = case.batch * 3 * case.source**2 + views * 3 * case.size**2 * 4
    ours = samples.get(OURS)
    result: dict[str, Any] = {
        "rounds": len(rate),
        "copy_rate": spread(rate)._asdict(),
        "views_per_second": {
            name: spread([views / s for s in samples[name]])._asdict() for name in arms
        },
        "milliseconds": {name: spread([1e3 * s for s in samples[name]])._asdict() for name in arms},
        "times_ours": {},
    }
    if ours is not None:
        result["times_ours"] = {
            name: spread([s / o for s, o in zip(samples[name], ours, strict=True)])._asdict()
            for name in arms
            if name != OURS
        }
        result["of_roofline"] = spread(
            [n_bytes / r / o for r, o in zip(rate, ours, strict=True)]
        )._asdict()
    return result
