"""What a run needs of its surroundings: processes, signals, time, files."""

import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import contrastive_kit
from train.config import UserError


class World(NamedTuple):
    """The processes of a run, and which of them this is; one without torchrun."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def say(self, text: str) -> None:
        """Print once, not once a process."""
        if self.rank == 0:
            print(text, flush=True)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of what the processes have."""
        x = x.clone()
        if self.size > 1:
            dist.all_reduce(x)
        return x / self.size

    def any(self, condition: bool) -> bool:
        """Whether it holds in any process."""
        if self.size == 1:
            return condition
        return bool(self.mean(torch.tensor(float(condition), device=self.device)) > 0)


def enter_world(device_name: str | None) -> World:
    """Join the processes that torchrun started, if it did."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    if size > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # batches have one size
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(timeout=datetime.timedelta(hours=1))
    return World(device, rank, size)


class StopRequest:
    """True after Ctrl-C or SIGTERM, or when the time is up: a wish to stop at the next step.

    Used as a context manager. A second signal acts at once, as it would without this.
    """

    def __init__(self, minutes: float | None) -> None:
        self.deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.signal: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread hears signals
                self.previous[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, *_error: object) -> None:
        while self.previous:
            signal.signal(*self.previous.popitem())

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Remember the signal, and let a second one do what it did before."""
        self.signal = number
        self.__exit__()

    def __bool__(self) -> bool:
        return self.signal is not None or time.monotonic() >= self.deadline

    @property
    def reason(self) -> str:
        """What asked."""
        return "time is up" if self.signal is None else signal.Signals(self.signal).name


class Stopwatch:
    """Where the time goes; on CUDA measured there, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """What was done since the last mark is `name`; the first mark only begins."""
        now: Any = time.perf_counter()
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((name, now))

    def add_to(self, seconds: dict[str, float]) -> None:
        """Add the seconds of each name to what is there; the next mark begins anew."""
        if self.cuda:
            torch.cuda.synchronize()
        for (_, before), (name, now) in zip(self.marks, self.marks[1:], strict=False):
            passed = before.elapsed_time(now) / 1000 if self.cuda else now - before
            seconds[name] = seconds.get(name, 0.0) + passed
        self.marks = []


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, then put it in place: a crash or full disk leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # as on a file system that is read-only
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); what was there is unchanged") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON that a person can read."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def about(world: World) -> dict[str, Any]:
    """Versions, machine and commit, as they are now."""
    cuda = world.device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(world.device) if cuda else str(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "contrastive_kit": contrastive_kit.__version__,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": git(
            "status", "--porcelain", "--", ":/contrastive_kit", ":/examples"
        ),
        "torch": str(torch.__version__),
        **{name: version(name) for name in ("torchvision", "kornia", "einops")},
    }


def git(*arguments: str) -> str | None:
    """What git says of the repository of this file; None without git or a repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip()
    except (OSError, subprocess.CalledProcessError):
        return None
