"""The targets set before anything was measured, each with what was measured for it."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import median
from typing import Any, NamedTuple

from benchmarks.harness.measure import ratios, spread
from benchmarks.harness.report import Results, of_kind, percent, table, times
from benchmarks.losses import arms
from benchmarks.losses.arms import BOTH, COMPILED, EAGER, GRAPH, OURS

# On a CPU: how many times ours the peers should take, of NT-Xent, N = 4096, D = 128.
LOSS_CPU = {"lightly": 8, EAGER: 4, COMPILED: 2.3}
# On a GPU, in bfloat16: of eager and of compiled eager, by dimension.
LOSS_GPU = {128: (9, 3.2), 512: (4.7, 2.2), 2048: (2.1, 1.4)}
# How many times ours Kornia should take, and torchvision at every size.
VIEWS_CPU = {"32 → 32": 2.7, "256 → 96": 4.0, "256 → 224": 7.0}
TORCHVISION = 4.0
VIEWS_GPU = {"256 → 224, 256 images": 15, "96 → 96, 256 images": 10, "32 → 32, 256 images": 10}
VIEWS_PER_SECOND = 1e6
# The recipe of 100 epochs on a GPU.
CIFAR10 = {"kNN": "≥ 0.825", "linear probe": "≥ 0.85", "minutes": "≤ 6"}


class Target(NamedTuple):
    """A row of the report; ``met`` is None where nothing was measured."""

    what: str
    target: str
    measured: str = "not measured"
    met: bool | None = None


def judge(
    what: str, target: str, found: Iterable[Any], form: Callable[[Any], str] = "{:.2f}".format
) -> Target:
    """The worst of what was found, numbers or spreads, against "≥ …" or "≤ …".

    Each may come as a pair with the place where it was found.
    """

    def value(one: Any) -> float:
        one = one[0] if isinstance(one, tuple) else one
        return float(one["median"] if isinstance(one, dict) else one)

    at_least = target.startswith("≥")
    worst = (min if at_least else max)(found, key=value, default=None)
    if worst is None:
        return Target(what, target)
    limit = float(re.sub(r"[^\d.]", "", target)) / (100 if "%" in target else 1)
    met = value(worst) >= limit if at_least else value(worst) <= limit
    figure, where = worst if isinstance(worst, tuple) else (worst, "")
    return Target(what, target, form(figure) + where, met)


def gradient_budget(temperature: float) -> float:
    """The relative error that a gradient may have in float32."""
    return max(1e-6, 2e-7 / temperature)


def _accuracy(results: Results) -> Iterator[Target]:
    rows = of_kind(results, "seeds")
    used = [
        c[OURS]["gradient"]["largest"] / gradient_budget(c["case"]["temperature"]) for c in rows
    ]
    against = [c[OURS]["gradient"]["median"] / c[EAGER]["gradient"]["median"] for c in rows]
    error = "Gradient error in float32 over"
    yield judge(f"{error} max(1e-6, 2e-7 / τ), largest over τ", "≤ 1", used)
    yield judge(f"{error} that of eager, largest over τ", "≤ 1", against)


def nt_xent_cases(results: Results, **settings: Any) -> list[Results]:
    """Those of NT-Xent with these settings, at the temperature that has targets."""
    wanted = {"subject": "nt_xent", "temperature": 0.1, **settings}
    return [c for c in results["cases"] if wanted.items() <= c["case"].items()]


def ratios_of(
    cases: list[Results], group: str, name: str, place: str = " at N = {n}, D = {d}"
) -> list[tuple[Any, str]]:
    """A ratio of forward+backward in each case that has it, and where that is."""
    timed = [(c["times"].get(BOTH, {}).get(group, {}), c["case"]) for c in cases]
    return [(found[name], place.format(**case)) for found, case in timed if name in found]


def _extra_mib(cases: list[Results]) -> dict[int, float]:
    found = [(c["case"]["n"], c["memory"][OURS]) for c in cases if OURS in c["memory"]]
    return {n: memory["extra_mib"] for n, memory in found}


def losses_on_cpu(results: Results) -> Iterator[Target]:
    """Of the losses on a CPU, in float32."""
    where = f"NT-Xent {BOTH}, N = 4096, D = 128"
    sized = nt_xent_cases(results, n=4096, d=128, allocator="default")
    for peer, target in LOSS_CPU.items():
        found = ratios_of(sized, "times_ours", peer, place="")
        yield judge(f"{where}, against {peer}", f"≥ {target}×", found, times)
    rate = ratios_of(sized, "fractions", arms.GEMM_OF_LOGITS, place="")
    what = f"{where}, rate on 4·(2N)²·D flops over that of {arms.GEMM_OF_LOGITS}"
    yield judge(what, "≥ 80 %", rate, percent)
    extra = _extra_mib(nt_xent_cases(results, d=128))
    largest = [extra[8192]] if 8192 in extra else []
    yield judge("Extra memory, N = 8192, D = 128", "≤ 96 MiB", largest, "{:.0f} MiB".format)
    growth = [extra[8192] / extra[4096]] if {4096, 8192} <= set(extra) else []
    yield judge("Extra memory, N = 8192 over N = 4096", "≤ 2.2", growth)
    yield from _accuracy(results)


def losses_on_gpu(results: Results) -> Iterator[Target]:
    """Of the losses on a GPU, in bfloat16; over several sizes the worst one counts."""
    cases = nt_xent_cases(results, precision="bf16")
    large = [c for c in cases if c["case"]["n"] >= 4096]
    small = [c for c in cases if c["case"]["n"] <= 512]
    nt_xent = f"NT-Xent {BOTH}"
    for d, limits in LOSS_GPU.items():
        of_d = [c for c in large if c["case"]["d"] == d]
        for peer, target in zip((EAGER, COMPILED), limits, strict=True):
            what = f"{nt_xent}, bf16, N ≥ 4096, D = {d}, against {peer}"
            yield judge(what, f"≥ {target}×", ratios_of(of_d, "times_ours", peer), times)
    what = f"{nt_xent}, bf16, N ≥ 4096, D ≥ 512: rate on 4·(2N)²·D flops over that of GEMM"
    wide = [c for c in large if c["case"]["d"] >= 512]
    yield judge(what, "≥ 65 %", ratios_of(wide, "fractions", arms.GEMM), percent)
    launches = [sum(c["launches"][OURS].values()) for c in small if c["launches"].get(OURS)]
    # Five are ours; autograd fills the gradient of the loss with a one.
    yield judge(f"Kernel launches, {nt_xent}, N ≤ 512", "≤ 6", launches, str)
    for peer in dict.fromkeys(name for c in small for name in c["times"][BOTH]["times_ours"]):
        if peer != arms.TILED:
            what = f"{nt_xent}, bf16, N ≤ 512, against {peer}"
            yield judge(what, "≥ 1×", ratios_of(small, "times_ours", peer), times)
    graphs = [OURS in c["times"][GRAPH]["milliseconds"] for c in small if GRAPH in c["times"]]
    captured = (f"{sum(graphs)} of {len(graphs)} sizes", all(graphs)) if graphs else ()
    yield Target(f"{nt_xent}, N ≤ 512, in a CUDA graph", "captured", *captured)
    extra = _extra_mib(nt_xent_cases(results, precision="bf16", n=65536, d=128))
    what = "MiB beyond the inputs, NT-Xent, N = 65,536, D = 128"
    yield judge(what, "≤ 1024", extra.values(), "{:.0f}".format)
    yield from _accuracy(results)


def views_on_cpu(measured: Mapping[str, Results], ours: str) -> str:
    """The table of the views, by allocator and size of one thread."""
    wanted = [("Kornia, uint8", size, target) for size, target in VIEWS_CPU.items()]
    wanted += [
        (name, size, TORCHVISION)
        for size in measured.get("tuned", {})
        for name in ("torchvision v2, uint8 tensor", "torchvision v2, PIL")
    ]
    rows = []
    for name, size, target in wanted:
        cells = [f"{name}, {size}", f"≥ {target:.1f}"]
        for samples in (sizes.get(size, {}) for sizes in measured.values()):
            if {name, ours} <= set(samples):
                ratio = median(ratios(samples[name], samples[ours]))
                cells.append(f"{ratio:.2f}, {'met' if ratio >= target else '**missed**'}")
            else:
                cells.append("not measured")
        rows.append(cells)
    return table(["", "target", *(f"{name} allocator" for name in measured)], rows)


def views_on_gpu(measured: Results, ours: str, kornias: Iterable[str]) -> Iterator[Target]:
    """Of the views by size, 256 images, against the faster of Kornia's two crops."""
    for size, target in VIEWS_GPU.items():
        samples = measured.get(size, {})
        peers = [samples[k] for k in kornias if {k, ours} <= set(samples)]
        found = [spread(ratios(peer, samples[ours])) for peer in peers]
        yield judge(f"{size}, against Kornia", f"≥ {target}×", found, times)
    samples = measured.get("256 → 224, 256 images", {}).get(ours)
    rate = [median(1 / s for s in samples)] if samples else []
    target = f"≥ {VIEWS_PER_SECOND:,.0f}"
    yield judge("256 → 224, 256 images: views/s", target, rate, "{:,.0f}".format)
