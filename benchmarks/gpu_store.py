"""The results of a stage as they come in: a JSON file that is whole after every case."""

import json
import os
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu_device import breaks_the_device

# What of the machine must be the same for cases to stand in one table.
_IDENTITY = ("device", "driver", "source")


class OutOfTime(Exception):
    """The next case would not fit into what is left of the stage's time."""


class DeviceBroken(Exception):
    """The device refuses everything after an error: the stage goes on in a new process."""


class Store:
    """Cases of a stage, in order, each kept once it is measured.

    A case that was cut short leaves a mark, so that the arm which broke the device or hung is left
    out when the stage goes on.

    Args:
        path: the JSON file; an unfinished one is continued.
        about: the machine, see ``Device.describe``.
        dry: whether the figures mean nothing.
        force: begin again even if the file is finished.
        limit_s: no case starts if it might end after this many seconds.

    Raises:
        ValueError: if the unfinished file was begun on another device, driver or version, or if a
            dry run would go on with a real one or the other way.
    """

    def __init__(
        self, path: Path, about: dict[str, Any], *, dry: bool, force: bool, limit_s: float
    ) -> None:
        self._path = path
        self._end = time.monotonic() + limit_s
        self._longest_s = 0.0
        fresh = {"dry": dry, "complete": False, "machine": about, "seconds": 0.0}
        self.results: dict[str, Any] = {**fresh, "broke": [], "running": None, "cases": []}
        if path.exists() and not force:
            self.results = json.loads(path.read_text())
            begun = self.results["machine"]
            if self.results["dry"] != dry:
                raise ValueError(f"{path} is of {'a real' if dry else 'a dry'} run")
            for name in _IDENTITY:
                if not self.results["complete"] and begun.get(name) != about.get(name):
                    raise ValueError(
                        f"{path} was begun with {name} {begun.get(name)!r}, here it is "
                        f"{about.get(name)!r}: --force begins again"
                    )
            if self.results["running"]:
                self.results["broke"].append(self.results["running"])
        self._done = {self._key(case["case"]) for case in self.results["cases"]}

    @property
    def complete(self) -> bool:
        """Whether every case was measured, here or in an earlier run."""
        done: bool = self.results["complete"]
        return done

    def left_s(self) -> float:
        """Seconds until the stage must end."""
        return self._end - time.monotonic()

    def has(self, case: dict[str, Any]) -> bool:
        """Whether the case is measured."""
        return self._key(case) in self._done

    def broke(self, case: dict[str, Any], arm: str) -> bool:
        """Whether this arm ended an earlier process in this case."""
        return [case, arm] in self.results["broke"]

    @contextmanager
    def running(self, case: dict[str, Any], arm: str) -> Iterator[None]:
        """Mark what runs, for the case that the process does not survive it.

        Raises:
            DeviceBroken: if the device cannot be used any more.
        """
        self.results["running"] = [case, arm]
        self._write()
        try:
            yield
        except Exception as error:
            if breaks_the_device(error):  # the mark stays
                raise DeviceBroken(f"{arm} at {case}: {error}") from error
            self.results["running"] = None
            raise
        except KeyboardInterrupt:
            self.results["running"] = None
            self._write()
            raise
        self.results["running"] = None

    def check_time(self) -> None:
        """Raise ``OutOfTime`` unless a case as long as the longest so far still fits."""
        if self.left_s() < 1.2 * self._longest_s:
            raise OutOfTime

    def add(self, case: dict[str, Any], result: dict[str, Any], seconds: float) -> None:
        """Keep a case."""
        self.results["cases"].append({"case": case, **result})
        self.results["seconds"] += seconds
        self.results["running"] = None
        self._longest_s = max(self._longest_s, seconds)
        self._done.add(self._key(case))
        self._write()

    def finish(self) -> None:
        """Mark the stage as complete."""
        self.results["complete"] = True
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(temporary, self._path)

    @staticmethod
    def _key(case: dict[str, Any]) -> Hashable:
        return json.dumps(case, sort_keys=True)
