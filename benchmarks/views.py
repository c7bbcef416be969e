"""What SimCLR's two views of an image cost, against other libraries.

Every library runs the same list of operations with the same probabilities on the same uint8
images. They do not do the same work: the report says what each leaves out.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import targets
from benchmarks.harness import plan, report
from benchmarks.harness.device import Device
from benchmarks.harness.measure import ratios, spread
from benchmarks.harness.report import NONE, Results, percent, table
from benchmarks.harness.store import Store, Trial
from benchmarks.losses.oracle import Disagreement
from contrastive_kit import SimCLRAugment

OURS = "SimCLRAugment, uint8"
KORNIA, RESAMPLED = "Kornia, uint8", "Kornia, crop by resampling"
COPY = "copy"

# A level of uint8, amplified a little: a crop may round to the neighboring level.
_MEAN_DIFFERENCE = 5e-3


class Case(NamedTuple):
    """uint8 images of a size, made into two views each of another."""

    source: int
    size: int
    batch: int = 64
    budget_s: float = 20.0
    threads: int | None = None  # of the process, see ``Environment``
    allocator: str = "default"
    compiled: bool = False  # whether arms that compile take part

    @property
    def kernel(self) -> int:
        """Taps of the blur; 0 where the recipe has none."""
        return self.size // 10 // 2 * 2 + 1 if self.size >= 64 else 0


cases = partial(plan.read, Case, "views")


class Prepared(NamedTuple):
    """What is timed, and how many images it makes two views of.

    ``judged`` goes from a drawn table to views that must equal the exact ones; without it the views
    are random and only need to be plausible.
    """

    call: Callable[[], Any]
    images: int
    judged: Callable[[Tensor], Tensor] | None = None


class Inputs(NamedTuple):
    """What an arm is built for; ``few`` are images for those that take them one by one."""

    case: Case
    images: Tensor
    few: Tensor
    device: Device


class Arm(NamedTuple):
    note: str
    build: Callable[[Inputs], Prepared]  # raises ImportError where it is not installed
    kinds: tuple[str, ...] = ("cpu",)
    compiled: bool = False  # whether its first call at a size compiles for that size


def _ours(of: Inputs, *, floats: bool = False, **options: Any) -> Prepared:
    images = of.images.float() / 255 if floats else of.images
    augment = SimCLRAugment(of.case.size, **options)
    exact = partial(augment, images, concat=True)
    return Prepared(partial(augment, images), of.case.batch, lambda drawn: exact(params=drawn))


def _graph(of: Inputs) -> Prepared:
    augment = SimCLRAugment(of.case.size)
    drawn = augment.draw(of.images).to(of.device.device)
    replay, result = of.device.graphed(partial(augment, of.images, params=drawn, concat=True))

    def judged(other: Tensor) -> Tensor:
        drawn.copy_(other)
        replay()
        views: Tensor = result
        return views

    return Prepared(replay, of.case.batch, judged)


def _kornia(of: Inputs, *, floats: bool = False, compiled: bool = False, **crop: str) -> Prepared:
    import kornia.augmentation as K

    case, k = of.case, of.case.kernel
    pipeline = K.AugmentationSequential(
        K.RandomResizedCrop((case.size,) * 2, scale=(0.08, 1.0), **crop),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        *([K.RandomGaussianBlur((k, k), (0.1, 2.0), p=0.5)] if k else []),
        data_keys=["input"],
    )
    transform = torch.compile(pipeline) if compiled else pipeline
    given = of.images.float() / 255 if floats else of.images

    def call() -> list[Tensor]:
        return [transform(given if floats else given.float() / 255) for _ in range(2)]

    return Prepared(call, case.batch)


def _one_by_one(transform: Callable[[Any], Tensor], items: Any) -> Prepared:
    return Prepared(
        lambda: [torch.stack([transform(item) for item in items]) for _ in range(2)], len(items)
    )


def _torchvision(of: Inputs, *, pil: bool) -> Prepared:
    from torchvision.transforms import v2

    k = of.case.kernel
    transform = v2.Compose(
        [
            v2.RandomResizedCrop((of.case.size,) * 2, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            *([v2.RandomApply([v2.GaussianBlur(k, (0.1, 2.0))], 0.5)] if k else []),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    return _one_by_one(transform, _pil(of.few) if pil else of.few)


def _pil(images: Tensor) -> list[Any]:
    from torchvision.transforms.functional import to_pil_image

    return [to_pil_image(image) for image in images]


def _lightly(of: Inputs) -> Prepared:
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(
        input_size=of.case.size,
        cj_strength=1.0,
        gaussian_blur=0.5 if of.case.kernel else 0.0,
        sigmas=(0.1, 2.0),
        normalize=None,
    )
    images = _pil(of.few)

    def call() -> list[Tensor]:
        pairs = [transform(image) for image in images]
        return [torch.stack(views) for views in zip(*pairs, strict=True)]

    return Prepared(call, len(images))


def _albumentations(of: Inputs) -> Prepared:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations as A
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    k, by = of.case.kernel, (0.2, 1.8)
    pipeline = A.Compose(
        [
            A.RandomResizedCrop((of.case.size,) * 2, scale=(0.08, 1.0)),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(brightness=by, contrast=by, saturation=by, hue=(-0.2, 0.2), p=0.8),
            A.ToGray(p=0.2),
            *([A.GaussianBlur((k, k), (0.1, 2.0), p=0.5)] if k else []),
        ]
    )

    def transform(array: Any) -> Tensor:
        view = torch.from_numpy(pipeline(image=array)["image"])
        return view.permute(2, 0, 1).float().div_(255)

    return _one_by_one(transform, [x.permute(1, 2, 0).contiguous().numpy() for x in of.few])


_BOTH, _GPU = ("cpu", "cuda"), ("cuda",)
_BY_IMAGE = "image by image, 8-bit rounding after each operation"

ARMS = {
    OURS: Arm("antialiased, per-sample order, exact", _ours, _BOTH),
    "SimCLRAugment, float32": Arm(
        "the same from floats: the antialias reads every pixel of the crop",
        partial(_ours, floats=True), _BOTH,
    ),
    "SimCLRAugment, torch": Arm(
        "the same as the first with batched torch operations", partial(_ours, backend="torch"), _GPU
    ),
    "SimCLRAugment, float16 views": Arm(
        "the same as the first, views in float16", partial(_ours, dtype=torch.float16), _GPU
    ),
    "SimCLRAugment, CUDA graph of one drawn table": Arm(
        "the same as the first without drawing and sending the parameters", _graph, _GPU
    ),
    KORNIA: Arm("no antialias, one order of the color operations a batch", _kornia, _BOTH),
    "Kornia, float32": Arm(
        "the same, conversion to floats not counted", partial(_kornia, floats=True), _BOTH
    ),
    "Kornia compiled, uint8": Arm(
        "the same under torch.compile, warm", partial(_kornia, compiled=True), compiled=True
    ),
    RESAMPLED: Arm(
        'as the first of Kornia with `cropping_mode="resample"`: the default crops image by image',
        partial(_kornia, cropping_mode="resample"), _GPU,
    ),
    "torchvision v2, uint8 tensor": Arm(_BY_IMAGE, partial(_torchvision, pil=False)),
    "torchvision v2, PIL": Arm(_BY_IMAGE, partial(_torchvision, pil=True)),
    "lightly, PIL": Arm("image by image, blur approximated by boxes", _lightly),
    "albumentations, numpy": Arm("image by image, no antialias, 8-bit tables", _albumentations),
}  # fmt: skip


def arms_of(case: Case, kind: str) -> list[str]:
    """Names of those that take part in a case on a kind of device."""
    return [n for n, a in ARMS.items() if kind in a.kinds and (case.compiled or not a.compiled)]


def inputs(case: Case, device: Device) -> Inputs:
    torch.manual_seed(0)
    shape = (case.batch, 3, case.source, case.source)
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, device=device.device)
    images = torch.nn.functional.avg_pool2d(noise.float(), 5, 1, 2).byte()
    return Inputs(case, images, images[: max(4, case.batch // 8)], device)


def measure(case: Case, store: Store, device: Device) -> dict[str, Any]:
    """Check every arm, then time those that make plausible views, interleaved."""
    of = inputs(case, device)
    exact = SimCLRAugment(case.size, backend="torch", dtype=torch.float64)
    drawn = exact.draw(of.images)
    expected = exact(of.images, params=drawn, concat=True)
    name, refusals = SimCLRAugment(case.size).which_backend(of.images)
    trial = Trial(case, store, device)
    trial.result["backend"] = {"name": name, "refusal": refusals.get("triton", "")}

    def prepare(name: str) -> Prepared:
        arm = ARMS[name].build(of)
        check(arm, drawn, expected)
        trial.observe(name, arm.call)
        return arm

    arms = {
        name: prepared
        for name in arms_of(case, device.kind)
        if (prepared := trial.run(name, partial(prepare, name))) is not None
    }
    calls = {name: arm.call for name, arm in arms.items()}
    if device.kind == "cuda":
        calls[COPY], copied_bytes = device.copy()
    samples = trial.time(
        "timing", calls, budget_s=case.budget_s, min_rounds=7 if device.on_gpu else 5
    )
    if COPY in samples:
        # Each image read once, each of its two views written once.
        n_bytes = 3 * case.source**2 / 2 + 3 * case.size**2 * 4
        trial.result["roofline_s"] = [n_bytes * s / copied_bytes for s in samples.pop(COPY)]
    trial.result["seconds_per_view"] = {
        name: [s / (2 * arms[name].images) for s in values] for name, values in samples.items()
    }
    return trial.outcome(OURS)


def check(arm: Prepared, drawn: Tensor, expected: Tensor) -> None:
    """Raise ``Disagreement`` unless the views are exact, or plausible where they are random."""
    if arm.judged is not None:
        mean = float((arm.judged(drawn) - expected).abs().mean())
        if not mean <= _MEAN_DIFFERENCE:
            message = f"views are off by {mean:.1e} in the mean, over {_MEAN_DIFFERENCE:.0e}"
            raise Disagreement(message)
        return
    views = torch.cat(arm.call())
    shape = (2 * arm.images, *expected.shape[1:])
    if views.shape != shape:
        raise Disagreement(f"views of shape {tuple(views.shape)}, not {shape}")
    # Brightness alone moves the mean of one view by 0.2.
    tolerance = len(views) ** -0.5
    for name, statistic in (("mean", torch.mean), ("standard deviation", torch.std)):
        theirs, ours = float(statistic(views)), float(statistic(expected))
        if not abs(theirs - ours) <= tolerance:
            raise Disagreement(f"the {name} of the pixels is {theirs:.3f}, not near {ours:.3f}")


def markdown(results: Results) -> str:
    cases, dry, on_gpu = results["cases"], results["dry"], report.on_gpu(results)
    sizes = {"": [_title(c) for c in cases]}
    parts = {
        **results,
        "launches": report.by_arm(cases, "launches", report.counts, sizes, dry),
        "memory": report.by_arm(cases, "memory", report.mib, sizes, dry),
        "slower": list(_slower(cases)),
        "not_measured": report.not_measured(
            cases, lambda _: "", lambda of: ", ".join(dict.fromkeys(map(_title, of)))
        ),
        "arms": ARMS,
        "times": _times,
        "kind": "cuda" if on_gpu else "cpu",
    }
    if on_gpu:
        samples = {_title(c): c["seconds_per_view"] for c in cases}
        parts["targets"] = list(targets.views_on_gpu(samples, OURS, (KORNIA, RESAMPLED)))
        return report.page("views_gpu", **parts, title=_title, roofline=_roofline)
    groups = defaultdict(list)
    for c in cases:
        groups[c["case"]["threads"], c["case"]["allocator"]].append(c)
    of_one_thread = {
        allocator: {_title(c): c["seconds_per_view"] for c in group}
        for (threads, allocator), group in groups.items()
        if threads == 1
    }
    parts["targets"] = targets.views_on_cpu(of_one_thread, OURS)
    return report.page("views_cpu", **parts, groups=groups)


def _title(c: Results) -> str:
    size = f"{c['case']['source']} → {c['case']['size']}"
    return size if c["case"]["threads"] else f"{size}, {c['case']['batch']} images"


def _roofline(c: Results) -> str:
    ours, roofline = c["seconds_per_view"].get(OURS), c.get("roofline_s")
    return percent(spread(ratios(roofline, ours))) if ours and roofline else NONE


def _times(cases: list[Results], dry: bool) -> str:
    arms = [name for name in ARMS if any(name in c["seconds_per_view"] for c in cases)]
    rows = [[name, *(_cell(c, name) for c in cases)] for name in arms]
    return table(["", *map(_title, cases)], rows, dry)


def _cell(c: Results, name: str) -> str:
    """Microseconds per view on a CPU, views per second on a GPU."""
    samples = c["seconds_per_view"]
    if name not in samples:
        return ""
    on_cpu = c["case"]["threads"]
    figures = [1e6 * s if on_cpu else 1 / s for s in samples[name]]
    q1, q2, q3 = (f"{q:.0f}" if on_cpu else f"{q:,.0f}" for q in quantiles(figures, n=4))
    text = f"{q2} ({q1}–{q3})"
    if name == OURS or OURS not in samples:
        return text
    return f"{text} [{median(ratios(samples[name], samples[OURS])):.2f}]"


def _slower(cases: list[Results]) -> Iterator[str]:
    for c in cases:
        samples, threads = c["seconds_per_view"], c["case"]["threads"]
        where = f", {threads} thread(s), {c['case']['allocator']} allocator" if threads else ""
        for name in samples:
            if not name.startswith("SimCLR") and OURS in samples:
                ratio = median(ratios(samples[name], samples[OURS]))
                if ratio < 1:
                    yield f"{_title(c)}{where}: {name} takes {ratio:.2f} of the time"
