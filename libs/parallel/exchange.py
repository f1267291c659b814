"""What ranks tell each other outside of training's own tensors: a choice of rank 0, a stop, a number that is bad, and
who is gone.

Small and on the CPU, whatever the device. Not for agreement on the set-up before step 1 (`launch.agree`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from libs.flags.errors import UserError
from libs.parallel.launch import DEFAULT_TIMEOUT
from libs.parallel.mesh import Group, Groups, KeyValueStore

_WORDS = "last-words"
# A rank that is alive sees a broken connection at once, and a peer that hangs when its own timeout ends.
_GRACE = timedelta(seconds=5)
# What gloo and NCCL say when a peer is gone or late; neither has an exception type of its own for it.
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "broken pipe")


class RanksLost(RuntimeError):
    """Other ranks of the job are gone or hang, so this one cannot go on either (exit status 1)."""


def from_rank_zero(
    groups: Groups, what: str, make: Callable[[], dict[str, Any]], *, timeout: timedelta = DEFAULT_TIMEOUT
) -> dict[str, Any]:
    """What `make` returns on rank 0 (JSON values), on every rank; it is called there only.

    Args:
        what: names the exchange in errors; every rank calls with the same, and once per job.

    Raises:
        UserError: on every rank, when `make` raised one. RanksLost: rank 0 does not answer.
    """
    store, key = groups.store, f"from-zero/{what}"
    if groups.world.rank == 0:
        try:
            made = make()
        except UserError as error:
            if store is not None:
                store.set(key, json.dumps({"error": str(error)}))
            raise
        if store is not None:
            store.set(key, json.dumps({"made": made}))
        return made
    assert store is not None, "groups of several ranks come from `connect`"
    try:
        store.wait([key], timeout)
    except dist.DistError as error:
        raise RanksLost(f"rank 0 did not tell {what} within {timeout.total_seconds():g} s") from error
    told = json.loads(store.get(key))
    if "error" in told:
        raise UserError(f"rank 0: {told['error']}")
    answer: dict[str, Any] = told["made"]
    return answer


def gather_numbers(group: Group, numbers: Sequence[float]) -> list[list[float]]:
    """The numbers of every rank of the group, in rank order, as fp64."""
    rows: list[list[float]] = group.all_gather(torch.tensor(numbers, dtype=torch.float64)).tolist()
    return rows


def sum_numbers(group: Group, numbers: Sequence[float]) -> list[float]:
    """Sums over the group in fp64, the same on every rank."""
    summed: list[float] = group.all_reduce_(torch.tensor(numbers, dtype=torch.float64)).tolist()
    return summed


@contextmanager
def last_words(groups: Groups) -> Iterator[None]:
    """Tell the others why this rank leaves by an exception; find out who is gone when it is for lack of them.

    Raises:
        RanksLost: instead of the library's error of a broken or late collective, naming ranks and what they said.
    """
    store, me = groups.store, groups.world.rank
    if store is None:
        yield
        return
    try:
        yield
    except RanksLost:
        raise
    except Exception as error:
        if not _is_lost_contact(error):
            _say(store, me, f"{type(error).__name__}: {error}")
            raise
        _say(store, me, "")
        gone = who_is_gone(groups)
        listed = "; ".join(f"rank {rank} {why}" for rank, why in gone.items()) or "no rank left a word"
        raise RanksLost(f"rank {me} lost contact: {listed} ({_first_line(error)})") from error


def who_is_gone(groups: Groups, patience: timedelta = _GRACE) -> dict[int, str]:
    """Ranks that left for a reason of their own (told), and those that say nothing: they are dead or hang.

    Ranks that merely lost contact too are not in it.
    """
    store, size = groups.store, groups.world.size
    assert store is not None, "a single process loses nobody"
    deadline = time.monotonic() + patience.total_seconds()
    said: dict[int, str | None] = {}
    for rank in range(size):
        left = max(deadline - time.monotonic(), 0.01)
        try:
            store.wait([f"{_WORDS}/{rank}"], timedelta(seconds=left))
            said[rank] = store.get(f"{_WORDS}/{rank}").decode()
        except (dist.DistError, RuntimeError):
            said[rank] = None
    silent = "does not answer: it died or hangs"
    return {rank: silent if why is None else f"stopped: {why}" for rank, why in said.items() if why != ""}


def _say(store: KeyValueStore, rank: int, words: str) -> None:
    try:
        store.set(f"{_WORDS}/{rank}", words)
    except (dist.DistError, RuntimeError):
        return  # the store is gone with the rank that hosted it; the others will see that for themselves


def _is_lost_contact(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _LOST)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
