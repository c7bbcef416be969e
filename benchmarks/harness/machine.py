"""What a figure depends on besides the code: versions, processor, threads, date, commit."""

import datetime
import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"

_PACKAGES = (
    "contrastive-kit", "torch", "torchvision", "kornia", "lightly", "pytorch-metric-learning",
    "open_clip_torch", "info-nce-pytorch", "albumentations", "pillow",
)  # fmt: skip
_ON_A_GPU = ("triton", "inf_cl", "cut-cross-entropy", "siglip-kernel", "memeff")
# glibc returns large blocks to the system at each call; these settings make it keep them.
_KEEPS_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


class Environment(NamedTuple):
    """How a process is started in which cases are measured."""

    allocator: str = "default"  # or "tuned": freed memory is kept
    threads: int | None = None  # of torch; None for its own choice

    @classmethod
    def of(cls, case: Any) -> "Environment":
        """The one that a case asks for."""
        return cls(getattr(case, "allocator", "default"), getattr(case, "threads", None))

    def variables(self) -> dict[str, str]:
        """Of the process, read when it starts."""
        found = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        return found | (_KEEPS_FREED_MEMORY if self.allocator == "tuned" else {})


def describe() -> dict[str, Any]:
    """Versions, machine, date and commit, as they are now."""
    on_a_gpu = _ON_A_GPU if torch.cuda.is_available() else ()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(
            output("git", "status", "--porcelain", "--", "contrastive_kit", "benchmarks/**/*.py")
        ),
        "source": _source_digest(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "blas": "MKL" if torch.backends.mkl.is_available() else "other",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in (*_PACKAGES, *on_a_gpu)},
        "load_average": load_average(),
    }


def load_average() -> float:
    """Processes that wanted a core, on average over the last minute."""
    return round(os.getloadavg()[0], 2)


def output(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _source_digest() -> str:
    """Eight digits that change with the library's code: figures of two versions are not mixed."""
    digest = hashlib.sha256()
    for path in sorted((REPOSITORY / "contrastive_kit").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
