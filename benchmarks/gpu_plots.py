"""Plots of the results of the GPU stages."""

from pathlib import Path
from typing import Any

from benchmarks import gpu_augment
from benchmarks.loss_arms import OURS

_BOTH = "forward+backward"


def losses(results: dict[str, Any], path: Path) -> None:
    """Milliseconds and memory of NT-Xent over N, for bfloat16 and the dimension with most sizes."""
    cases = [
        c
        for c in results["cases"]
        if (c["case"]["subject"], c["case"]["precision"]) == ("nt_xent", "bf16")
    ]
    dimensions = [c["case"]["d"] for c in cases]
    d = max(sorted(set(dimensions)), key=dimensions.count, default=0)
    cases = sorted((c for c in cases if c["case"]["d"] == d), key=lambda c: c["case"]["n"])
    figure, (left, right) = _axes(2)
    for name in dict.fromkeys(name for c in cases for name in c["times"][_BOTH]["milliseconds"]):
        style = {"linewidth": 3, "color": "black"} if name == OURS else {}
        timed = [c for c in cases if name in c["times"][_BOTH]["milliseconds"]]
        left.plot(
            [c["case"]["n"] for c in timed],
            [c["times"][_BOTH]["milliseconds"][name]["median"] for c in timed],
            marker="o", label=name, **style,
        )  # fmt: skip
        held = [c for c in cases if c["extra_mib"].get(name)]
        right.plot(
            [c["case"]["n"] for c in held],
            [c["extra_mib"][name] for c in held],
            marker="o", label=name, **style,
        )  # fmt: skip
    left.set(ylabel=f"ms, {_BOTH}", title=f"NT-Xent, bfloat16, D = {d}")
    right.set(ylabel="MiB beyond the embeddings", title="peak memory")
    for axes in (left, right):
        axes.set(xlabel="pairs N")
        if any(len(line.get_xdata()) for line in axes.lines):
            axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    _save(figure, results, path)


def views(results: dict[str, Any], path: Path) -> None:
    """Views per second of each arm, a group of bars for each size."""
    figure, (axes,) = _axes(1)
    cases = results["cases"]
    arms = [n for n in gpu_augment.NOTES if any(n in c["milliseconds"] for c in cases)]
    for number, arm in enumerate(arms):
        rates = [c["views_per_second"].get(arm, {"median": 0})["median"] for c in cases]
        left = [x + 0.8 * (number - len(arms) / 2) / len(arms) for x in range(len(cases))]
        axes.bar(left, rates, 0.8 / len(arms), align="edge", label=arm)
    names = [
        f"{c['case']['source']} → {c['case']['size']}\nB = {c['case']['batch']}" for c in cases
    ]
    axes.set_xticks(range(len(cases)), names)
    axes.set(ylabel="views per second", yscale="log", title="SimCLR's views, uint8 images")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, results, path)


def _axes(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * max(columns, 1.4), 4.5), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, results: dict[str, Any], path: Path) -> None:
    name = results["machine"]["device"]
    figure.suptitle("dry run: no figures" if results["dry"] else name, fontsize=10)
    figure.savefig(path, dpi=110)
