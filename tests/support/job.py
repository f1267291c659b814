"""`fathom train` on several ranks, as torchrun would start it, from a fork server that has imported everything.

Each rank is a process of its own with torchrun's variables; rank 0 hosts the store. What each printed lies in a file.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.support.ranks import free_port

Prepare = Callable[[int], None]
JOB_NAME = "a-test-job"


class Ended(NamedTuple):
    """Exit status (negative: the signal) and what was printed, of every rank, and how long it all took."""

    statuses: list[int | None]
    said: list[str]
    seconds: float


class Job:
    """A job under way."""

    def __init__(self, processes: list[Any], outputs: list[Path]) -> None:
        self.processes, self._outputs, self._began = processes, outputs, time.monotonic()

    def wait(self, seconds: float = 120, patience: float | None = None) -> Ended:
        """Until every rank has ended; a rank that has not by then is killed and has status None.

        patience: seconds for the others once rank 0 has ended, as torchrun's agent has.
        """
        deadline = self._began + seconds
        if patience is not None:
            self.processes[0].join(seconds)
            deadline = min(deadline, time.monotonic() + patience)
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        took = time.monotonic() - self._began
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return Ended(statuses, [path.read_text() for path in self._outputs], took)


def _rank(words: Sequence[str], variables: Mapping[str, str], prepare: Prepare | None, output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    for name in [name for name in os.environ if name.upper().startswith("FATHOM_")]:
        del os.environ[name]
    os.environ.update(variables)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(int(variables["RANK"]))
    from apps.train.__main__ import main
    from libs.flags.errors import run_entry

    raise SystemExit(run_entry(main, list(words)))


def start_job(
    words: Sequence[object],
    ranks: int,
    folder: Path,
    *,
    variables: Mapping[int, Mapping[str, str]] | None = None,
    words_of: Mapping[int, Sequence[object]] | None = None,
    prepare: Prepare | None = None,
    restarts: int = 0,
) -> Job:
    """Start `fathom train WORDS` on every rank.

    variables, words_of: more of them, on the ranks that are named. prepare: an importable function, called with the
    rank before anything else (to break something). restarts: what torchrun would count.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["apps.train.attempt", "apps.train.dry_run", "tests.support.job"])
    port, processes, outputs = free_port(), [], []
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": JOB_NAME}
        own |= {"TORCHELASTIC_RESTART_COUNT": str(restarts), **(variables or {}).get(rank, {})}
        output = folder / f"rank{rank}.txt"
        all_words = [str(word) for word in (*words, *(words_of or {}).get(rank, ()))]
        process = context.Process(target=_rank, args=(all_words, own, prepare, output), daemon=True)
        process.start()
        processes.append(process)
        outputs.append(output)
    return Job(processes, outputs)
