"""The results as Markdown, computed from the JSON: ``python -m benchmarks.report FILE``."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.accuracy import gradient_budget
from benchmarks.loss_arms import OURS
from benchmarks.markdown import interval, percent, table, times
from benchmarks.timings import GEMM_OF_LOGITS, GEMM_SQUARE

_ENVIRONMENTS = {
    "default": "default allocator",
    "tuned": "allocator that keeps freed memory",
}
_LOSSES = {"nt_xent": "NT-Xent", "clip": "Loss of CLIP (`info_nce(symmetric=True)`)"}

# How many times ours the peers should take, of the case in ``_target_case``.
_TARGETS = {"lightly": 8, "eager": 4, "compiled eager": 2.3}


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    sections = [_introduction(results), _targets(results)]
    sections += [_times(results["timings"][key], key) for key in results["timings"]]
    sections += [_slower(results), _memory(results["memory"]), _accuracy(results["accuracy"])]
    sections.append(_not_timed(results))
    return "\n\n".join(sections) + "\n"


def _introduction(results: dict[str, Any]) -> str:
    machine = results["machine"]
    packages = ", ".join(
        f"{name} {version or 'not installed'}" for name, version in machine["packages"].items()
    )
    commit = machine["commit"] or "unknown"
    if machine["uncommitted_changes"]:
        commit += " with uncommitted changes"
    lines = [
        "# The losses on a CPU",
        "Written by `python -m benchmarks.run`; the method is in `benchmarks/README.md`.",
    ]
    if results["mode"] == "quick":
        lines.append("**Quick mode: too few rounds and sizes to quote.**")
    lines.append(
        "\n".join(
            [
                f"- Date {machine['date']}, commit {commit}",
                f"- {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads,"
                f" BLAS {machine['blas']}, {machine['system']}",
                f"- Python {machine['python']}, {packages}",
                f"- Load average before {machine['load_average']}, after "
                f"{results['load_average_after']}; {results['seconds'] / 60:.0f} minutes in all",
            ]
        )
    )
    return "\n\n".join(lines)


def _targets(results: dict[str, Any]) -> str:
    rows = [
        (what, target, measured or "not measured", {True: "yes", False: "**no**", None: ""}[met])
        for what, target, measured, met in _target_rows(results)
    ]
    return "\n\n".join(
        [
            "## Targets",
            table(["what", "target", "measured", "met"], rows),
            *_with_tuned_allocator(results),
        ]
    )


def _with_tuned_allocator(results: dict[str, Any]) -> Iterable[str]:
    """What is left of the ratios where peers pay for no page faults."""
    case = _target_case(results["timings"].get("tuned", []))
    ratios = case["times_ours"] if case else {}
    measured = [f"{times(ratios[peer])} against {peer}" for peer in _TARGETS if peer in ratios]
    if measured:
        yield (
            "A large part of what the peers take there is fetching pages from the system. With an "
            f"allocator that keeps freed memory the ratios are {', '.join(measured)}."
        )


def _target_case(cases: list[dict[str, Any]]) -> dict[str, Any] | None:
    wanted = ("nt_xent", "forward+backward", 4096, 128)
    return next(
        (c for c in cases if (c["subject"], c["direction"], c["n"], c["d"]) == wanted), None
    )


def _target_rows(
    results: dict[str, Any],
) -> Iterable[tuple[str, str, str | None, bool | None]]:
    where = "NT-Xent forward+backward, N = 4096, D = 128"
    case = _target_case(results["timings"]["default"])
    for peer, target in _TARGETS.items():
        ratio = case and case["times_ours"].get(peer)
        yield (
            f"{where}, against {peer}",
            f"≥ {target}×",
            times(ratio) if ratio else None,
            ratio["median"] >= target if ratio else None,
        )
    fraction = case and case["fraction_of_gemm"].get(GEMM_OF_LOGITS)
    yield (
        f"{where}, rate on 4·(2N)²·D flops over that of {GEMM_OF_LOGITS}",
        "≥ 80 %",
        percent(fraction) if fraction else None,
        fraction["median"] >= 0.8 if fraction else None,
    )
    extra = {m["n"]: m["extra_mib"] for m in results["memory"] if m["arm"] == OURS}
    largest = extra.get(8192)
    yield (
        "Extra memory, N = 8192, D = 128",
        "≤ 96 MiB",
        f"{largest:.0f} MiB" if largest else None,
        largest <= 96 if largest else None,
    )
    growth = largest / extra[4096] if largest and extra.get(4096) else None
    yield (
        "Extra memory, N = 8192 over N = 4096",
        "≤ 2.2",
        f"{growth:.2f}" if growth else None,
        growth <= 2.2 if growth else None,
    )
    budget_used = max(
        row[OURS]["gradient"]["largest"] / gradient_budget(row["temperature"])
        for row in results["accuracy"]
    )
    yield (
        "Gradient error in float32 over max(1e-6, 2e-7 / τ), largest over τ",
        "≤ 1",
        f"{budget_used:.2f}",
        budget_used <= 1,
    )
    against_eager = max(
        row[OURS]["gradient"]["median"] / row["eager"]["gradient"]["median"]
        for row in results["accuracy"]
    )
    yield (
        "Gradient error in float32 over that of eager, largest over τ",
        "≤ 1",
        f"{against_eager:.2f}",
        against_eager <= 1,
    )


def _times(cases: list[dict[str, Any]], environment: str) -> str:
    parts = [
        f"## Times, {_ENVIRONMENTS[environment]}",
        "Median milliseconds a call, and how many times ours, with quartiles of the ratio in "
        "brackets: above 1 ours is faster.",
    ]
    for subject, direction in dict.fromkeys((c["subject"], c["direction"]) for c in cases):
        group = [c for c in cases if (c["subject"], c["direction"]) == (subject, direction)]
        peers = list(dict.fromkeys(name for c in group for name in c["times_ours"]))
        has_gemm = any(c["fraction_of_gemm"] for c in group)
        header = ["N", "D", "τ", "rounds", f"{OURS}, ms", *peers]
        if has_gemm:
            header += ["GFLOP/s", f"of {GEMM_OF_LOGITS}", f"of {GEMM_SQUARE}"]
        rows = []
        for c in group:
            ours = c["milliseconds"][OURS]
            row = [c["n"], c["d"], c["temperature"], c["rounds"], interval(ours)]
            row += [_peer(c, peer) for peer in peers]
            if has_gemm:
                row.append(f"{c['gflops_per_second'][OURS]['median']:.0f}")
                row += [percent(c["fraction_of_gemm"][g]) for g in (GEMM_OF_LOGITS, GEMM_SQUARE)]
            rows.append(row)
        parts.append(f"### {_LOSSES[subject]}, {direction}\n\n" + table(header, rows))
    return "\n\n".join(parts)


def _slower(results: dict[str, Any]) -> str:
    lines = []
    for environment, cases in results["timings"].items():
        for c in cases:
            for peer, ratio in c["times_ours"].items():
                if ratio["q1"] < 1:
                    verdict = "slower" if ratio["q3"] < 1 else "not faster beyond the spread"
                    lines.append(
                        f"- {verdict} than {peer}: {_LOSSES[c['subject']]}, {c['direction']}, "
                        f"N = {c['n']}, D = {c['d']}, τ = {c['temperature']}, "
                        f"{_ENVIRONMENTS[environment]}: {times(ratio)}"
                    )
    return "## Where ours is not faster\n\n" + (
        "\n".join(lines) if lines else "In none of the comparisons above."
    )


def _memory(memory: list[dict[str, Any]]) -> str:
    arms = list(dict.fromkeys(m["arm"] for m in memory))
    extra = {(m["arm"], m["n"]): m["extra_mib"] for m in memory}
    rows = [
        [n, *("–" if extra[arm, n] is None else f"{extra[arm, n]:.0f}" for arm in arms)]
        for n in dict.fromkeys(m["n"] for m in memory)
    ]
    heading = (
        f"## Memory\n\nNT-Xent forward+backward, D = {memory[0]['d']}, float32: MiB beyond the "
        "inputs at the peak, gradients included, each in a fresh process.\n\n"
    )
    return heading + table(["N", *arms], rows)


def _accuracy(accuracy: list[dict[str, Any]]) -> str:
    first = accuracy[0]
    rows = []
    for row in accuracy:
        errors = [
            f"{row[name][part]['median']:.1e} ({row[name][part]['largest']:.1e})"
            for part in ("gradient", "loss")
            for name in (OURS, "eager")
        ]
        rows.append([row["temperature"], f"{gradient_budget(row['temperature']):.0e}", *errors])
    heading = (
        f"## Accuracy\n\nNT-Xent in float32 against float64, N = {first['n']}, D = {first['d']}: "
        f"relative errors, median and (largest) over {first['seeds']} batches.\n\n"
    )
    header = ["τ", "budget of the gradient"]
    header += [f"{part}, {name}" for part in ("gradient", "loss") for name in (OURS, "eager")]
    return heading + table(header, rows)


def _not_timed(results: dict[str, Any]) -> str:
    sizes: dict[tuple[str, str, str], list[int]] = {}
    for cases in results["timings"].values():
        for c in cases:
            for name, reason in c["refused"].items():
                key = (_LOSSES[c["subject"]], name, reason)
                sizes.setdefault(key, []).append(c["n"])
    lines = [
        f"- {loss}: {name} at N = {', '.join(map(str, sorted(set(ns))))}: {reason}"
        for (loss, name, reason), ns in sizes.items()
    ]
    lines += [
        f"- memory of {m['arm']} at N = {m['n']}: {m['reason']}"
        for m in results["memory"]
        if m["extra_mib"] is None
    ]
    return "## Not measured\n\n" + ("\n".join(lines) if lines else "Nothing was left out.")


def _peer(case: dict[str, Any], peer: str) -> str:
    if peer not in case["times_ours"]:
        return "–"
    return f"{case['milliseconds'][peer]['median']:.3g}: {times(case['times_ours'][peer])}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the report of a results file.")
    parser.add_argument("results", type=Path, help="JSON file written by benchmarks.run")
    print(markdown(json.loads(parser.parse_args().results.read_text())), end="")


if __name__ == "__main__":
    main()
