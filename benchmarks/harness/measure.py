"""Timing several arms against each other in one process, one sample of each per round.

Whatever disturbs the machine for longer than a round then disturbs every arm alike, and ratios
are taken within rounds. The order within a round is random, so that no arm always runs in the
cache that another left.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Call = Callable[[], object]
Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least two values."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of two arms, within rounds."""
    return [a / b for a, b in zip(values, others, strict=True)]


def wall_seconds(arm: Call, calls: int) -> float:
    """Seconds per call by the clock on the wall."""
    start = time.perf_counter()
    for _ in range(calls):
        arm()
    return (time.perf_counter() - start) / calls


def time_interleaved(
    arms: Mapping[str, Call],
    *,
    budget_s: float,
    sample_s: float = 0.02,
    min_rounds: int = 5,
    max_rounds: int = 100,
    seconds: Callable[[Call, int], float] = wall_seconds,
    failed: Callable[[str, Exception], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each arm, one number a round; each is called twice before the first.

    Args:
        arms: name to what is timed.
        budget_s: no round starts after this many seconds, once there are ``min_rounds``.
        sample_s: an arm is called as often within a round as fills this many seconds, so that
            the clock and the loop cost nothing against short calls.
        min_rounds, max_rounds: how many rounds there are.
        seconds: the clock: from a call and how often it is made to seconds per call.
        failed: told of an arm that raises, which is then left out; without it, the error ends all.
    """
    calls: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in arms}

    def sample(name: str, times: int) -> float | None:
        try:
            return seconds(arms[name], times)
        except Exception as error:
            if failed is None:
                raise
            del samples[name]
            failed(name, error)
            return None

    for name in arms:
        if sample(name, 1) is not None and (once := sample(name, 1)) is not None:
            calls[name] = max(1, math.ceil(sample_s / max(once, 1e-9)))
    order = list(samples)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + budget_s
    gc.collect()
    gc.disable()
    try:
        for done in range(max_rounds):
            if done >= min_rounds and time.perf_counter() > end:
                break
            shuffle(order)
            for name in order:
                if name in samples and (once := sample(name, calls[name])) is not None:
                    samples[name].append(once)
    finally:
        gc.enable()
    return samples
