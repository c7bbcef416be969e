"""Measure a subject: its cases one after the other, in processes that may break."""

import os
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any
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


def run(
    subject: str, path: Path, kind: str, *, quick: bool, dry: bool, force: bool, limit_s: float
) -> int:
    """Measure what is missing, in a process for each environment; returns the exit status.

    Raises:
        RuntimeError: without the device.
        ValueError: if the results were begun elsewhere, see ``Store``.
    """
    end = time.monotonic() + limit_s
    about, modes = Device(kind, dry).describe(), {"quick": quick, "dry": dry}
    store = Store(path, about, **modes, force=force)
    if store.complete:
        print(f"{subject}: results are there, --force measures again")
    else:
        store.save()
        cases = import_module(f"benchmarks.{subject}").cases(kind, quick)
        for environment in dict.fromkeys(map(Environment.of, cases)):
            status = _supervise((subject, path, kind, modes, environment), environment, end)
            if status:
                return status
        store = Store(path, about, **modes)
        store.finish()
    failed = [case for case in store.results["cases"] if case.get("failed")]
    for case in failed:
        print(f"FAILED {case['case']}: {case['failed']}", file=sys.stderr)
    return int(bool(failed))


def _supervise(arguments: tuple[Any, ...], environment: Environment, end: float) -> int:
    """Start the process again as long as it breaks; end one that hangs."""
    for _ in range(_ATTEMPTS):
        left_s = end - time.monotonic()
        if left_s <= 0:
            break
        process = SPAWN.Process(target=_measure, args=(*arguments, left_s))
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


def _measure(
    subject: str, path: Path, kind: str, modes: Any, environment: Environment, limit_s: float
) -> None:
    """The cases of an environment, in this process."""
    module: Any = import_module(f"benchmarks.{subject}")
    if environment.threads is not None:
        torch.set_num_threads(environment.threads)
    device = Device(kind, modes["dry"])
    store = Store(path, device.describe(), **modes, limit_s=limit_s)
    try:
        for case in module.cases(kind, modes["quick"]):
            if Environment.of(case) != environment or store.has(case._asdict()):
                continue
            store.check_time()
            print(f"{store.left_s():4.0f} s left: {case}", file=sys.stderr, flush=True)
            start = time.monotonic()
            result = module.measure(case, store, device)
            store.add(case._asdict(), result, time.monotonic() - start)
            device.free()
    except OutOfTime:
        print(f"{subject}: out of time; run it again to go on where it stopped")
        sys.exit(UNFINISHED)
    except DeviceBroken:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(_DEVICE_BROKEN)  # without the destructors, which would wait for the device
