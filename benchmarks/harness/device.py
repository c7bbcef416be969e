"""The device that is measured on: its clock, memory, launches and own rates.

A dry run takes the CPU for a GPU. It shows that everything runs, and its figures mean nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import machine
from benchmarks.harness.measure import Call, wall_seconds
from contrastive_kit import __version__

_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")
_COPIES = ("cudaMemcpyAsync", "cudaMemsetAsync")


class Device:
    """CUDA device 0 or the CPU.

    Args:
        kind: "cuda" or "cpu"; decides which cases and arms there are.
        dry: run those of "cuda" on the CPU.

    Raises:
        RuntimeError: without CUDA where it is wanted, unless it is a dry run.
    """

    def __init__(self, kind: str, dry: bool = False) -> None:
        if kind == "cuda" and not dry and not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device here; --dry shows that everything runs")
        self.kind = kind
        self.dry = dry
        self.on_gpu = kind == "cuda" and not dry
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        # A dry run traces, and does not wait for generated code to build.
        self.compiler = "aot_eager" if dry else "inductor"

    def seconds(self, call: Call, calls: int) -> float:
        """Seconds per call; on a GPU by CUDA events around all of them."""
        if not self.on_gpu:
            return wall_seconds(call, calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def waited(self, call: Call) -> Call:
        """The call, over when the device is done, for a clock that is not the device's."""
        return (lambda: (call(), torch.cuda.synchronize())) if self.on_gpu else call

    def extra_mib(self, call: Call) -> float:
        """Peak of what tensors take during a call, beyond what they took before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def launches(self, call: Call) -> dict[str, int] | None:
        """Kernels that a call launches, and its copies and fills; None if the profiler saw none."""
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        events = [(event.key, event.count) for event in seen.key_averages()]
        kernels = sum(count for key, count in events if key.startswith(_LAUNCHES))
        copies = sum(count for key, count in events if key.startswith(_COPIES))
        return {"kernels": kernels, "copies": copies} if kernels else None

    def graphed(self, call: Callable[[], Any]) -> tuple[Call, Any]:
        """Capture a call in a CUDA graph; returns the replay and the results that it overwrites.

        Raises:
            RuntimeError: if the call cannot be captured, or if there is no CUDA device.
        """
        if not self.on_gpu:
            raise RuntimeError("CUDA graphs need a CUDA device")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
            # What waits for the device cannot be captured. An attempt would leave torch's generator
            # in the middle of it, and nothing random would run in this process again.
            with forbid_waiting():
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return graph.replay, result

    def free(self) -> None:
        """Give cached memory back, so that one measurement does not starve the next."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def product(self, m: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Call, float]:
        """A product of M × K by K × M into memory allocated before, and its flops."""
        a, b = (torch.randn(m, k, device=self.device, dtype=dtype) for _ in range(2))
        out = torch.empty(m, m, device=self.device, dtype=dtype)
        return lambda: torch.mm(a, b.T, out=out), 2 * m * m * k

    def copy(self) -> tuple[Call, float]:
        """A copy within the device's memory, and the bytes it reads and writes."""
        source = torch.ones(2**12 if self.dry else 2**30, device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2 * source.numel()

    def describe(self) -> dict[str, Any]:
        """What the figures depend on: device, driver, versions, code."""
        about = machine.describe() | {"version": __version__}
        about["device"] = "CPU, dry run" if self.dry else about["processor"]
        if self.on_gpu:
            card = torch.cuda.get_device_properties(0)
            query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i0")
            about |= {
                "device": card.name,
                "memory_gib": round(card.total_memory / 2**30, 1),
                "multiprocessors": card.multi_processor_count,
                "capability": f"{card.major}.{card.minor}",
                "cuda": torch.version.cuda,
                "driver": machine.output(*query),
            }
        return about


@contextmanager
def forbid_waiting() -> Iterator[None]:
    """What waits for the CUDA device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Products of float32 matrices in full precision, or in tf32 where ``precision`` is that."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower()


def breaks_the_device(error: BaseException) -> bool:
    """Whether nothing more can run in this process after this error."""
    sticky = ("CUDA error", "illegal memory access", "device-side assert", "unspecified launch")
    return not is_out_of_memory(error) and any(words in str(error) for words in sticky)


def reason_of(error: BaseException) -> str:
    """A row of a table that says why there is no figure."""
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"not installed ({error})"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
