"""The results of the GPU stages as Markdown and plots: ``benchmarks/gpu.sh tables``."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import gpu_augment, gpu_plots
from benchmarks.gpu_correctness import ABSENT, FAILED, PASSED
from benchmarks.gpu_loss import GRAPH
from benchmarks.gpu_run import STAGES
from benchmarks.gpu_targets import BOTH, Results, Target, augment_targets, loss_targets
from benchmarks.loss_arms import OURS
from benchmarks.markdown import interval, percent, table, times

DRY = "dry run: no figures"

_LOSSES = {"nt_xent": "NT-Xent", "clip": "loss of CLIP"}
_PRECISIONS = {
    "bf16": "bfloat16 embeddings, plain torch under autocast",
    "tf32": "float32 embeddings, products in tf32",
    "fp32": "float32",
}


def write(folder: Path) -> None:
    """Write the reports of what was measured; what is missing is said to be missing."""
    correctness, loss, augment = (
        _read(folder / STAGES[stage]) for stage in ("correctness", "loss", "augment")
    )
    if loss is None and augment is None:
        raise SystemExit(f"there are no results in {folder}: run the stages first")
    if loss is not None:
        (folder / "loss_gpu.md").write_text(loss_report(loss, correctness))
    if augment is not None:
        (folder / "augment_gpu.md").write_text(augment_report(augment, correctness))
    if loss is not None:  # after both pages, which need no matplotlib
        gpu_plots.losses(loss, folder / "loss_gpu.png")
    if augment is not None:
        gpu_plots.views(augment, folder / "augment_gpu.png")


def _read(path: Path) -> Results | None:
    return json.loads(path.read_text()) if path.exists() else None


def loss_report(results: Results, correctness: Results | None) -> str:
    """The page on the losses."""
    dry = results["dry"]
    parts = [_introduction("The losses on a GPU", results)]
    parts.append(_targets(loss_targets(results), dry))
    parts.append(_correctness(correctness, results, views=False))
    parts.append(
        "## Times\n\nMedian milliseconds a call, and how many times ours, with quartiles of the "
        "ratio in brackets: above 1 ours is faster. The roofline is the longer of the products at "
        "the rate of this card's GEMM and the traffic at the rate of its copy, both measured in "
        "the same rounds; exponentials are not counted in it."
    )
    groups = defaultdict(list)
    for c in results["cases"]:
        for direction in c["times"]:
            groups[c["case"]["subject"], c["case"]["precision"], direction].append(c)
    for (subject, precision, direction), cases in sorted(groups.items(), reverse=True):
        title = f"### {_LOSSES[subject]}, {direction}, {precision}\n\n{_PRECISIONS[precision]}"
        parts.append(title + ".\n\n" + _times(cases, direction, dry))
    parts += [_memory(results), _launches(results), _errors(results)]
    parts += [_slower(results), _absent(results)]
    return "\n\n".join(parts) + "\n"


def augment_report(results: Results, correctness: Results | None) -> str:
    """The page on the views."""
    dry = results["dry"]
    header = ["", *(_title(c["case"]) for c in results["cases"])]
    arms = [n for n in gpu_augment.NOTES if any(n in c["milliseconds"] for c in results["cases"])]

    def cell(c: Results, arm: str) -> str:
        if arm not in c["milliseconds"]:
            return "–"
        rate = f"{c['views_per_second'][arm]['median']:,.0f}"
        ratio = c["times_ours"].get(arm)
        return f"{rate}: {times(ratio)}" if ratio else rate

    launches = [[arm, *(_counts(c["launches"].get(arm)) for c in results["cases"])] for arm in arms]
    about = [
        ["backend", *(c["backend"]["name"] for c in results["cases"])],
        ["why not triton", *(c["backend"]["refusal"] or "–" for c in results["cases"])],
        [
            "of the roofline",
            *(percent(c["of_roofline"]) if "of_roofline" in c else "–" for c in results["cases"]),
        ],
    ]
    memory = [[arm, *(_mib(c["extra_mib"].get(arm)) for c in results["cases"])] for arm in arms]
    parts = [
        _introduction("SimCLR's views on a GPU", results),
        _targets(augment_targets(results), dry),
        _correctness(correctness, results, views=True),
        "## Views per second\n\nTwo views of each uint8 image on the device, images and views "
        "stay there: crop, mirror, colour jitter, grayscale, and blur from 64 pixels on. Behind "
        "the colon how many times longer than the first row it takes, with quartiles. The roofline "
        "is each image read once and each view written once, at the rate of this card's copy in "
        "the same rounds.\n\n"
        + _table(header, [[arm, *(cell(c, arm) for c in results["cases"])] for arm in arms], dry)
        + "\n\n"
        + _table(header, about, dry),
        "## Kernel launches (and copies) for two views\n\n" + _table(header, launches, dry),
        "## Memory\n\nMiB beyond the images, at the peak.\n\n" + _table(header, memory, dry),
        _absent(results),
        "## What each does\n\n" + "\n".join(f"- {n}: {x}" for n, x in gpu_augment.NOTES.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: Iterable[object], rows: Iterable[Iterable[object]], dry: bool) -> str:
    return (f"*{DRY}*\n\n" if dry else "") + table(header, rows)


def _introduction(title: str, results: Results) -> str:
    about = results["machine"]
    packages = ", ".join(f"{k} {v or 'not installed'}" for k, v in about["packages"].items())
    device = about["device"]
    if "capability" in about:
        device += (
            f", {about['memory_gib']} GiB, {about['multiprocessors']} multiprocessors, compute "
            f"capability {about['capability']}, CUDA {about['cuda']}, driver {about['driver']}"
        )
    lines = [
        f"# {title}",
        "Written by `benchmarks/gpu.sh`; the method is in `benchmarks/README.md`.",
    ]
    if results["dry"]:
        lines.append(f"**{DRY}.** Tiny sizes on a CPU, to see that everything runs.")
    if not results["complete"]:
        lines.append("**Incomplete: the stage was stopped before its last case.**")
    lines.append(
        f"- {device}\n"
        f"- {about['date']}, commit {about['commit']}"
        f"{' with uncommitted changes' if about['uncommitted_changes'] else ''}, contrastive-kit "
        f"{about['version']}, source {about['source']}\n"
        f"- {about['processor']}, {about['cores']} cores, Python {about['python']}, {packages}\n"
        f"- {results['seconds'] / 60:.0f} minutes in all"
    )
    return "\n\n".join(lines)


def _targets(targets: Iterable[Target], dry: bool) -> str:
    words = {True: "yes", False: "**no**", None: ""}
    rows = [
        (t.what, t.target, DRY if dry else t.measured, "" if dry else words[t.met]) for t in targets
    ]
    return (
        "## Targets\n\nSet for an H200 before anything was measured; over several sizes the worst "
        "one counts.\n\n" + _table(["what", "target", "measured", "met"], rows, dry)
    )


def _correctness(results: Results | None, timed: Results, *, views: bool) -> str:
    title = "## Correctness\n\n"
    if results is None:
        return title + "**Not checked: the stage `correctness` has not run.**"
    if not results["complete"]:
        title += "**Incomplete: the stage was stopped before its last check.**\n\n"
    if any(results["machine"][k] != timed["machine"][k] for k in ("source", "device")):
        title += "**Checked with another source or device than was timed.**\n\n"
    dry = results["dry"]
    groups = defaultdict(list)
    for c in results["cases"]:
        name = c["case"]["check"]
        is_test = name.startswith("pytest")
        if is_test or name.startswith("views: ") == views:
            group = name if is_test else ":".join(name.split(":")[: 1 + views])
            groups[group].append(c)
    rows = []
    for group, cases in groups.items():
        n = {o: sum(c["outcome"] == o for c in cases) for o in (PASSED, FAILED, ABSENT)}
        used = [c["error"] / c["budget"] for c in cases if c.get("budget")]
        if "counts" in cases[0]:
            n[PASSED] = cases[0]["counts"].get("passed", 0)
            n[FAILED] = len(cases[0]["failures"])
        failed = f"**{n[FAILED]}**" if n[FAILED] else 0
        reasons = "; ".join(dict.fromkeys(c["reason"] for c in cases if c["outcome"] == ABSENT))
        worst = f"{max(used):.2f}" if used else "–"
        rows.append([group, n[PASSED], failed, n[ABSENT], worst, reasons or "–"])
    header = ["", "passed", "failed", "absent", "largest error over its budget", "absent why"]
    failures = [
        f"- {c['case']['check']}: {_why(c)}"
        for cases in groups.values()
        for c in cases
        if c["outcome"] == FAILED
    ]
    text = (
        f"{title}Against float64 on fresh random inputs, uninitialised memory full of NaN, every "
        "result twice and bit for bit the same.\n\n" + _table(header, rows, dry)
    )
    return text + ("\n\nFailed:\n\n" + "\n".join(failures) if failures else "")


def _why(c: Results) -> str:
    if "error" in c:
        return f"{c['error']:.2g}, over {c['budget']:.2g}"
    return "; ".join([c["reason"], *c.get("failures", [])])


def _times(cases: list[Results], direction: str, dry: bool) -> str:
    cases = sorted(cases, key=_by_size)
    peers = list(dict.fromkeys(n for c in cases for n in c["times"][direction]["milliseconds"]))
    peers = [name for name in peers if name != OURS]
    header = ["N", "D", "τ", "backend", f"{OURS}, ms", *peers]
    if direction != GRAPH:
        header += ["GEMM, TFLOP/s", "copy, TB/s", "of GEMM", "of the roofline"]
    rows = []
    for c in cases:
        timed = c["times"][direction]
        ours = timed["milliseconds"].get(OURS)
        row = [c["case"]["n"], c["case"]["d"], c["case"]["temperature"], c["backend"]["name"]]
        row.append(interval(ours) if ours else "–")
        row += [_peer(timed, peer) for peer in peers]
        if direction != GRAPH:
            rates = timed.get("rates")
            row += [
                f"{rates['GEMM']['median'] / 1e12:.3g}" if rates else "–",
                f"{rates['copy']['median'] / 1e12:.3g}" if rates else "–",
            ]
            row += [percent(timed[k]) if k in timed else "–" for k in ("of_gemm", "of_roofline")]
        rows.append(row)
    return _table(header, rows, dry)


def _peer(timed: Results, peer: str) -> str:
    if peer not in timed["milliseconds"]:
        return "–"
    text = f"{timed['milliseconds'][peer]['median']:.3g}"
    ratio = timed["times_ours"].get(peer)
    return f"{text}: {times(ratio)}" if ratio else text


def _by_arm(results: Results, key: str, title: str, text: Any) -> str:
    """A table of one figure for each arm and size."""
    cases = sorted(results["cases"], key=lambda c: (c["case"]["subject"], *_by_size(c)))
    arms = list(dict.fromkeys(name for c in cases for name in c[key]))
    rows = [
        [_LOSSES[c["case"]["subject"]], c["case"]["precision"], c["case"]["n"], c["case"]["d"]]
        + [text(c[key].get(arm)) for arm in arms]
        for c in cases
    ]
    return title + "\n\n" + _table(["loss", "", "N", "D", *arms], rows, results["dry"])


def _memory(results: Results) -> str:
    title = f"## Memory\n\nMiB beyond the embeddings at the peak of {BOTH}, gradients included."
    return _by_arm(results, "extra_mib", title, _mib)


def _launches(results: Results) -> str:
    title = f"## Kernel launches\n\n{BOTH}, with the copies and fills behind the plus."
    return _by_arm(results, "launches", title, _counts)


def _errors(results: Results) -> str:
    title = "## Errors\n\nRelative errors of the loss and of the gradient, against float64."

    def text(errors: dict[str, float] | None) -> str:
        return f"{errors['loss']:.0e}, {errors['gradient']:.0e}" if errors else "–"

    return _by_arm(results, "errors", title, text)


def _mib(extra: float | None) -> str:
    return "–" if extra is None else f"{extra:.0f}" if extra >= 10 else f"{extra:.2g}"


def _counts(launches: dict[str, int] | None) -> str:
    if launches is None:
        return "–"
    copies = launches["copies"]
    return f"{launches['kernels']} + {copies}" if copies else str(launches["kernels"])


def _slower(results: Results) -> str:
    lines = [
        f"- {'slower' if ratio['q3'] < 1 else 'not faster beyond the spread'} than {peer}: "
        f"{_LOSSES[c['case']['subject']]}, {direction}, {c['case']['precision']}, "
        f"N = {c['case']['n']}, D = {c['case']['d']}, τ = {c['case']['temperature']}: "
        f"{times(ratio)}"
        for c in sorted(results["cases"], key=_by_size)
        for direction, timed in c["times"].items()
        for peer, ratio in timed["times_ours"].items()
        if ratio["q1"] < 1
    ]
    if results["dry"]:
        lines = [DRY]
    return "## Where ours is not faster\n\n" + (
        "\n".join(lines) if lines else "In none of the comparisons above."
    )


def _absent(results: Results) -> str:
    where = defaultdict(list)
    for c in results["cases"]:
        for name, reason in c["absent"].items():
            where[name, reason].append(_title(c["case"]))
    lines = [
        f"- {name}: {reason} ({'; '.join(dict.fromkeys(titles))})"
        for (name, reason), titles in sorted(where.items())
    ]
    return "## Not measured\n\n" + ("\n".join(lines) if lines else "Nothing was left out.")


def _title(case: dict[str, Any]) -> str:
    if "size" in case:
        return f"{case['source']} → {case['size']}, {case['batch']} images"
    return f"{_LOSSES[case['subject']]} {case['precision']} N = {case['n']}, D = {case['d']}"


def _by_size(c: Results) -> tuple[Any, ...]:
    case = c["case"]
    return case["precision"], case["d"], case["n"], case["temperature"]
