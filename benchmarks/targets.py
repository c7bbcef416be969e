"""The targets set before anything was measured, each with what was measured for it."""

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from benchmarks.harness.measure import ratios, spread
from benchmarks.harness.report import DRY, Results, of_kind, percent, table, times
from benchmarks.losses.arms import COMPILED, EAGER, OURS, TILED
from benchmarks.losses.bench import BOTH, GEMM, GEMM_OF_LOGITS, GRAPH

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
CIFAR10 = {"kNN": 0.825, "linear probe": 0.85, "minutes": 6.0}
ON_GPU = "Set for an H200 before anything was measured."


class Target(NamedTuple):
    """A row of the report; ``met`` is None where nothing was measured."""

    what: str
    target: str
    measured: str = "not measured"
    met: bool | None = None


def targets(rows: Iterable[Target], dry: bool = False) -> str:
    """The table."""
    words = {True: "yes", False: "**no**", None: ""}
    cells = [
        (t.what, t.target, DRY if dry else t.measured, "" if dry else words[t.met]) for t in rows
    ]
    return table(["what", "target", "measured", "met"], cells, dry)


def gradient_budget(temperature: float) -> float:
    """The relative error that a gradient may have in float32."""
    return max(1e-6, 2e-7 / temperature)


def _at_most(what: str, target: str, value: float | None, limit: float, form: str) -> Target:
    if value is None:
        return Target(what, target)
    return Target(what, target, form.format(value), value <= limit)


def _accuracy(results: Results) -> Iterator[Target]:
    """Of the gradient in float32, against its budget and against eager, over temperatures."""
    rows = of_kind(results, "seeds")
    used = [
        c[OURS]["gradient"]["largest"] / gradient_budget(c["case"]["temperature"]) for c in rows
    ]
    against = [c[OURS]["gradient"]["median"] / c[EAGER]["gradient"]["median"] for c in rows]
    for what, values in (("max(1e-6, 2e-7 / τ)", used), ("that of eager", against)):
        what = f"Gradient error in float32 over {what}, largest over τ"
        yield _at_most(what, "≤ 1", max(values, default=None), 1, "{:.2f}")


def cpu_case(results: Results, allocator: str) -> Results | None:
    """What was measured of the losses at the size that has targets on a CPU."""
    wanted = {"subject": "nt_xent", "n": 4096, "d": 128, "temperature": 0.1, "allocator": allocator}
    for c in of_kind(results, "subject"):
        if wanted.items() <= c["case"].items() and BOTH in c["times"]:
            timed: Results = c["times"][BOTH]
            return timed
    return None


def losses_on_cpu(results: Results) -> Iterator[Target]:
    """Of the losses on a CPU, in float32."""
    where = f"NT-Xent {BOTH}, N = 4096, D = 128"
    timed = cpu_case(results, "default") or {"times_ours": {}, "fractions": {}}
    for peer, target in LOSS_CPU.items():
        ratio = timed["times_ours"].get(peer)
        what = f"{where}, against {peer}"
        yield _at_least(what, f"≥ {target}×", ratio, target, times)
    what = f"{where}, rate on 4·(2N)²·D flops over that of {GEMM_OF_LOGITS}"
    yield _at_least(what, "≥ 80 %", timed["fractions"].get(GEMM_OF_LOGITS), 0.8, percent)
    extra = {
        c["case"]["n"]: c["memory"][OURS]["extra_mib"]
        for c in of_kind(results, "subject")
        if OURS in c["memory"]
    }
    largest, half = extra.get(8192), extra.get(4096)
    yield _at_most("Extra memory, N = 8192, D = 128", "≤ 96 MiB", largest, 96, "{:.0f} MiB")
    growth = largest / half if largest and half else None
    yield _at_most("Extra memory, N = 8192 over N = 4096", "≤ 2.2", growth, 2.2, "{:.2f}")
    yield from _accuracy(results)


def _at_least(
    what: str,
    target: str,
    found: dict[str, float] | None,
    limit: float,
    form: Callable[[dict[str, float]], str],
    where: str = "",
) -> Target:
    if not found:
        return Target(what, target)
    return Target(what, target, form(found) + where, found["median"] >= limit)


