"""Times of the losses in this process, as JSON: ``python -m benchmarks.timings --help``."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.interleaved import spread, time_interleaved
from benchmarks.loss_arms import OURS, SUBJECTS, Arm, Loss, embeddings, forward, forward_backward
from benchmarks.parity import Disagreement, check, oracle

_DIRECTIONS = {"forward": forward, "forward+backward": forward_backward}
_SQUARE = 1024
GEMM_OF_LOGITS = "GEMM, M × D × M"
GEMM_SQUARE = f"GEMM, {_SQUARE}³"


class Case(NamedTuple):
    """One comparison: a loss at a size, timed for about ``budget_s`` seconds."""

    subject: str
    direction: str
    n: int
    d: int
    temperature: float
    budget_s: float


# Seconds for each N; most for the size that has targets.
_SIZES = {128: 4, 256: 4, 512: 4, 1024: 5, 2048: 8, 4096: 60, 8192: 40}

FULL = [
    *(Case("nt_xent", "forward+backward", n, 128, 0.1, s) for n, s in _SIZES.items()),
    *(Case("nt_xent", "forward", n, 128, 0.1, s / 2) for n, s in _SIZES.items() if n < 8192),
    Case("nt_xent", "forward+backward", 256, 512, 0.1, 4),
    Case("nt_xent", "forward+backward", 2048, 512, 0.1, 8),
    # 1 / 0.01 is beyond what exp can take unshifted in float32: the loss does more work.
    Case("nt_xent", "forward+backward", 1024, 128, 0.01, 5),
    Case("clip", "forward+backward", 512, 512, 0.07, 4),
    Case("clip", "forward+backward", 2048, 512, 0.07, 8),
]
ALLOCATOR = [case for case in FULL[: len(_SIZES)] if case.n < 8192]
QUICK = [
    Case("nt_xent", "forward+backward", 128, 128, 0.1, 1),
    Case("nt_xent", "forward", 512, 128, 0.1, 1),
    Case("clip", "forward+backward", 256, 512, 0.07, 1),
]
CASES = {"full": FULL, "allocator": ALLOCATOR, "quick": QUICK}


def measure(case: Case) -> dict[str, Any]:
    """Check and time every arm of a case; arms that disagree or fail are refused, with reasons.

    Raises:
        Disagreement: if our own loss is wrong.
    """
    torch.compiler.reset()
    z1, z2 = embeddings(case.n, case.d)
    expected = oracle(case.subject, z1, z2, case.temperature)
    losses: dict[str, Loss] = {}
    errors: dict[str, tuple[float, float]] = {}
    refused: dict[str, str] = {}
    for name, arm in SUBJECTS[case.subject].items():
        try:
            loss = _build(arm, case)
            errors[name] = check(loss, z1, z2, expected, case.temperature)
            losses[name] = loss
        except _Unsuitable as reason:
            refused[name] = str(reason)
        except (Disagreement, ImportError, RuntimeError) as error:
            if name == OURS:
                raise
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    run = _DIRECTIONS[case.direction]
    subjects = {name: partial(run, loss, z1, z2) for name, loss in losses.items()}
    flops = _add_gemms(subjects, case)
    samples = time_interleaved(subjects, budget_s=case.budget_s)
    ours = samples[OURS]
    return {
        **case._asdict(),
        "rounds": len(ours),
        "milliseconds": {
            name: spread([1e3 * s for s in seconds])._asdict() for name, seconds in samples.items()
        },
        "times_ours": {
            name: spread([s / o for s, o in zip(samples[name], ours, strict=True)])._asdict()
            for name in losses
            if name != OURS
        },
        "gflops_per_second": {
            name: spread([count / s / 1e9 for s in samples[name]])._asdict()
            for name, count in flops.items()
        },
        "fraction_of_gemm": {
            name: spread(
                [
                    (flops[OURS] / o) / (flops[name] / s)
                    for s, o in zip(samples[name], ours, strict=True)
                ]
            )._asdict()
            for name in flops
            if name != OURS
        },
        "relative_errors": {
            name: dict(zip(("loss", "gradient"), pair, strict=True))
            for name, pair in errors.items()
        },
        "refused": refused,
    }


class _Unsuitable(Exception):
    pass


def _build(arm: Arm, case: Case) -> Loss:
    if arm.largest_n is not None and case.n > arm.largest_n:
        raise _Unsuitable(f"memory grows with N³; not run beyond N = {arm.largest_n}")
    try:
        return arm.build(case.temperature)
    except ImportError as error:
        raise _Unsuitable(f"not installed ({error})") from error


def _add_gemms(subjects: dict[str, Any], case: Case) -> dict[str, float]:
    """Add matrix products to the arms, for NT-Xent; returns the flops of all that have a rate.

    Ours computes half of a symmetric matrix of logits, M²D flops, once in the forward pass and
    again in the backward pass, which then multiplies it from both sides.
    """
    if case.subject != "nt_xent":
        return {}
    m, d = 2 * case.n, case.d
    rows, logits = torch.randn(m, d), torch.empty(m, m)
    square = torch.randn(_SQUARE, _SQUARE)
    product = torch.empty_like(square)
    subjects[GEMM_OF_LOGITS] = lambda: torch.mm(rows, rows.T, out=logits)
    subjects[GEMM_SQUARE] = lambda: torch.mm(square, square, out=product)
    return {
        OURS: (1 if case.direction == "forward" else 4) * m**2 * d,
        GEMM_OF_LOGITS: 2 * m**2 * d,
        GEMM_SQUARE: 2 * _SQUARE**3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the losses in this process.")
    parser.add_argument("cases", choices=CASES, help="which cases")
    parser.add_argument("out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    results = []
    for case in CASES[arguments.cases]:
        print(f"timing {case}", file=sys.stderr, flush=True)
        results.append(measure(case))
    arguments.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
