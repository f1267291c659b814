"""Failing together: what goes wrong on one rank is raised on every rank, with its rank and reason, and none waits.

Not for items that must be equal before the first step (`launch.agree`), nor for a rank that died: that shows as the
timeout of the collective in here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from libs.flags.errors import UserError
from libs.parallel.mesh import Group

Value = TypeVar("Value")
_SHOWN_REASONS = 8
# Between two looks at the others while waiting for slow work: no collective is open for longer than this and a little.
_LOOK_EVERY_S = 0.02


def everyones(group: Group, value: Value) -> list[Value]:
    """A small picklable value of every rank, in group order; a collective."""
    if group.size == 1:
        return [value]
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, value, group=group.process_group)
    return found


@contextmanager
def together(group: Group, what: str) -> Iterator[None]:
    """Run a short block without collectives on every rank; nobody goes on unless it went well on all of them.

    Args:
        what: the work, as in "saving step 200", for the message.

    Raises:
        UserError: on every rank, naming each rank that failed and why. An error of another kind is raised as it came
            on the rank that met it. In a group of one every error stays as it is.
    """
    try:
        yield
    except BaseException as error:
        reasons = _reasons(group, _describe(error))
        if group.size > 1 and isinstance(error, (UserError, OSError)):
            raise UserError(_message(what, reasons)) from error
        raise
    if reasons := _reasons(group, None):
        raise UserError(_message(what, reasons))


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _reasons(group: Group, mine: str | None) -> dict[int, str]:
    """{global rank: why it failed} of all that failed."""
    found = zip(group.members, everyones(group, mine), strict=True)
    return {rank: reason for rank, reason in found if reason is not None}


def _message(what: str, reasons: dict[int, str]) -> str:
    listed = [f"rank {rank}: {reason}" for rank, reason in sorted(reasons.items())]
    more = f"\n  - and {len(listed) - _SHOWN_REASONS} more ranks" if len(listed) > _SHOWN_REASONS else ""
    return f"{what} failed, and every rank stops:\n  - " + "\n  - ".join(listed[:_SHOWN_REASONS]) + more


class Background(Generic[Value]):
    """Work of every rank in a thread of its own, looked at by all ranks together. It must use no collective.

    Ranks may differ by minutes in how long it takes: they wait by many short collectives, not in one long one that
    would run into the group's timeout.
    """

    def __init__(self, group: Group, what: str, work: Callable[[], Value]) -> None:
        """Start `work`. `what` is for the message, as in `together`."""
        self._group, self._what = group, what
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._future = executor.submit(work)
        executor.shutdown(wait=False)

    def done_here(self) -> bool:
        """Whether this rank's work has ended, well or not; no collective."""
        return self._future.done()

    def wait_here(self, seconds: float | None = None) -> bool:
        """Wait for this rank's work only; whether it has ended. No collective."""
        return not wait([self._future], timeout=seconds).not_done

    def done(self) -> bool:
        """Whether it has ended on every rank; a collective."""
        return all(everyones(self._group, self.done_here()))

    def result(self) -> Value:
        """Wait until it has ended on every rank; what it gave on this one; a collective.

        Raises:
            UserError: it failed on some rank, as in `together`.
        """
        while not self.done():
            if self.done_here():
                time.sleep(_LOOK_EVERY_S)
            else:
                self.wait_here(_LOOK_EVERY_S)
        with together(self._group, self._what):
            return self._future.result()


def run_together(group: Group, what: str, work: Callable[[], Value]) -> Value:
    """Run `work` (no collectives, however slow) on every rank; what it gave on this one. Raises as `together`."""
    return work() if group.size == 1 else Background(group, what, work).result()


def first_does(group: Group, what: str, work: Callable[[], Value]) -> Value:
    """Run `work` on the group's first rank only; its result, small and picklable, on all. Raises as `together`."""
    if group.size == 1:
        return work()
    found = run_together(group, what, work if group.rank == 0 else lambda: None)
    return everyones(group, found)[0]  # type: ignore[return-value]
