"""What can go wrong on one rank of a job, put into the training loop before it starts.

Each is called with the rank and breaks rank 1 in its third step, unless its name says otherwise.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from apps.train import loop, ranks

BROKEN_RANK, BROKEN_STEP = 1, 3


def _before_step(rank: int, act: Callable[[Any], None], *, step: int = BROKEN_STEP) -> None:
    if rank != BROKEN_RANK:
        return
    original = loop.one_step

    def wrapped(run: Any) -> None:
        if run.progress.step == step - 1:
            act(run)
        original(run)

    loop.one_step = wrapped


def dies(rank: int) -> None:
    _before_step(rank, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def hangs(rank: int) -> None:
    _before_step(rank, lambda _: time.sleep(600))


def gets_sigterm(rank: int) -> None:
    _before_step(rank, lambda _: os.kill(os.getpid(), signal.SIGTERM))


def gets_sigterm_in_start_up(rank: int) -> None:
    if rank != BROKEN_RANK:
        return
    original = ranks.prepare

    def wrapped(*words: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*words)

    ranks.prepare = wrapped


def _on_call(rank: int, name: str, call: int) -> None:
    """SIGTERM to rank 1 in the given call of a function of the loop."""
    if rank != BROKEN_RANK:
        return
    original, calls = getattr(loop, name), []

    def wrapped(*words: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*words, **options)

    setattr(loop, name, wrapped)


def gets_sigterm_in_validation(rank: int) -> None:
    _on_call(rank, "validate", 2)


def gets_sigterm_while_saving(rank: int) -> None:
    _on_call(rank, "_state", 1)


def has_a_bug(rank: int) -> None:
    def fail(_: Any) -> None:
        raise KeyError("a bug of ours")

    _before_step(rank, fail)


def has_a_nan(rank: int) -> None:
    _before_step(rank, lambda run: run.model.final_norm.weight.register_hook(lambda grad: grad * float("nan")))


def has_a_nan_once(rank: int) -> None:
    def spoil(run: Any) -> None:
        handle = run.model.final_norm.weight.register_hook(lambda grad: grad * float("nan"))
        after = loop.one_step

        def wrapped(run: Any) -> None:
            if run.progress.step == BROKEN_STEP:
                handle.remove()
            after(run)

        loop.one_step = wrapped

    _before_step(rank, spoil)


def has_other_code(rank: int) -> None:
    if rank == BROKEN_RANK:
        ranks.code_version = lambda: "edited"


def has_no_data(rank: int) -> None:
    """One machine on which the data was not mounted."""
    if rank == BROKEN_RANK:
        os.environ["FATHOM_TRAIN__DATA__DIR"] = "not_here"
