"""`fathom train` with Megatron's engine on processes without CUDA: the facade around the whole of a process."""

from __future__ import annotations

from contextlib import ExitStack

from apps.train import ranks
from tests.support import job_faults
from tests.support.megatron_facade import megatron_on_cpu

# For the life of the process.
_OPEN = ExitStack()


def on_cpu(rank: int) -> None:
    """A `Prepare` of tests.support.job: the engine is not refused, and finds what it asks for."""
    _OPEN.enter_context(megatron_on_cpu())
    ranks.refuse_engine = lambda *_: None


def has_a_nan(rank: int) -> None:
    on_cpu(rank)
    job_faults.has_a_nan(rank)


def has_a_nan_once(rank: int) -> None:
    on_cpu(rank)
    job_faults.has_a_nan_once(rank)


def gets_sigterm(rank: int) -> None:
    on_cpu(rank)
    job_faults.gets_sigterm(rank)


def gets_sigterm_in_start_up(rank: int) -> None:
    on_cpu(rank)
    job_faults.gets_sigterm_in_start_up(rank)


def dies(rank: int) -> None:
    on_cpu(rank)
    job_faults.dies(rank)
