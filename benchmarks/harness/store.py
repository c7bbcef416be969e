"""The results of a subject as they come in: a JSON file that is whole after every case."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.harness.device import Device, breaks_the_device, reason_of
from benchmarks.harness.machine import load_average
from benchmarks.harness.measure import Call, time_interleaved

Case = dict[str, Any]
Results = dict[str, Any]
T = TypeVar("T")

# What must be the same for cases to stand in one table.
_IDENTITY = ("device", "driver", "source", "quick", "dry")


class OutOfTime(Exception):
    """The next case would not fit into what is left of the time."""


class DeviceBroken(Exception):
    """The device refuses everything after an error: go on in a new process."""


class Store:
    """Cases of a subject, in order, each kept once it is measured.

    A case that was cut short leaves a mark, so that the arm which broke the device or hung is left
    out when a later process goes on.

    An unfinished file is continued, a finished one of the same machine and source is kept, another
    finished one is replaced; ``force`` begins again in any case. No case starts if it might end
    after ``limit_s`` seconds.

    Raises:
        ValueError: if the unfinished file was begun on another device, driver or version, or in
            another mode: quick (too small for figures), dry (a CPU in place of the device).
    """

    def __init__(
        self, path: Path, about: dict[str, Any], *, quick: bool = False, dry: bool = False,
        force: bool = False, limit_s: float = float("inf"),
    ) -> None:  # fmt: skip
        self._path = path
        self._end = time.monotonic() + limit_s
        self._longest_s = 0.0
        self.results: Results = {
            "quick": quick, "dry": dry, "complete": False, "machine": about, "seconds": 0.0,
            "load_average_after": None, "broke": [], "running": None, "cases": [],
        }  # fmt: skip
        if path.exists() and not force:
            self._continue(json.loads(path.read_text()))

    def _continue(self, begun: Results) -> None:
        was, now = ({**of["machine"], **of} for of in (begun, self.results))
        differing = [
            f"{name} {was.get(name)!r}, here it is {now.get(name)!r}"
            for name in _IDENTITY
            if was.get(name) != now.get(name)
        ]
        if not differing:
            self.results = begun
            begun["broke"] += [begun["running"]] if begun["running"] else []
            begun["running"] = None
        elif not begun["complete"] or begun["dry"] != now["dry"]:
            begun_with = f"{self._path} was begun with {'; '.join(differing)}"
            raise ValueError(f"{begun_with}: --force begins again")

    @property
    def complete(self) -> bool:
        """Whether every case was measured, here or in an earlier run."""
        return bool(self.results["complete"])

    def left_s(self) -> float:
        return self._end - time.monotonic()

    def has(self, case: Case) -> bool:
        return any(_same(case, c["case"]) for c in self.results["cases"])

    def broke(self, case: Case, arm: str) -> bool:
        """Whether this arm ended an earlier process in this case."""
        return any(_same(case, c) and arm == name for c, name in self.results["broke"])

    @contextmanager
    def running(self, case: Case, arm: str) -> Iterator[None]:
        """Mark what runs, for the case that the process does not survive it.

        Raises:
            DeviceBroken: if the device cannot be used any more.
        """
        self.results["running"] = [case, arm]
        self.save()
        try:
            yield
        except Exception as error:
            if breaks_the_device(error):
                self.results["broke"].append([case, arm])
                raise DeviceBroken(f"{arm} at {case}: {error}") from error
            raise
        finally:
            self.results["running"] = None
            self.save()

    def check_time(self) -> None:
        """Raise ``OutOfTime`` unless a case as long as the longest so far still fits."""
        if self.left_s() < 1.2 * self._longest_s:
            raise OutOfTime

    def add(self, case: Case, result: dict[str, Any], seconds: float) -> None:
        self.results["cases"].append({"case": case, **result})
        self.results["seconds"] += seconds
        self.results["load_average_after"] = load_average()
        self._longest_s = max(self._longest_s, seconds)
        self.save()

    def finish(self) -> None:
        self.results["complete"] = True
        self.save()

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")
        os.replace(temporary, self._path)


class Trial:
    """One case while it is measured: what fails is left out, with the reason in ``absent``."""

    def __init__(self, case: Any, store: Store, device: Device) -> None:
        self._case: Case = case._asdict()
        self._store = store
        self.device = device
        self.absent: dict[str, str] = {}
        self.result: dict[str, Any] = {"memory": {}, "launches": {}}

    def run(self, name: str, function: Callable[[], T]) -> T | None:
        """What an arm returns, or None if it raises or broke the device before.

        Raises:
            DeviceBroken: if it leaves the device unusable.
        """
        if self._store.broke(self._case, name):
            self.absent[name] = "broke the device, crashed or hung in this case"
            return None
        try:
            with self._store.running(self._case, name):
                return function()
        except DeviceBroken:
            raise
        except Exception as error:  # a peer may fail in any way: its row says how
            self.absent[name] = reason_of(error)
        finally:
            self.device.free()
        return None

    def observe(self, name: str, call: Call) -> None:
        """Keep memory and launches of a call on a GPU."""
        if self.device.on_gpu:
            self.result["memory"][name] = {"extra_mib": self.device.extra_mib(call)}
            self.result["launches"][name] = self.device.launches(call)

    def time(
        self, step: str, calls: Mapping[str, Call], label: str = "{}", **options: Any
    ) -> dict[str, list[float]]:
        """``time_interleaved`` of the arms that survive it; of few rounds in a dry run.

        ``step`` names all of it in ``absent``, ``label`` an arm.
        """

        def failed(name: str, error: Exception) -> None:
            if breaks_the_device(error):
                raise error
            self.absent[label.format(name)] = reason_of(error)
            self.device.free()

        if self.device.dry:
            options |= {"budget_s": 0.0, "sample_s": 0.0, "min_rounds": 2}
        options |= {"seconds": self.device.seconds, "failed": failed}
        return (
            self.run(step, partial(time_interleaved, calls, **options)) if calls else None
        ) or {}

    def outcome(self, ours: str) -> dict[str, Any]:
        """The result, a failure if ours is left out."""
        failed = {"failed": self.absent[ours]} if ours in self.absent else {}
        return {**self.result, **failed, "absent": self.absent}


def _same(case: Case, other: Case) -> bool:
    """Whether two cases are one in JSON, which has no tuples."""
    return json.dumps(case, sort_keys=True) == json.dumps(other, sort_keys=True)
