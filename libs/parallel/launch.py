"""Joining and leaving the job: the process group of `torchrun`, its timeout, and the agreement before step 1.

Not for the layout (`mesh`) nor for starting processes: torchrun, Slurm or Kubernetes do that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from libs.flags.environment import Launch, launch
from libs.flags.errors import RunRefused, UserError
from libs.parallel.mesh import Groups, KeyValueStore, Layout, check_layout, open_groups

# Long enough for a slow first collective, short enough that a dead peer does not hold eight GPUs for half an hour.
DEFAULT_TIMEOUT = timedelta(seconds=60)
# Ranks leave an agreement together if they can: the first to exit may be the one that hosts the store.
_LEAVE_TOGETHER = timedelta(seconds=5)


class _Item(NamedTuple):
    """One item on which a rank differs from rank 0."""

    name: str
    rank: int
    value: str | None
    expected: str | None

    def __str__(self) -> str:
        shown = ["missing" if value is None else repr(value) for value in (self.value, self.expected)]
        return f"rank {self.rank} differs in {self.name}: {shown[0]}, but rank 0 has {shown[1]}"


@contextmanager
def connect(
    layout: Layout,
    *,
    backend: str,
    timeout: timedelta = DEFAULT_TIMEOUT,
    this: Launch | None = None,
    even_alone: bool = False,
) -> Iterator[Groups]:
    """Join the job that torchrun started, make the layout's groups, and leave it whatever happens.

    A single process opens no process group, unless `even_alone`: a library may ask for one (its groups here are still
    those of one process). `this`: the launch, read from the environment by default.

    Raises:
        UserError: the layout does not fit the number of processes, or the others could not be reached in time.
    """
    this = launch() if this is None else this
    check_layout(layout, this.world_size)
    if this.world_size == 1 and not even_alone:
        yield open_groups(layout, backend, timeout)
        return
    for_torch, for_us = (_hash_store(), None) if this.world_size == 1 else _stores(this, timeout)
    dist.init_process_group(backend, store=for_torch, rank=this.rank, world_size=this.world_size, timeout=timeout)
    try:
        yield open_groups(layout, backend, timeout, store=for_us)
    finally:
        dist.destroy_process_group()


def _stores(this: Launch, timeout: timedelta) -> tuple[Any, Any]:
    """Torch's part of the rendezvous store, and ours."""
    store = _rendezvous(this, timeout)
    # The agent's store may outlive a restart, and what dead ranks left in it must not be read again.
    return _prefixed(f"torch/{this.attempt}", store), _prefixed(f"fathom/{this.attempt}", store)


def _hash_store() -> Any:
    """A store inside this process."""
    return dist.HashStore()  # type: ignore[attr-defined]


def _prefixed(prefix: str, store: Any) -> Any:
    """A part of the store with its own names."""
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def _rendezvous(this: Launch, timeout: timedelta) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT, or the agent's own under torchrun; torch knows which."""
    try:
        return next(dist.rendezvous("env://", this.rank, this.world_size, timeout=timeout))[0]  # type: ignore[attr-defined]
    except (ValueError, dist.DistError) as error:
        raise UserError(
            f"rank {this.rank} of {this.world_size} could not join the job within {timeout.total_seconds():g} s: "
            f"{error}; start with torchrun, and check that all ranks started"
        ) from error


def agree(groups: Groups, items: Mapping[str, str], *, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
    """Return when all ranks brought the same items (gates, config, data, code); else stop every rank alike.

    Talks through the rendezvous store, not through a collective: a rank that never comes is named, not just missed.

    Args:
        items: {what: a value or hash}; shown in the refusal.
        timeout: how long a rank may be late.

    Raises:
        RunRefused: on every rank (exit status 78), naming each rank and item that differ from rank 0, or each rank
            that did not answer.
    """
    store, me, size = groups.store, groups.world.rank, groups.world.size
    if size == 1:
        return
    assert store is not None, "groups of several ranks come from `connect`"
    turn = store.add(f"agree/turn/{me}", 1)
    store.set(f"agree/{turn}/{me}", json.dumps(dict(items)))
    late = _wait_for(store, {rank: f"agree/{turn}/{rank}" for rank in range(size)}, timeout)
    failures = [f"rank {rank} did not answer within {timeout.total_seconds():g} s" for rank in late]
    subjects = set(items)
    if not late:
        brought = [json.loads(store.get(f"agree/{turn}/{rank}")) for rank in range(size)]
        differing = _differences(brought)
        failures = [str(item) for item in differing]
        subjects = {item.name for item in differing}
    store.set(f"agree/{turn}/left/{me}", "")
    with suppress(dist.DistNetworkError):  # the rank that hosts the store has seen all of them and is gone
        _wait_for(
            store, {rank: f"agree/{turn}/left/{rank}" for rank in range(size) if rank not in late}, _LEAVE_TOGETHER
        )
    if failures:
        listed = "\n  - ".join(failures)
        raise RunRefused(
            f"the {size} ranks of this job do not agree on {', '.join(sorted(subjects))}:\n  - {listed}\n"
            "  remedy: start every rank from the same code, config, data and FATHOM_ variables"
        )


def _wait_for(store: KeyValueStore, keys: Mapping[int, str], timeout: timedelta) -> list[int]:
    """Ranks whose key did not appear in time."""
    deadline = time.monotonic() + timeout.total_seconds()
    late = []
    for rank, key in keys.items():
        left = max(deadline - time.monotonic(), 0.001)
        try:
            store.wait([key], timedelta(seconds=left))
        except dist.DistStoreError:
            late.append(rank)
    return late


def _differences(brought: list[dict[str, str]]) -> list[_Item]:
    """What each rank has other than rank 0, by rank and then by name.

    What is missing on one side is told only where nothing else differs: a rank that failed early brings little.
    """
    first, found = brought[0], []
    for rank, theirs in enumerate(brought):
        names = [name for name in sorted(first.keys() | theirs.keys()) if theirs.get(name) != first.get(name)]
        on_both = [name for name in names if name in first and name in theirs]
        found += [_Item(name, rank, theirs.get(name), first.get(name)) for name in on_both or names]
    return found
