"""A process group of threads: every rank of a group in one process, so that many small cases stay cheap.

The exchange itself is checked with real processes (gloo); this double is for the mathematics around it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from libs.parallel.mesh import Group

T = TypeVar("T")
SECONDS = 60.0


class Exchange:
    """What the threads of one group share, and a log of (operation, bytes given by one rank)."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=SECONDS)
        self.given: list[Tensor | None] = [None] * size
        self.log: list[tuple[str, int]] = []

    def swap(self, rank: int, tensor: Tensor, name: str) -> list[Tensor]:
        """Every rank's tensor, in order."""
        self.given[rank] = tensor.detach()
        self.barrier.wait()
        everyone = [given for given in self.given if given is not None]
        if rank == 0:
            self.log.append((name, tensor.numel() * tensor.element_size()))
        assert len({given.shape for given in everyone}) == 1, "ranks give different shapes"
        self.barrier.wait()
        return everyone


@dataclass(frozen=True, eq=False)
class ThreadGroup(Group):
    """A `Group` whose peers are threads."""

    exchange: Exchange | None = None

    def __post_init__(self) -> None:
        assert self.exchange is not None

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.exchange.swap(self.rank, tensor, "all_gather"))

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        assert tensor.shape[0] == self.size
        return sum(given[self.rank] for given in self.exchange.swap(self.rank, tensor, "reduce_scatter"))


def on_threads(size: int, work: Callable[[Group], T]) -> tuple[list[T], Exchange]:
    """work(group) on every rank of a group of `size` threads; the results in rank order, and what was exchanged."""
    exchange = Exchange(size)

    def run(rank: int) -> T:
        try:
            return work(ThreadGroup(None, rank, size, tuple(range(size)), exchange))
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures], exchange
