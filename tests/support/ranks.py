"""Real processes that talk over gloo, for tests of what several ranks compute.

Started once per call and not once per check: a process that imports torch costs more than most checks.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

from libs.flags.environment import Launch
from libs.parallel.launch import connect
from libs.parallel.mesh import Groups, Layout

TIMEOUT = timedelta(seconds=60)
RankFunction = Callable[[Groups], dict[str, Any]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(function: RankFunction, rank: int, layout: Layout, port: int, pipe: Connection) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # As in tests/conftest.py: a half-written output cannot pass.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        launch = Launch(rank, rank, layout.world_size, 0)
        with connect(layout, backend="gloo", timeout=TIMEOUT, this=launch, even_alone=True) as groups:
            pipe.send((True, function(groups)))
            groups.world.barrier()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise


def run_ranks(function: RankFunction, layout: Layout) -> list[dict[str, Any]]:
    """Run an importable function on every rank of a new job; what each returned (plain values), in rank order.

    Raises:
        AssertionError: with the traceback of the first rank that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "libs.model", function.__module__])
    port, jobs = free_port(), []
    for rank in range(layout.world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(function, rank, layout, port, theirs), daemon=True)
        process.start()
        theirs.close()
        jobs.append((process, ours))
    results = []
    try:
        for rank, (_, pipe) in enumerate(jobs):
            assert pipe.poll(240), f"rank {rank} gave no answer"
            good, value = pipe.recv()
            assert good, f"rank {rank}:\n{value}"
            results.append(value)
        for process, _ in jobs:
            process.join(30)
    finally:
        for process, _ in jobs:
            if process.is_alive():
                process.kill()
    return results
