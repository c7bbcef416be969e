"""The results of the losses as a page."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks import targets
from benchmarks.harness import report
from benchmarks.harness.report import DRY, NONE, Results, percent, table, times
from benchmarks.losses.arms import EAGER, OURS, SUBJECTS
from benchmarks.losses.bench import COPY, GEMM

_ALLOCATORS = {"default": "default allocator", "tuned": "allocator that keeps freed memory"}


def markdown(results: Results) -> str:
    """The whole report."""
    cases, dry = report.of_kind(results, "subject"), results["dry"]
    parts = {
        "about": report.about(results),
        "slower": report.listed([DRY] if dry else _slower(cases), "In no comparison above."),
        "memory": _by_arm(cases, "memory", report.mib, dry),
        "launches": _by_arm(cases, "launches", report.counts, dry),
        "errors": _by_arm(cases, "errors", lambda e: f"{e['loss']:.0e}, {e['gradient']:.0e}", dry),
        "accuracy": _accuracy(report.of_kind(results, "seeds"), dry),
        "not_measured": report.not_measured(cases, lambda c: f"{_loss(c['case'])}: ", _sizes),
    }
    if report.on_gpu(results):
        parts["targets"] = targets.targets(targets.losses_on_gpu(results), dry)
        parts["times"] = _times(sorted(cases, key=_by_size), True, dry)
        return report.page("losses_gpu", **parts)
    parts["targets"] = targets.targets(targets.losses_on_cpu(results)) + _tuned(results)
    parts["times"] = "\n\n".join(
        f"## Times, {name}\n\nMedian milliseconds a call, and how many times ours, with quartiles "
        "of the ratio in brackets: above 1 ours is faster.\n\n"
        + _times([c for c in cases if c["case"]["allocator"] == allocator], False, dry)
        for allocator, name in _ALLOCATORS.items()
    )
    return report.page("losses_cpu", **parts)


def _tuned(results: Results) -> str:
    """What is left of the ratios with targets where peers pay for no page faults."""
    sized = targets.nt_xent_cases(results, n=4096, d=128, allocator="tuned")
    left = [
        f"{times(ratio)} against {peer}"
        for peer in targets.LOSS_CPU
        for ratio, _ in targets.ratios_of(sized, "times_ours", peer)
    ]
    text = (
        "\n\nA large part of what the peers take there is fetching pages from the system. With an "
        f"allocator that keeps freed memory the ratios are {', '.join(left)}."
    )
    return text if left else ""


def _times(cases: list[Results], on_gpu: bool, dry: bool) -> str:
    groups = defaultdict(list)
    for c in cases:
        for direction in c["times"]:
            groups[c["case"]["subject"], direction, c["case"]["precision"]].append(c)
    return "\n\n".join(
        f"### {SUBJECTS[subject]}, {direction}{f', {precision}' * on_gpu}\n\n"
        + _group(group, direction, on_gpu, dry)
        for (subject, direction, precision), group in groups.items()
    )


def _group(cases: list[Results], direction: str, on_gpu: bool, dry: bool) -> str:
    timed = [c["times"][direction] for c in cases]
    names = dict.fromkeys(name for t in timed for name in t["milliseconds"])
    rates = dict.fromkeys(name for t in timed for name in t["rates"])
    peers = [name for name in names if name != OURS and name not in rates]
    fractions = dict.fromkeys(name for t in timed for name in t["fractions"])
    header = ["N", "D", "τ", *["backend"] * on_gpu, "rounds", f"{OURS}, ms", *peers]
    header += ["GFLOP/s"] * (OURS in rates) + [f"of {name}" for name in fractions]
    header += [f"{GEMM}, TFLOP/s", f"{COPY}, TB/s"] * (COPY in rates)
    rows = []
    for c, t in zip(cases, timed, strict=True):
        row = [c["case"][name] for name in ("n", "d", "temperature")]
        row += [c["backend"]["name"]] if on_gpu else []
        row += [t["rounds"], *_figures(report.interval, t["milliseconds"], [OURS])]
        row += [_peer(t, peer) for peer in peers]
        row += _figures(lambda s: f"{s['median']:.0f}", t["rates"], [OURS] * (OURS in rates))
        row += _figures(percent, t["fractions"], fractions)
        tera = [GEMM, COPY] * (COPY in rates)
        row += _figures(lambda s: f"{s['median'] / 1e3:.3g}", t["rates"], tera)
        rows.append(row)
    return table(header, rows, dry)


def _figures(
    form: Callable[[dict[str, float]], str], found: dict[str, Any], names: Iterable[str]
) -> list[str]:
    return [form(found[name]) if name in found else NONE for name in names]


def _peer(timed: Results, peer: str) -> str:
    if peer not in timed["milliseconds"]:
        return NONE
    text = f"{timed['milliseconds'][peer]['median']:.3g}"
    ratio = timed["times_ours"].get(peer)
    return f"{text}: {times(ratio)}" if ratio else text


def _slower(cases: list[Results]) -> Iterator[str]:
    for c in cases:
        size = c["case"]
        where = f"N = {size['n']}, D = {size['d']}, τ = {size['temperature']}"
        for direction, timed in c["times"].items():
            for peer, ratio in timed["times_ours"].items():
                if ratio["q1"] < 1:
                    verdict = "slower" if ratio["q3"] < 1 else "not faster beyond the spread"
                    yield (
                        f"{verdict} than {peer}: {_loss(size)}, {direction}, {where}, "
                        f"{_ALLOCATORS[size['allocator']]}: {times(ratio)}"
                    )


def _loss(size: Results) -> str:
    precision = "" if size["precision"] == "fp32" else f" {size['precision']}"
    return SUBJECTS[size["subject"]] + precision


def _by_arm(cases: list[Results], key: str, text: Callable[[Any], str], dry: bool) -> str:
    """Of the sizes that have such a figure, without columns that say the same in each row."""
    shown = sorted((c for c in cases if c.get(key)), key=_by_size)
    columns = {
        "loss": [SUBJECTS[c["case"]["subject"]] for c in shown],
        "precision": [c["case"]["precision"] for c in shown],
        "N": [c["case"]["n"] for c in shown],
        "D": [c["case"]["d"] for c in shown],
    }
    kept = {name: cells for name, cells in columns.items() if name == "N" or len(set(cells)) > 1}
    return report.by_arm(shown, key, text, kept, dry)


def _accuracy(accuracy: list[Results], dry: bool) -> str:
    columns = [(part, name) for part in ("gradient", "loss") for name in (OURS, EAGER)]
    rows = []
    for row in accuracy:
        errors = [
            f"{row[name][part]['median']:.1e} ({row[name][part]['largest']:.1e})"
            for part, name in columns
        ]
        temperature = row["case"]["temperature"]
        rows.append([temperature, f"{targets.gradient_budget(temperature):.0e}", *errors])
    header = ["τ", "budget of the gradient", *(f"{part}, {name}" for part, name in columns)]
    return table(header, rows, dry)


def _sizes(cases: list[Results]) -> str:
    return "N = " + ", ".join(map(str, sorted({c["case"]["n"] for c in cases})))


def _by_size(c: Results) -> tuple[Any, ...]:
    return tuple(c["case"][name] for name in ("subject", "precision", "d", "n", "temperature"))
