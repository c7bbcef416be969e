"""Processes that stand for the ranks of a training job, kept alive for many checks.

A check is a function ``check(rank, size, *args)`` at the top level of a test file; every process
loads that file and runs it. Starting a process costs seconds, a check milliseconds.
"""

import datetime
import importlib.util
import multiprocessing
import os
import tempfile
import time
import traceback
from functools import cache

import torch
import torch.distributed as dist

# Seconds. On a machine that does other work, the processes alone may take a minute to start.
TIME_OUT = 240

# What takes long to import, once instead of once a process.
_PRELOADED = [
    "pytest",
    "torch.testing",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "contrastive_kit.functional",
]


class Failed(AssertionError):
    """A check failed on a rank, or a rank died; carries what each rank said."""


class World:
    """``size`` processes in one gloo process group."""

    def __init__(self, size):
        self.size = size
        self.processes = []

    def start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.folder = tempfile.TemporaryDirectory()
        meeting_point = f"file://{self.folder.name}/store"
        self.connections, self.processes = [], []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, meeting_point, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def stop(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes = []

    def answers(self, check, *args, time_out=TIME_OUT):
        """What each rank answers: ("returned", value), ("raised", traceback) or ("died", why)."""
        if not self.processes:
            self.start()
        for connection in self.connections:
            connection.send((check.__code__.co_filename, check.__name__, args))
        deadline = time.monotonic() + time_out
        results = []
        for connection in self.connections:
            try:
                if not connection.poll(max(0, deadline - time.monotonic())):
                    results.append(("died", f"no answer within {time_out} s"))
                    continue
                results.append(connection.recv())
            except (EOFError, ConnectionResetError):
                results.append(("died", "the process ended"))
            if results[-1][0] != "returned":
                # The others may wait for this one forever.
                deadline = min(deadline, time.monotonic() + 30)
        if any(kind != "returned" for kind, _ in results):
            self.stop()
        return results

    def run(self, check, *args):
        """Run a check on every rank; returns their values, or fails with what they said."""
        results = self.answers(check, *args)
        if any(kind != "returned" for kind, _ in results):
            raise Failed(
                "\n".join(
                    f"rank {rank} {kind}: {text}" for rank, (kind, text) in enumerate(results)
                )
            )
        return [value for _, value in results]


def _serve(rank, size, meeting_point, connection):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=meeting_point,
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIME_OUT / 2),
    )
    while True:
        try:
            path, name, args = connection.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = ("returned", getattr(_load(path), name)(rank, size, *args))
        except BaseException:  # what pytest.fail raises is no Exception
            answer = ("raised", traceback.format_exc())
        connection.send(answer)


@cache
def _load(path):
    spec = importlib.util.spec_from_file_location("check", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
