"""Whole jobs of `fathom train` with FP8 weights, on a DOUBLE of transformer-engine and the facade for megatron-core.

Importing this puts the double in place: see `tests.support.fp8_process`.
"""

from __future__ import annotations

from tests.support.te_double import install

install()

# Only now: importing megatron-core takes up what transformer-engine there is.
import json  # noqa: E402
import multiprocessing  # noqa: E402
from collections.abc import Mapping  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from multiprocessing import forkserver  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

from apps.train import attempt, ranks  # noqa: E402, F401 (attempt: for those that are forked from here)
from apps.train import fp8 as asked  # noqa: E402
from libs.flags.facts import Facts  # noqa: E402
from libs.parallel import megatron_engine  # noqa: E402
from tests.support import job_faults  # noqa: E402
from tests.support.h200 import H200  # noqa: E402
from tests.support.job import Ended, start_job  # noqa: E402
from tests.support.megatron_facade import buckets_of_two_dtypes, megatron_on_cpu  # noqa: E402

# For the life of a process.
_OPEN = ExitStack()
ON = {"FATHOM_FP8_PARAM_GATHER": "on"}
FP8 = ("--parallel.engine", "megatron", "--parallel.fp8_recipe", "blockwise", "--train.precision", "bf16")


def on_h200(rank: int) -> None:
    """A `Prepare` of tests.support.job: what the gate asks for is said to be here."""
    _OPEN.enter_context(megatron_on_cpu())
    _OPEN.enter_context(buckets_of_two_dtypes())
    found = ranks.gather_facts

    def facts(*args: Any) -> Facts:
        packages = {"transformer-engine": "2.11.0"}
        return found(*args).model_copy(update={"device": "cuda", "compute_capability": (9, 0), "packages": packages})

    ranks.gather_facts = facts
    ranks.refuse_engine = lambda *_: None
    asked.probe = lambda: H200


def without_update(rank: int) -> None:
    """The same, and the optimizer does nothing."""
    on_h200(rank)
    whole = megatron_engine.MegatronEngine.update
    still = lambda self, *, rate, clip_norm, norm: whole(self, rate=0.0, clip_norm=clip_norm, norm=norm)  # noqa: E731
    _OPEN.enter_context(mock.patch.object(megatron_engine.MegatronEngine, "update", still))


def on_one_rank_only(rank: int) -> None:
    """The same, but rank 1 has no transformer-engine."""
    on_h200(rank)
    if rank == 1:
        asked.probe = lambda: H200._replace(te_error="RuntimeError: cudnn shared object not found")


def with_a_nan(rank: int) -> None:
    """The same, and a gradient that is not finite."""
    on_h200(rank)
    job_faults.has_a_nan(rank)


def main(recipe: str, folder: str) -> None:
    """Statuses and output of several jobs, as one line of JSON; their runs lie under the folder."""
    multiprocessing.set_forkserver_preload(["tests.support.fp8_job"])
    forkserver.ensure_running()
    into, jobs = Path(folder), dict[str, Ended]()

    def job(name: str, *words: object, variables: Mapping[str, str] = ON, prepare: Any = on_h200) -> None:
        of_each = dict.fromkeys(range(2), variables)
        jobs[name] = start_job(words, 2, into / f"output {name}", variables=of_each, prepare=prepare).wait(200)

    new = ("--recipe", recipe, *FP8, "--train.activation_checkpointing", "block")
    stopped = ("--train.stop_after", "3")
    job("whole", *new, "--run-dir", into / "whole")
    job("first half", *new, "--run-dir", into / "halves", *stopped, "--checkpoint.asynchronous", "true")
    job("second half", "--resume", into / "halves")
    job("to tp 2", *new, "--run-dir", into / "moved", *stopped)
    sharded = ("--parallel.tp", "2", "--parallel.sequence_parallel", "true")
    job("at tp 2", "--resume", into / "moved", *sharded, "--train.stop_after", "5")
    out = ("--parallel.fp8_recipe", "none", "--parallel.engine", "torch", "--parallel.tp", "1")
    job("in bf16", "--resume", into / "moved", *out, "--accept-gate-change", "fp8_param_gather", variables={})
    job("without update", *new, "--run-dir", into / "still", prepare=without_update)
    job("on one rank", *new, "--run-dir", into / "odd", prepare=on_one_rank_only)
    job("a nan", *new, "--run-dir", into / "nan", prepare=with_a_nan)
    print(json.dumps({name: ended._asdict() for name, ended in jobs.items()}))
