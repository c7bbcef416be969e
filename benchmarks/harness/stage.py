"""Measure a subject: its cases one after the other, in processes that may break."""

import os
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.harness.device import Device
from benchmarks.harness.machine import Environment
from benchmarks.harness.processes import SPAWN
from benchmarks.harness.store import DeviceBroken, OutOfTime, Store

UNFINISHED = 3  # out of time: run it again to go on
_DEVICE_BROKEN = 75
# What ended a process under an arm, which the next process leaves out: the device or a crash.
_GO_ON = (_DEVICE_BROKEN, -signal.SIGABRT, -signal.SIGSEGV)
_ATTEMPTS, _GRACE_S = 6, 25


class Stage(NamedTuple):
    """A subject, where its results are kept, and on what it is measured, see ``Store``."""

    subject: str
    path: Path
    kind: str
    quick: bool
    dry: bool

    def module(self) -> Any:
        return import_module(f"benchmarks.{self.subject}")

    def store(self, **options: Any) -> Store:
        about = Device(self.kind, self.dry).describe()
        return Store(self.path, about, quick=self.quick, dry=self.dry, **options)


def run(stage: Stage, *, force: bool, limit_s: float) -> int:
    """Measure what is missing, in a process for each environment; returns the exit status.

    Raises:
        RuntimeError: without the device.
        ValueError: if the results were begun elsewhere, see ``Store``.
    """
    end = time.monotonic() + limit_s
    store = stage.store(force=force)
    if store.complete:
        print(f"{stage.subject}: results are there, --force measures again")
    else:
        store.save()
        cases = stage.module().cases(stage.kind, stage.quick)
        for environment in dict.fromkeys(map(Environment.of, cases)):
            status = _supervise(stage, environment, end)
            if status:
                return status
        store = stage.store()
        store.finish()
    failed = [case for case in store.results["cases"] if case.get("failed")]
    for case in failed:
        print(f"FAILED {case['case']}: {case['failed']}", file=sys.stderr)
    return int(bool(failed))


def _supervise(stage: Stage, environment: Environment, end: float) -> int:
    """Start the process again as long as it breaks; end one that hangs."""
    for _ in range(_ATTEMPTS):
        left_s = end - time.monotonic()
        if left_s <= 0:
            break
        process = SPAWN.Process(target=_measure, args=(stage, environment, left_s))
        with mock.patch.dict(os.environ, environment.variables()):
            process.start()
        # It ends in time by itself; the signals are for one that hangs.
        process.join(None if left_s == float("inf") else left_s + _GRACE_S)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGINT)
            process.join(10)
            process.kill()
            process.join()
            break
        if process.exitcode not in _GO_ON:
            return process.exitcode if process.exitcode in (0, UNFINISHED) else 1
    return UNFINISHED


def _measure(stage: Stage, environment: Environment, limit_s: float) -> None:
    """The cases of an environment, in this process."""
    if environment.threads is not None:
        torch.set_num_threads(environment.threads)
    device, module = Device(stage.kind, stage.dry), stage.module()
    store = stage.store(limit_s=limit_s)
    try:
        for case in module.cases(stage.kind, stage.quick):
            if Environment.of(case) != environment or store.has(case._asdict()):
                continue
            store.check_time()
            print(f"{store.left_s():4.0f} s left: {case}", file=sys.stderr, flush=True)
            start = time.monotonic()
            result = module.measure(case, store, device)
            store.add(case._asdict(), result, time.monotonic() - start)
            device.free()
    except OutOfTime:
        print(f"{stage.subject}: out of time; run it again to go on where it stopped")
        sys.exit(UNFINISHED)
    except DeviceBroken:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(_DEVICE_BROKEN)  # without the destructors, which would wait for the device
