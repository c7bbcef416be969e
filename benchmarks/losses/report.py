"""The results of the losses as Markdown and a picture."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import targets
from benchmarks.harness.report import (
    DRY,
    Results,
    axes,
    by_arm,
    counts,
    interval,
    introduction,
    listed,
    mib,
    not_measured,
    of_kind,
    percent,
    save,
    table,
    times,
)
from benchmarks.losses.arms import EAGER, OURS
from benchmarks.losses.bench import BOTH, COPY, GEMM

_ALLOCATORS = {
    "default": "default allocator",
    "tuned": "allocator that keeps freed memory",
}
_LOSSES = {"nt_xent": "NT-Xent", "clip": "Loss of CLIP (`info_nce(symmetric=True)`)"}
_PRECISIONS = {
    "bf16": "bfloat16 embeddings, plain torch under autocast",
    "tf32": "float32 embeddings, products in tf32",
    "fp32": "float32",
}


def markdown(results: Results) -> str:
    """The whole report."""
    cases = of_kind(results, "subject")
    on_gpu = _of_gpu(results)
    sections = [introduction(f"The losses on a {'GPU' if on_gpu else 'CPU'}", "losses", results)]
    sections.append(_targets(results))
    for allocator in dict.fromkeys(c["case"]["allocator"] for c in cases):
        of_one = [c for c in cases if c["case"]["allocator"] == allocator]
        sections.append(_times(of_one, allocator, results))
    sections += [_slower(cases, results), _memory(cases, results)]
    if on_gpu:
        sections.append(
            f"## Kernel launches\n\n{BOTH}, with the copies and fills behind the plus.\n\n"
            + _by_arm(cases, "launches", counts, results)
        )
        sections.append(
            "## Errors\n\nRelative errors of the loss and of the gradient, against float64.\n\n"
            + _by_arm(cases, "errors", _error, results)
        )
    sections.append(_accuracy(of_kind(results, "seeds"), results["dry"]))
    sections.append(not_measured(cases, lambda c: f"{_loss(c['case'])}: ", _sizes))
    return "\n\n".join(sections) + "\n"


def _of_gpu(results: Results) -> bool:
    return results["dry"] or "capability" in results["machine"]


def _targets(results: Results) -> str:
    if _of_gpu(results):
        return (
            f"## Targets\n\n{targets.ON_GPU} Over several sizes the worst one counts.\n\n"
            + targets.targets(targets.losses_on_gpu(results), results["dry"])
        )
    parts = ["## Targets", targets.targets(targets.losses_on_cpu(results))]
    tuned = (targets.cpu_case(results, "tuned") or {"times_ours": {}})["times_ours"]
    left = [f"{times(tuned[peer])} against {peer}" for peer in targets.LOSS_CPU if peer in tuned]
    if left:
        parts.append(
            "A large part of what the peers take there is fetching pages from the system. With an "
            f"allocator that keeps freed memory the ratios are {', '.join(left)}."
        )
    return "\n\n".join(parts)


def _times(cases: list[Results], allocator: str, results: Results) -> str:
    on_gpu = _of_gpu(results)
    text = (
        "Median milliseconds a call, and how many times ours, with quartiles of the ratio in "
        "brackets: above 1 ours is faster."
    )
    if on_gpu:
        text += (
            " The roofline is the longer of the products at the rate of this card's GEMM and the "
            "traffic at the rate of its copy, both measured in the same rounds; exponentials are "
            "not counted in it."
        )
    parts = [f"## Times{'' if on_gpu else f', {_ALLOCATORS[allocator]}'}", text]
    groups = defaultdict(list)
    for c in cases:
        for direction in c["times"]:
            groups[c["case"]["subject"], direction, c["case"]["precision"]].append(c)
    for (subject, direction, precision), group in groups.items():
        title = f"### {_LOSSES[subject]}, {direction}"
        if on_gpu:
            title += f", {precision}\n\n{_PRECISIONS[precision]}."
            group = sorted(group, key=_by_size)
        parts.append(f"{title}\n\n{_group(group, direction, on_gpu, results['dry'])}")
    return "\n\n".join(parts)


def _group(cases: list[Results], direction: str, on_gpu: bool, dry: bool) -> str:
    timed = [c["times"][direction] for c in cases]
    names = dict.fromkeys(name for t in timed for name in t["milliseconds"])
    rates = dict.fromkeys(name for t in timed for name in t["rates"])
    peers = [name for name in names if name != OURS and name not in rates]
    fractions = dict.fromkeys(name for t in timed for name in t["fractions"])
    header = ["N", "D", "τ", *(["backend"] if on_gpu else []), "rounds", f"{OURS}, ms", *peers]
    header += ["GFLOP/s"] * (OURS in rates) + [f"of {name}" for name in fractions]
    header += [f"{GEMM}, TFLOP/s", f"{COPY}, TB/s"] * (COPY in rates)
    rows = []
    for c, t in zip(cases, timed, strict=True):
        size = c["case"]
        row = [size["n"], size["d"], size["temperature"]]
        row += [c["backend"]["name"]] if on_gpu else []
        row += [t["rounds"], *_figures(interval, t["milliseconds"], [OURS])]
        row += [_peer(t, peer) for peer in peers]
        if OURS in rates:
            row += _figures(lambda s: f"{s['median']:.0f}", t["rates"], [OURS])
        row += _figures(percent, t["fractions"], fractions)
        if COPY in rates:
            row += _figures(lambda s: f"{s['median'] / 1e3:.3g}", t["rates"], [GEMM, COPY])
        rows.append(row)
    return table(header, rows, dry)


def _figures(
    form: Callable[[dict[str, float]], str], found: dict[str, Any], names: Iterable[str]
) -> list[str]:
    return [form(found[name]) if name in found else "–" for name in names]


def _peer(timed: Results, peer: str) -> str:
    if peer not in timed["milliseconds"]:
        return "–"
    text = f"{timed['milliseconds'][peer]['median']:.3g}"
    ratio = timed["times_ours"].get(peer)
    return f"{text}: {times(ratio)}" if ratio else text


def _slower(cases: list[Results], results: Results) -> str:
    def lines() -> Iterator[str]:
        for c in cases:
            size = c["case"]
            where = f"N = {size['n']}, D = {size['d']}, τ = {size['temperature']}"
            if not _of_gpu(results):
                where += f", {_ALLOCATORS[size['allocator']]}"
            for direction, timed in c["times"].items():
                for peer, ratio in timed["times_ours"].items():
                    if ratio["q1"] < 1:
                        verdict = "slower" if ratio["q3"] < 1 else "not faster beyond the spread"
                        yield (
                            f"{verdict} than {peer}: {_loss(size)}, {direction}, {where}: "
                            f"{times(ratio)}"
                        )

    found = [DRY] if results["dry"] else lines()
    return "## Where ours is not faster\n\n" + listed(found, "In none of the comparisons above.")


def _loss(size: Results) -> str:
    precision = "" if size["precision"] == "fp32" else f" {size['precision']}"
    return _LOSSES[size["subject"]] + precision


def _memory(cases: list[Results], results: Results) -> str:
    if _of_gpu(results):
        text = f"MiB beyond the embeddings at the peak of {BOTH}, gradients included."
    else:
        text = (
            f"NT-Xent {BOTH}, D = 128, float32: MiB beyond the inputs at the peak, gradients "
            "included, each in a fresh process."
        )
    return f"## Memory\n\n{text}\n\n" + _by_arm(cases, "memory", mib, results)


def _by_arm(cases: list[Results], key: str, text: Callable[[Any], str], results: Results) -> str:
    """Of the sizes that have such a figure, without columns that say the same in each row."""
    shown = [c for c in cases if c.get(key)]
    if _of_gpu(results):
        shown.sort(key=lambda c: (c["case"]["subject"], *_by_size(c)))
    columns = {
        "loss": [_LOSSES[c["case"]["subject"]] for c in shown],
        "precision": [c["case"]["precision"] for c in shown],
        "N": [c["case"]["n"] for c in shown],
        "D": [c["case"]["d"] for c in shown],
    }
    kept = {name: cells for name, cells in columns.items() if name == "N" or len(set(cells)) > 1}
    return by_arm(shown, key, text, kept, results["dry"])


def _error(errors: dict[str, float] | None) -> str:
    return f"{errors['loss']:.0e}, {errors['gradient']:.0e}" if errors else "–"


def _accuracy(accuracy: list[Results], dry: bool) -> str:
    if not accuracy:
        return "## Accuracy\n\n**Not measured.**"
    columns = [(part, name) for part in ("gradient", "loss") for name in (OURS, EAGER)]
    rows = []
    for row in accuracy:
        errors = [
            f"{row[name][part]['median']:.1e} ({row[name][part]['largest']:.1e})"
            for part, name in columns
        ]
        temperature = row["case"]["temperature"]
        rows.append([temperature, f"{targets.gradient_budget(temperature):.0e}", *errors])
    first = accuracy[0]["case"]
    heading = (
        f"## Accuracy\n\nNT-Xent in float32 against float64, N = {first['n']}, D = {first['d']}: "
        f"relative errors, median and (largest) over {first['seeds']} batches.\n\n"
    )
    header = ["τ", "budget of the gradient", *(f"{part}, {name}" for part, name in columns)]
    return heading + table(header, rows, dry)


def _sizes(cases: list[Results]) -> str:
    return "N = " + ", ".join(map(str, sorted({c["case"]["n"] for c in cases})))


def _by_size(c: Results) -> tuple[Any, ...]:
    case = c["case"]
    return case["precision"], case["d"], case["n"], case["temperature"]


def pictures(results: Results, path: Path) -> None:
    """Milliseconds and memory of NT-Xent on a GPU, for bfloat16 and the most frequent dimension."""
    cases = [
        c
        for c in of_kind(results, "subject")
        if (c["case"]["subject"], c["case"]["precision"]) == ("nt_xent", "bf16")
    ]
    dimensions = [c["case"]["d"] for c in cases]
    d = max(sorted(set(dimensions)), key=dimensions.count, default=0)
    cases = sorted((c for c in cases if c["case"]["d"] == d), key=lambda c: c["case"]["n"])
    figure, (left, right) = axes(2)
    for name in dict.fromkeys(n for c in cases for n in c["errors"]):
        style = {"linewidth": 3, "color": "black"} if name == OURS else {}
        timed = {c["case"]["n"]: c["times"][BOTH]["milliseconds"].get(name) for c in cases}
        timed = {n: found["median"] for n, found in timed.items() if found}
        held = {c["case"]["n"]: c["memory"].get(name, {}).get("extra_mib") for c in cases}
        held = {n: extra for n, extra in held.items() if extra}
        for part, found in ((left, timed), (right, held)):
            part.plot(list(found), list(found.values()), marker="o", label=name, **style)
    left.set(ylabel=f"ms, {BOTH}", title=f"NT-Xent, bfloat16, D = {d}")
    right.set(ylabel="MiB beyond the embeddings", title="peak memory")
    for part in (left, right):
        part.set(xlabel="pairs N")
        if any(len(line.get_xdata()) for line in part.lines):
            part.set(xscale="log", yscale="log")
        part.grid(alpha=0.3)
    left.legend(fontsize=8)
    save(figure, results, path)
