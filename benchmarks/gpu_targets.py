"""The targets set before anything was measured, each with what was measured for it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import gpu_augment
from benchmarks.gpu_arms import COMPILED, EAGER, TILED
from benchmarks.gpu_loss import GRAPH
from benchmarks.loss_arms import OURS
from benchmarks.markdown import percent, times

BOTH = "forward+backward"

Results = dict[str, Any]


class Target(NamedTuple):
    """A row of the report; ``met`` is None where nothing was measured."""

    what: str
    target: str
    measured: str
    met: bool | None


def _row(what: str, target: str, measured: str = "not measured", met: bool | None = None) -> Target:
    return Target(what, target, measured, met)


def loss_targets(results: Results) -> Iterator[Target]:
    """Of the losses, for an H200 and bfloat16."""
    cases = [
        c
        for c in results["cases"]
        if (c["case"]["subject"], c["case"]["precision"], c["case"]["temperature"])
        == ("nt_xent", "bf16", 0.1)
    ]
    large = [c for c in cases if c["case"]["n"] >= 4096]
    for d, eager, compiled in ((128, 9, 3.2), (512, 4.7, 2.2), (2048, 2.1, 1.4)):
        of_d = [c for c in large if c["case"]["d"] == d]
        for peer, target in ((EAGER, eager), (COMPILED, compiled)):
            yield _smallest_ratio(
                f"NT-Xent {BOTH}, bf16, N ≥ 4096, D = {d}, against {peer}", target, of_d, peer
            )
    yield _smallest_fraction(large)
    small = [c for c in cases if c["case"]["n"] <= 512]
    yield _most_launches(small)
    yield from (
        _smallest_ratio(f"NT-Xent {BOTH}, bf16, N ≤ 512, against {peer}", 1, small, peer)
        for peer in dict.fromkeys(name for c in small for name in c["times"][BOTH]["times_ours"])
        if peer != TILED
    )
    yield _captured([c for c in small if c["case"]["graph"]])
    yield _memory(cases)


def _ratios(cases: list[Results], peer: str) -> list[tuple[dict[str, float], Results]]:
    return [
        (c["times"][BOTH]["times_ours"][peer], c["case"])
        for c in cases
        if peer in c["times"][BOTH]["times_ours"]
    ]


def _smallest_ratio(what: str, target: float, cases: list[Results], peer: str) -> Target:
    found = _ratios(cases, peer)
    if not found:
        return _row(what, f"≥ {target}×")
    ratio, case = min(found, key=lambda pair: pair[0]["median"])
    return _row(what, f"≥ {target}×", f"{times(ratio)} at {_size(case)}", ratio["median"] >= target)


def _smallest_fraction(cases: list[Results]) -> Target:
    what = f"NT-Xent {BOTH}, bf16, N ≥ 4096, D ≥ 512: rate on 4·(2N)²·D flops over that of GEMM"
    found = [
        (c["times"][BOTH]["of_gemm"], c["case"])
        for c in cases
        if c["case"]["d"] >= 512 and "of_gemm" in c["times"][BOTH]
    ]
    if not found:
        return _row(what, "≥ 65 %")
    fraction, case = min(found, key=lambda pair: pair[0]["median"])
    measured = f"{percent(fraction)} at {_size(case)}"
    return _row(what, "≥ 65 %", measured, fraction["median"] >= 0.65)


def _most_launches(cases: list[Results]) -> Target:
    what = f"Kernel launches, NT-Xent {BOTH}, N ≤ 512"
    counts = [
        c["launches"][OURS]["kernels"] + c["launches"][OURS]["copies"]
        for c in cases
        if c["launches"].get(OURS)
    ]
    if not counts:
        return _row(what, "≤ 5")
    return _row(what, "≤ 5", str(max(counts)), max(counts) <= 5)


def _captured(cases: list[Results]) -> Target:
    what = f"NT-Xent {BOTH}, N ≤ 512, in a CUDA graph"
    if not cases or cases[0]["times"].get(GRAPH) is None:
        return _row(what, "captured")
    captured = [OURS in c["times"][GRAPH]["milliseconds"] for c in cases]
    return _row(what, "captured", f"{sum(captured)} of {len(captured)} sizes", all(captured))


def _memory(cases: list[Results]) -> Target:
    what = "MiB beyond the inputs, NT-Xent, N = 65,536, D = 128"
    extra = [c["extra_mib"].get(OURS) for c in cases if _size(c["case"]) == "N = 65536, D = 128"]
    if not extra or extra[0] is None:
        return _row(what, "< 1024")
    return _row(what, "< 1024", f"{extra[0]:.0f}", extra[0] < 1024)


def _size(case: Results) -> str:
    return f"N = {case['n']}, D = {case['d']}"


def augment_targets(results: Results) -> Iterator[Target]:
    """Of the augmentation, for an H200 and 256 images; Kornia with the faster of its two crops."""
    kornias = (gpu_augment.KORNIA, gpu_augment.KORNIA_RESAMPLE)
    for source, size, target in ((256, 224, 15), (96, 96, 10), (32, 32, 10)):
        what = f"{source} → {size}, 256 images, against Kornia"
        case = next((c for c in results["cases"] if c["case"] == _views(source, size)), None)
        ratios = [case["times_ours"][k] for k in kornias if k in case["times_ours"]] if case else []
        if not ratios:
            yield _row(what, f"≥ {target}×")
            continue
        ratio = min(ratios, key=lambda spread: spread["median"])
        yield _row(what, f"≥ {target}×", times(ratio), ratio["median"] >= target)
    what = "256 → 224, 256 images: views/s"
    case = next((c for c in results["cases"] if c["case"] == _views(256, 224)), None)
    rate = case["views_per_second"].get(gpu_augment.OURS) if case else None
    if not rate:
        yield _row(what, "≥ 1,000,000")
    else:
        yield _row(what, "≥ 1,000,000", f"{rate['median']:,.0f}", rate["median"] >= 1e6)


def _views(source: int, size: int) -> dict[str, int]:
    return gpu_augment.Case(source, size, 256)._asdict()
