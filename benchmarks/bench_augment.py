"""What a view costs on a CPU, against other libraries: ``python -m benchmarks.bench_augment``.

Writes ``results/augment_cpu.json`` and, from it, ``results/augment_cpu.md``. Every library runs the
same list of operations with the same probabilities on the same uint8 images, in one process, one
sample of each a round. One process is started for each number of threads and for each of two
settings of the allocator: as it is, and told to keep freed memory, since a batch of 224-pixel
floats is large enough that the default returns it to the system at every operation.

The libraries do not do the same work: the table says what each leaves out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine

_RESULTS = machine.REPOSITORY / "benchmarks" / "results"
_KEEPS_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
_PACKAGES = ("kornia", "torchvision", "lightly", "albumentations", "pillow")

OURS = "SimCLRAugment, uint8"
NOTES = {
    OURS: "antialiased, per-sample order, exact",
    "SimCLRAugment, float32": "the same from floats: the antialias reads every pixel of the crop",
    "Kornia, uint8": "no antialias, one order of the colour operations a batch",
    "Kornia, float32": "the same, conversion to floats not counted",
    "Kornia compiled, uint8": "the same under torch.compile, warm",
    "torchvision v2, uint8 tensor": "image by image, 8-bit rounding after each operation",
    "torchvision v2, PIL": "image by image, 8-bit rounding after each operation",
    "lightly, PIL": "image by image, blur approximated by boxes",
    "albumentations, numpy": "image by image, no antialias, 8-bit tables",
}


class Case(NamedTuple):
    """A size of source images, a size of views, and how many images there are."""

    source: int
    size: int
    batch: int

    @property
    def title(self) -> str:
        return f"{self.source} → {self.size}"

    @property
    def kernel(self) -> int:
        """Taps of the blur; 0 where the recipe has none."""
        return self.size // 10 // 2 * 2 + 1 if self.size >= 64 else 0


CASES = (
    Case(32, 32, 256),
    Case(256, 32, 64),
    Case(96, 96, 64),
    Case(256, 96, 64),
    Case(256, 224, 64),
)
TARGETS = {"32 → 32": 2.7, "256 → 96": 4.0, "256 → 224": 7.0}
TORCHVISION_TARGET = 4.0


def arms(case: Case, compiled: bool) -> dict[str, tuple[Callable[[], object], int]]:
    """Name to a call that makes two views of its images, and how many images that are."""
    import kornia.augmentation as K
    import torch
    from PIL import Image
    from torchvision.transforms import v2

    from contrastive_kit import SimCLRAugment

    torch.manual_seed(0)
    images = torch.randint(0, 256, (case.batch, 3, case.source, case.source), dtype=torch.uint8)
    images = torch.nn.functional.avg_pool2d(images.float(), 5, 1, 2).byte()
    floats = images.float() / 255
    few = images[: max(4, case.batch // 8)]
    size = (case.size, case.size)

    ours = SimCLRAugment(size)
    blur = [K.RandomGaussianBlur((case.kernel,) * 2, (0.1, 2.0), p=0.5)] if case.kernel else []
    kornia = K.AugmentationSequential(
        K.RandomResizedCrop(size, scale=(0.08, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        *blur,
        data_keys=["input"],
    )
    blur = [v2.RandomApply([v2.GaussianBlur(case.kernel, (0.1, 2.0))], 0.5)] if case.kernel else []
    torchvision = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            *blur,
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in few]

    def both(transform: Callable[[Any], torch.Tensor], items: Any) -> Callable[[], object]:
        return lambda: [torch.stack([transform(item) for item in items]) for _ in range(2)]

    made: dict[str, tuple[Callable[[], object], int]] = {
        OURS: (lambda: ours(images), case.batch),
        "SimCLRAugment, float32": (lambda: ours(floats), case.batch),
        "Kornia, uint8": (lambda: [kornia(images.float() / 255) for _ in range(2)], case.batch),
        "Kornia, float32": (lambda: [kornia(floats) for _ in range(2)], case.batch),
        "torchvision v2, uint8 tensor": (both(torchvision, few), len(few)),
        "torchvision v2, PIL": (both(torchvision, pil), len(few)),
    }
    if compiled:
        fast = torch.compile(kornia)
        made["Kornia compiled, uint8"] = (
            lambda: [fast(images.float() / 255) for _ in range(2)],
            case.batch,
        )
    lightly = _lightly(case)
    if lightly is not None:
        made["lightly, PIL"] = (lambda: [lightly(image) for image in pil], len(few))
    albumentations = _albumentations(case)
    if albumentations is not None:
        arrays = [image.permute(1, 2, 0).contiguous().numpy() for image in few]
        made["albumentations, numpy"] = (both(albumentations, arrays), len(few))
    return made


def _lightly(case: Case) -> Callable[[Any], Any] | None:
    try:
        from lightly.transforms import SimCLRTransform
    except ImportError:
        return None
    transform: Callable[[Any], Any] = SimCLRTransform(
        input_size=case.size,
        cj_strength=1.0,
        gaussian_blur=0.5 if case.kernel else 0.0,
        sigmas=(0.1, 2.0),
        normalize=None,
    )
    return transform


def _albumentations(case: Case) -> Callable[[Any], Any] | None:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    try:
        import albumentations as A
    except ImportError:
        return None
    import cv2
    import torch

    cv2.setNumThreads(torch.get_num_threads())
    jitter = {"brightness": (0.2, 1.8), "contrast": (0.2, 1.8), "saturation": (0.2, 1.8)}
    blur = [A.GaussianBlur((case.kernel,) * 2, (0.1, 2.0), p=0.5)] if case.kernel else []
    pipeline = A.Compose(
        [
            A.RandomResizedCrop((case.size, case.size), scale=(0.08, 1.0)),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(**jitter, hue=(-0.2, 0.2), p=0.8),
            A.ToGray(p=0.2),
            *blur,
        ]
    )
    return lambda array: (
        torch.from_numpy(pipeline(image=array)["image"]).permute(2, 0, 1).float().div_(255)
    )


def child(out: Path, threads: int, budget_s: float, compiled: bool, quick: bool) -> None:
    """Time all cases in this process and write seconds per view, round by round."""
    import torch

    from benchmarks.interleaved import time_interleaved

    torch.set_num_threads(threads)
    results = {}
    for full in CASES:
        case = full._replace(batch=8) if quick else full
        made = arms(case, compiled)
        samples = time_interleaved(
            {name: call for name, (call, _) in made.items()},
            budget_s=budget_s,
            min_rounds=2 if quick else 5,
        )
        results[case.title] = {
            name: [seconds / (2 * made[name][1]) for seconds in samples[name]] for name in made
        }
    out.write_text(json.dumps(results))


def run(budget_s: float, compiled: bool, quick: bool) -> dict[str, Any]:
    """All processes, and what they ran on."""
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "budget_s": budget_s,
        "quick": quick,
        "runs": [],
    }
    for threads in (1,) if quick else (1, 2):
        for allocator in ("tuned",) if quick else ("default", "tuned"):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "samples.json"
                command = [sys.executable, "-m", "benchmarks.bench_augment", "--child", str(out)]
                command += ["--threads", str(threads), "--budget", str(budget_s)]
                if compiled and threads == 1 and allocator == "tuned":
                    command.append("--compiled")
                if quick:
                    command.append("--quick")
                tuned = _KEEPS_FREED_MEMORY if allocator == "tuned" else {}
                subprocess.run(
                    command,
                    cwd=machine.REPOSITORY,
                    env={**os.environ, "OMP_NUM_THREADS": str(threads), **tuned},
                    check=True,
                )
                samples = json.loads(out.read_text())
            result["runs"].append(
                {"threads": threads, "allocator": allocator, "seconds_per_view": samples}
            )
    result["load_average_after"] = round(os.getloadavg()[0], 2)
    return result


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def markdown(results: dict[str, Any]) -> str:
    """The report, all of it computed from the samples."""
    about = results["machine"]
    packages = {**about["packages"], **results["packages"]}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    lines = [
        "# What a view costs on a CPU",
        "",
        "Written by `python -m benchmarks.bench_augment`. Microseconds per view, median and",
        "quartiles over interleaved rounds of one process; in brackets how many times longer",
        f"than `{OURS}` it takes, the median of the ratios within rounds. All make two",
        "views of the same uint8 images: crop, mirror, colour jitter, grayscale, and blur from 64",
        "pixels on.",
        "",
        *(["**Quick mode: too few images and rounds to quote.**", ""] if results["quick"] else []),
        f"- {about['date']}, commit {about['commit']}"
        + (" with uncommitted changes" if about["uncommitted_changes"] else ""),
        f"- {about['processor']}, {about['cores']} cores, Python {about['python']}, {versions}",
        f"- Load average before {about['load_average']}, after {results['load_average_after']}",
    ]
    for measured in results["runs"]:
        samples = measured["seconds_per_view"]
        threads = measured["threads"]
        lines += [
            "",
            f"## {threads} thread{'s' if threads > 1 else ''}, {measured['allocator']} allocator",
            "",
            "| | " + " | ".join(samples) + " |",
            "|---|" + "---|" * len(samples),
        ]
        lines += [
            f"| {name} | " + " | ".join(_cell(samples[case], name) for case in samples) + " |"
            for name in NOTES
            if any(name in arms for arms in samples.values())
        ]
    lines += ["", "## Targets", "", "One thread; the tuned allocator keeps freed memory.", ""]
    lines += _targets(results)
    lines += ["", "## Where SimCLRAugment is slower", "", *_losses(results)]
    lines += ["", "## What each does", "", *(f"- {name}: {note}" for name, note in NOTES.items())]
    return "\n".join(lines) + "\n"


def _ratio(samples: dict[str, list[float]], name: str) -> float:
    return statistics.median(
        theirs / ours for theirs, ours in zip(samples[name], samples[OURS], strict=True)
    )


def _cell(samples: dict[str, list[float]], name: str) -> str:
    if name not in samples:
        return ""
    q1, median, q3 = (value * 1e6 for value in statistics.quantiles(samples[name], n=4))
    text = f"{median:.0f} ({q1:.0f}–{q3:.0f})"
    return text if name == OURS else f"{text} [{_ratio(samples, name):.2f}]"


def _targets(results: dict[str, Any]) -> list[str]:
    measured = {r["allocator"]: r["seconds_per_view"] for r in results["runs"] if r["threads"] == 1}
    head = "".join(f" {allocator} allocator |" for allocator in measured)
    rows = [f"| | target |{head}", f"|---|---|{'---|' * len(measured)}"]
    wanted = [(case, "Kornia, uint8", target) for case, target in TARGETS.items()]
    wanted += [
        (case, name, TORCHVISION_TARGET)
        for case in measured["tuned"]
        for name in ("torchvision v2, uint8 tensor", "torchvision v2, PIL")
    ]
    for case, name, target in wanted:
        cells = [f"{name}, {case}", f"≥ {target:.1f}"]
        for samples in measured.values():
            ratio = _ratio(samples[case], name)
            cells.append(f"{ratio:.2f}, {'met' if ratio >= target else '**missed**'}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _losses(results: dict[str, Any]) -> list[str]:
    lines = []
    for measured in results["runs"]:
        for case, samples in measured["seconds_per_view"].items():
            for name in samples:
                ratio = _ratio(samples, name)
                if name != OURS and not name.startswith("SimCLR") and ratio < 1:
                    lines.append(
                        f"- {case}, {measured['threads']} thread(s), {measured['allocator']} "
                        f"allocator: {name} takes {ratio:.2f} of the time"
                    )
    return lines or ["Nowhere in these measurements."]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of SimCLR's views on a CPU.")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per case and process")
    parser.add_argument("--no-compiled", action="store_true", help="leave compiled Kornia out")
    parser.add_argument("--quick", action="store_true", help="a minute; too little to quote")
    parser.add_argument("--out", type=Path, default=_RESULTS / "augment_cpu.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child, options.threads, options.budget, options.compiled, options.quick)
        return
    start = time.monotonic()
    results = run(options.budget, not options.no_compiled, options.quick)
    results["seconds"] = round(time.monotonic() - start, 1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
