"""Peak memory of one call in this process, which should be fresh: Linux only."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_of(call: Callable[[], object]) -> dict[str, Any]:
    """The peak of the resident set during a call over its size just before, and its seconds.

    What the call was given counts as before, what it returns does not.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    was_reset = _reset_peak()
    before = _status_mib("VmRSS")
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    peak = _status_mib("VmHWM")
    del result
    return {
        "extra_mib": peak - before,
        "before_mib": before,
        "peak_was_reset": was_reset,
        "seconds": seconds,
    }


def _reset_peak() -> bool:
    """Start a new peak; where the kernel refuses, the peak so far stays, and can only be higher."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this needs Linux")
