"""Peak memory of forward + backward, each in a process of its own: Linux only.

The extra memory is the peak of the resident set during the call, over its size just before: the
inputs are there, the gradients are not. Before that, the loss runs once on a tiny batch, which
pays for libraries and thread pools. A compiled loss runs once at the size itself instead, since
that call compiles.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import REPOSITORY

SIZES = (1024, 2048, 4096, 8192)
ARMS = ("contrastive-kit", "eager", "compiled eager", "lightly")
TEMPERATURE = 0.1
_TINY_N = 16


def measure(arms: tuple[str, ...], sizes: tuple[int, ...], d: int = 128) -> list[dict[str, Any]]:
    """Extra MiB for each arm and number of pairs; None with the reason where it could not run."""
    results = []
    for n in sizes:
        for arm in arms:
            print(f"memory of {arm} at N = {n}", file=sys.stderr, flush=True)
            child = subprocess.run(
                [sys.executable, "-m", "benchmarks.memory", arm, str(n), str(d)],
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                check=False,
            )
            result: dict[str, Any] = {"arm": arm, "n": n, "d": d}
            if child.returncode == 0:
                result |= json.loads(child.stdout.splitlines()[-1])
            else:
                result |= {"extra_mib": None, "reason": child.stderr.splitlines()[-1:]}
            results.append(result)
    return results


def extra_mib_here(arm_name: str, n: int, d: int) -> dict[str, Any]:
    """Extra memory of one call in this process, which should be fresh."""
    from benchmarks.loss_arms import NT_XENT, embeddings, forward_backward

    arm = NT_XENT[arm_name]
    loss = arm.build(TEMPERATURE)
    forward_backward(loss, *embeddings(n if arm.compiled else _TINY_N, d))
    z1, z2 = embeddings(n, d)
    gc.collect()
    _return_free_memory()
    was_reset = _reset_peak()
    before = _status_mib("VmRSS")
    grads = forward_backward(loss, z1, z2)
    peak = _status_mib("VmHWM")
    assert grads[0].shape == z1.shape
    return {"extra_mib": peak - before, "before_mib": before, "peak_was_reset": was_reset}


def _return_free_memory() -> None:
    ctypes.CDLL(None).malloc_trim(0)


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Extra memory of one forward + backward, as JSON.")
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("n", type=int, help="pairs")
    parser.add_argument("d", type=int, help="dimension of an embedding")
    arguments = parser.parse_args()
    print(json.dumps(extra_mib_here(arguments.arm, arguments.n, arguments.d)))


if __name__ == "__main__":
    main()
