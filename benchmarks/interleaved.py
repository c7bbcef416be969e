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
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    q1: float
    q3: float


def spread(values: list[float]) -> Spread:
    """Median and quartiles of at least two values."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3)


class ArmFailed(Exception):
    """An arm raised while it was timed; ``__cause__`` is what it raised."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def wall_seconds(arm: Callable[[], object], calls: int) -> float:
    """Seconds per call by the clock on the wall."""
    start = time.perf_counter()
    for _ in range(calls):
        arm()
    return (time.perf_counter() - start) / calls


def time_survivors(
    arms: Mapping[str, Callable[[], object]],
    failed: Callable[[str, BaseException], object],
    **options: Any,
) -> dict[str, list[float]]:
    """Like ``time_interleaved``, again without an arm that raises, until none does.

    Args:
        arms: name to what is timed.
        failed: told the name and the error of each arm that is left out.
        options: of ``time_interleaved``.
    """
    left = dict(arms)
    while True:
        try:
            return time_interleaved(
                {name: partial(_named, name, arm) for name, arm in left.items()}, **options
            )
        except ArmFailed as failure:
            del left[failure.name]
            failed(failure.name, failure.__cause__ or failure)
            gc.collect()


def _named(name: str, arm: Callable[[], object]) -> None:
    try:
        arm()
    except Exception as error:
        raise ArmFailed(name) from error


def time_interleaved(
    arms: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    sample_s: float = 0.02,
    min_rounds: int = 5,
    max_rounds: int = 100,
    seconds: Callable[[Callable[[], object], int], float] = wall_seconds,
) -> dict[str, list[float]]:
    """Seconds per call of each arm, one number a round.

    Args:
        arms: name to what is timed; each is called twice before the first round.
        budget_s: no round starts after this many seconds, once there are ``min_rounds``.
        sample_s: an arm is called as often within a round as fills this many seconds, so that
            the clock and the loop cost nothing against short calls.
        min_rounds: rounds in any case.
        max_rounds: rounds at most.
        seconds: the clock: takes what is timed and a number of calls, and gives seconds per call.
            What runs on a device needs its own.
    """
    calls = {}
    for name, arm in arms.items():
        arm()
        calls[name] = max(1, math.ceil(sample_s / seconds(arm, 1)))
    samples: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
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
                samples[name].append(seconds(arms[name], calls[name]))
    finally:
        gc.enable()
    return samples
