"""torchrun on one node, with three things a scheduler needs: it exits with the status of the rank that failed first,
it hands SIGTERM to the ranks once and waits until they have saved, and after a crash it resumes what is there.

torchrun itself answers every failure with 1, restarts refusals as well, and kills ranks 30 s after SIGTERM.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from libs.flags.errors import ExitStatus, UserError, run_entry

# A second try would end in the same way, or (REQUEUE) is the scheduler's to make.
FINAL = (ExitStatus.OK, ExitStatus.USAGE, ExitStatus.NONFINITE, ExitStatus.REQUEUE, ExitStatus.GATE_REFUSED)
CONFIG_FILE = "config.json"  # of a run that has begun; apps.train writes it
_LOOK_EVERY_S = 0.2


class Stop:
    """A request to stop, passed on to every worker exactly once: apps.train takes a second one as "at once".

    Workers have sessions of their own, so Ctrl-C reaches them through here as well.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._told: set[int] = set()

    def install(self) -> None:
        """Take the signals over and start passing them on as SIGTERM, also to workers that are only being started."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._handle)
        threading.Thread(target=self._pass_on, daemon=True).start()

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked.set()

    def _pass_on(self) -> None:
        self._asked.wait()
        pause = threading.Event()
        while True:
            for child in psutil.Process().children():
                if child.pid not in self._told:
                    self._told.add(child.pid)
                    try:
                        child.terminate()
                    except psutil.NoSuchProcess:
                        continue
            pause.wait(_LOOK_EVERY_S)


def main(argv: Sequence[str] | None = None) -> int:
    """Run until done, refused, told to stop, or out of restarts; the status is a rank's own."""
    options = _parser().parse_args(argv)
    processes = options.nproc or torch.cuda.device_count()
    if processes < 1:
        raise UserError(f"--nproc {processes}: torch sees no GPU here; state the number of processes")
    stop = Stop()
    stop.install()
    status = int(ExitStatus.REQUEUE)
    for attempt in range(options.restarts + 1):
        if stop.asked:
            break
        status = _attempt(options, processes)
        if stop.asked and status == 128 + signal.SIGTERM:
            # A rank was told before it could listen: nothing began, so nothing is lost.
            status = int(ExitStatus.REQUEUE)
        if status in FINAL:
            break
        left = options.restarts - attempt
        print(f"infra.launch.node: a rank failed with status {status}; {left} restarts left", file=sys.stderr)
    return status


def _attempt(options: argparse.Namespace, processes: int) -> int:
    words = [
        "--standalone",
        f"--nproc-per-node={processes}",
        "--max-restarts=0",
        "--signals-to-handle=SIGQUIT",
        "--module",
        options.module,
        *worker_arguments(Path(options.run_dir), options.settings),
    ]
    try:
        run(parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        print(f"infra.launch.node: rank {rank} ended first, with status {status}", file=sys.stderr)
        return status
    return int(ExitStatus.OK)


def worker_arguments(run_dir: Path, settings: Sequence[str]) -> list[str]:
    """Go on with the run in `run_dir` if it has begun (it has its own settings then), else begin it."""
    if (run_dir / CONFIG_FILE).is_file():
        return ["--resume", str(run_dir)]
    return ["--run-dir", str(run_dir), *settings]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra.launch.node", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run-dir", required=True, help="the run; resumed if it has begun")
    parser.add_argument("--nproc", type=int, default=None, help="processes (default: one for each GPU)")
    parser.add_argument("--restarts", type=int, default=3, help="tries after a crash; a refusal is never tried again")
    parser.add_argument("--module", default="apps.train", help="what each rank runs")
    parser.add_argument("settings", nargs="*", help="after `--`: what `fathom train` takes for a new run")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
