"""The device that the GPU benchmarks measure on: its clock, memory, launches and own rates.

A dry run takes the CPU for the device. It shows that everything runs, and its figures mean nothing.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine
from benchmarks.interleaved import wall_seconds
from contrastive_kit import __version__

Call = Callable[[], object]

GEMM, COPY = "GEMM", "copy"
_GEMM_SIDE, _COPY_BYTES = 8192, 2**30
_DRY_GEMM_SIDE, _DRY_COPY_BYTES = 64, 2**12
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")
_COPIES = ("cudaMemcpyAsync", "cudaMemsetAsync")
_PACKAGES = (
    "torch", "triton", "kornia", "lightly", "open_clip_torch", "pytorch-metric-learning", "inf_cl",
    "cut-cross-entropy",
)  # fmt: skip


class Device:
    """CUDA device 0, or the CPU where ``dry``.

    Raises:
        RuntimeError: without CUDA, unless it is a dry run.
    """

    def __init__(self, dry: bool) -> None:
        if not dry and not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device here; --dry shows that everything runs")
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")

    def seconds(self, call: Call, calls: int) -> float:
        """Seconds per call, by CUDA events around all of them."""
        if self.dry:
            return wall_seconds(call, calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def extra_mib(self, call: Call) -> float | None:
        """Peak of the memory that tensors take during a call, beyond what they took before."""
        if self.dry:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def launches(self, call: Call) -> dict[str, int] | None:
        """Kernels that a call launches, and its copies and fills; None if the profiler saw none."""
        activities = [ProfilerActivity.CPU] + ([] if self.dry else [ProfilerActivity.CUDA])
        with profile(activities=activities) as seen:
            call()
            self.synchronize()
        counts = {event.key: event.count for event in seen.key_averages()}

        def total(prefixes: tuple[str, ...]) -> int:
            return sum(count for key, count in counts.items() if key.startswith(prefixes))

        kernels = total(_LAUNCHES)
        return {"kernels": kernels, "copies": total(_COPIES)} if kernels else None

    def graphed(self, call: Callable[[], Any]) -> tuple[Call, Any]:
        """Capture a call in a CUDA graph; returns the replay and the results that it overwrites.

        Raises:
            RuntimeError: if the call cannot be captured, or if there is no CUDA device.
        """
        if self.dry:
            raise RuntimeError("CUDA graphs need a CUDA device")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
            # What waits for the device cannot be captured. An attempt would leave torch's generator
            # in the middle of it, and nothing random would run in this process again.
            torch.cuda.set_sync_debug_mode("error")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return graph.replay, result

    def free(self) -> None:
        """Give cached memory back, so that one measurement does not starve the next."""
        if not self.dry:
            torch.cuda.empty_cache()

    def rate_calls(self, precision: str) -> dict[str, tuple[Call, float]]:
        """A square matrix product and a copy: what runs, and its flops or bytes."""
        side = _DRY_GEMM_SIDE if self.dry else _GEMM_SIDE
        n_bytes = _DRY_COPY_BYTES if self.dry else _COPY_BYTES
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(a)
        source = torch.randint(0, 256, (n_bytes,), device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        return {
            GEMM: (lambda: torch.mm(a, b, out=product), 2 * side**3),
            COPY: (lambda: target.copy_(source), 2 * n_bytes),
        }

    def describe(self) -> dict[str, Any]:
        """What the figures depend on: device, driver, versions, code."""
        about = machine.describe()
        about |= {"packages": {name: machine.version(name) for name in _PACKAGES}}
        about |= {"version": __version__, "source": source_digest(), "device": "CPU, dry run"}
        if not self.dry:
            properties = torch.cuda.get_device_properties(0)
            about |= {
                "device": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
                "capability": f"{properties.major}.{properties.minor}",
                "cuda": torch.version.cuda,
                "driver": _driver(),
            }
        return about


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


def source_digest() -> str:
    """Eight digits that change with the library's code: figures of two versions are not mixed."""
    digest = hashlib.sha256()
    for path in sorted((machine.REPOSITORY / "contrastive_kit").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _driver() -> str | None:
    return machine.output(
        "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i0"
    )
