"""Functions in processes of their own: one that is fresh, or several that form a group."""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

SPAWN = multiprocessing.get_context("spawn")


def fresh(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns in a new process."""
    with ProcessPoolExecutor(1, SPAWN) as pool:
        return pool.submit(function, *arguments).result()


def world(function: Callable[..., Any], size: int, *arguments: object) -> list[Any]:
    """What ``function(rank, *arguments)`` returns in each process of a gloo group, by rank."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, SPAWN) as pool:
        ranks = [
            pool.submit(_rank, function, rank, size, f"file://{folder}/store", arguments)
            for rank in range(size)
        ]
        return [rank.result() for rank in ranks]


def _rank(
    function: Callable[..., Any], rank: int, size: int, store: str, arguments: tuple[object, ...]
) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        return function(rank, *arguments)
    finally:
        dist.destroy_process_group()
