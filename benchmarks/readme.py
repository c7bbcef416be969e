"""Copy figures of the results into docs/benchmarks.md and README.md, and draw README.md's chart.

By ``python -m benchmarks readme``.
"""

import json
import re
from typing import Any

from benchmarks.harness.machine import REPOSITORY, RESULTS
from benchmarks.harness.report import page

CHART = REPOSITORY / "docs" / "gallery" / "loss_cpu.png"
PAGE, README = REPOSITORY / "docs" / "benchmarks.md", REPOSITORY / "README.md"


def numbers() -> str:
    """What docs/benchmarks.md shows, from the pages of the results."""
    losses, views = ((RESULTS / f"{name}_cpu.md").read_text() for name in ("loss", "augment"))
    described = re.findall(r"^- (.*)", losses, re.MULTILINE)[1]
    targets = [x.split("\n## Targets\n")[1].split("\n## ")[0].strip() for x in (losses, views)]
    return page("readme", described=described, losses=targets[0], views=targets[1]).strip()


def training() -> str:
    """What README.md shows of whole trainings."""
    found = _between("training").search((RESULTS / "training_cpu.md").read_text())
    assert found is not None
    return found[0].strip()


def _between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {name} start -->\n).*?(?=<!-- {name} end -->)", re.DOTALL)


def curves() -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Of each arm of NT-Xent at D = 128: milliseconds and MiB, beside the number of pairs."""
    result: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for measured in json.loads((RESULTS / "loss_cpu.json").read_text())["cases"]:
        case: dict[str, Any] = measured["case"]
        asked = {"subject": "nt_xent", "d": 128, "temperature": 0.1, "allocator": "default"}
        if any(case.get(name) != value for name, value in asked.items()):
            continue
        times = measured.get("times", {}).get("forward+backward", {}).get("milliseconds", {})
        values = {
            "ms": {arm: time["median"] for arm, time in times.items() if "GEMM" not in arm},
            "MiB": {arm: m["extra_mib"] for arm, m in (measured.get("memory") or {}).items()},
        }
        for unit, of_arms in values.items():
            for arm, value in of_arms.items():
                points = result.setdefault(arm, {"ms": [], "MiB": []})[unit]
                points.append((case["n"], value))
    return result


def draw() -> None:
    """The chart: time and memory over the number of pairs, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained", facecolor="white")
    for axis, unit, title in zip(
        figure.subplots(1, 2),
        ("ms", "MiB"),
        ("forward and backward, ms", "extra memory, MiB"),
        strict=True,
    ):
        for arm, points in curves().items():
            ours = arm == "contrastive-kit"
            if len(points[unit]) > 1:
                axis.plot(
                    *zip(*sorted(points[unit]), strict=True), marker=".", label=arm, lw=1 + ours
                )
        axis.set(xscale="log", yscale="log", xlabel="pairs N", title=title)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(CHART, dpi=110, metadata={"Software": None})


def main() -> None:
    draw()
    for path, name, text in ((PAGE, "numbers", numbers()), (README, "training", training())):
        written, found = _between(name).subn(lambda _, text=text: f"{text}\n", path.read_text())
        if not found:
            raise SystemExit(f"{path} has no <!-- {name} start --> … <!-- {name} end -->")
        path.write_text(written)