def losses_on_gpu(results: Results) -> Iterator[Target]:
    """Of the losses on a GPU, in bfloat16; over several sizes the worst one counts."""
    cases = [
        c
        for c in of_kind(results, "subject")
        if (c["case"]["subject"], c["case"]["precision"], c["case"]["temperature"])
        == ("nt_xent", "bf16", 0.1)
    ]
    large = [c for c in cases if c["case"]["n"] >= 4096]
    small = [c for c in cases if c["case"]["n"] <= 512]
    nt_xent = f"NT-Xent {BOTH}"
    for d, limits in LOSS_GPU.items():
        of_d = [c for c in large if c["case"]["d"] == d]
        for peer, target in zip((EAGER, COMPILED), limits, strict=True):
            what = f"{nt_xent}, bf16, N ≥ 4096, D = {d}, against {peer}"
            yield _worst(what, f"≥ {target}×", of_d, ("times_ours", peer), target, times)
    what = f"{nt_xent}, bf16, N ≥ 4096, D ≥ 512: rate on 4·(2N)²·D flops over that of GEMM"
    wide = [c for c in large if c["case"]["d"] >= 512]
    yield _worst(what, "≥ 65 %", wide, ("fractions", GEMM), 0.65, percent)
    launches = [sum(c["launches"][OURS].values()) for c in small if c["launches"].get(OURS)]
    most = max(launches, default=None)
    yield _at_most(f"Kernel launches, {nt_xent}, N ≤ 512", "≤ 5", most, 5, "{}")
    for peer in dict.fromkeys(name for c in small for name in c["times"][BOTH]["times_ours"]):
        if peer != TILED:
            what = f"{nt_xent}, bf16, N ≤ 512, against {peer}"
            yield _worst(what, "≥ 1×", small, ("times_ours", peer), 1, times)
    graphs = [c["times"][GRAPH]["milliseconds"] for c in small if GRAPH in c["times"]]
    captured = sum(OURS in graph for graph in graphs)
    found = (f"{captured} of {len(graphs)} sizes", captured == len(graphs)) if graphs else ()
    yield Target(f"{nt_xent}, N ≤ 512, in a CUDA graph", "captured", *found)
    extra = [
        c["memory"][OURS]["extra_mib"]
        for c in cases
        if (c["case"]["n"], c["case"]["d"]) == (65536, 128) and OURS in c["memory"]
    ]
    what = "MiB beyond the inputs, NT-Xent, N = 65,536, D = 128"
    yield _at_most(what, "≤ 1024", extra[0] if extra else None, 1024, "{:.0f}")
    yield from _accuracy(results)


def _worst(
    what: str,
    target: str,
    cases: list[Results],
    keys: tuple[str, str],
    limit: float,
    form: Callable[[dict[str, float]], str],
) -> Target:
    """The smallest of a figure over several sizes, and where that is."""
    group, name = keys
    found = [
        (c["times"][BOTH][group][name], c["case"]) for c in cases if name in c["times"][BOTH][group]
    ]
    if not found:
        return Target(what, target)
    smallest, case = min(found, key=lambda pair: pair[0]["median"])
    where = f" at N = {case['n']}, D = {case['d']}"
    return _at_least(what, target, smallest, limit, form, where)


def views_on_cpu(measured: dict[str, dict[str, Any]], ours: str) -> str:
    """The table of the views, by allocator and size of one thread."""
    wanted = [(size, "Kornia, uint8", target) for size, target in VIEWS_CPU.items()]
    wanted += [
        (size, name, TORCHVISION)
        for size in measured.get("tuned", {})
        for name in ("torchvision v2, uint8 tensor", "torchvision v2, PIL")
    ]
    rows = []
    for size, name, target in wanted:
        cells = [f"{name}, {size}", f"≥ {target:.1f}"]
        for samples in measured.values():
            found = samples.get(size, {})
            if name not in found or ours not in found:
                cells.append("not measured")
                continue
            ratio = statistics.median(ratios(found[name], found[ours]))
            cells.append(f"{ratio:.2f}, {'met' if ratio >= target else '**missed**'}")
        rows.append(cells)
    return table(["", "target", *(f"{name} allocator" for name in measured)], rows)


def views_on_gpu(measured: dict[str, Any], ours: str, kornias: Iterable[str]) -> Iterator[Target]:
    """Of the views by size, 256 images, against the faster of Kornia's two crops."""
    for size, target in VIEWS_GPU.items():
        samples = measured.get(size, {})
        found = [spread(ratios(samples[k], samples[ours])) for k in kornias if k in samples]
        ratio = min(found, key=lambda s: s["median"], default=None)
        what = f"{size}, against Kornia"
        yield _at_least(what, f"≥ {target}×", ratio, target, times)
    samples = measured.get("256 → 224, 256 images", {})
    rate = spread([1 / s for s in samples[ours]]) if ours in samples else None
    what, target = "256 → 224, 256 images: views/s", f"≥ {VIEWS_PER_SECOND:,.0f}"
    yield _at_least(what, target, rate, VIEWS_PER_SECOND, lambda s: f"{s['median']:,.0f}")
