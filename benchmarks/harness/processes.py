"""Functions in processes of their own, and the peak memory of a call in one that is fresh."""

import ctypes
import gc
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SPAWN = multiprocessing.get_context("spawn")


def fresh(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns in a new process."""
    with ProcessPoolExecutor(1, SPAWN) as pool:
        return pool.submit(function, *arguments).result()


def world(function: Callable[..., Any], size: int, *arguments: object) -> list[Any]:
    """What ``function(rank, *arguments)`` returns in each process of a gloo group, by rank."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, SPAWN) as pool:
        ranks = [
            pool.submit(_rank, function, rank, size, f"file://{folder}/store", arguments)
            for rank in range(size)
        ]
        return [rank.result() for rank in ranks]


def _rank(
    function: Callable[..., Any], rank: int, size: int, store: str, arguments: tuple[object, ...]
) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        return function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def peak_of(call: Callable[[], object]) -> dict[str, Any]:
    """The peak of the resident set during a call over its size just before; Linux only.

    What the call was given counts as before, what it returns does not.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        was_reset = bool(Path("/proc/self/clear_refs").write_text("5"))
    except OSError:  # the peak so far stays, and can only be higher
        was_reset = False
    before = _status_mib("VmRSS")
    start = time.perf_counter()
    result = call()
    seconds, peak = time.perf_counter() - start, _status_mib("VmHWM")
    del result
    memory = {"extra_mib": peak - before, "before_mib": before, "peak_was_reset": was_reset}
    return memory | {"seconds": seconds}


def _status_mib(field: str) -> float:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}: this needs Linux")
    return int(found[1]) / 1024
