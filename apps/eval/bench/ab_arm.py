"""One arm of an A/B comparison: a training configuration, run for a few steps in a process of its own.

A process per sample, not two configurations in turn inside one: gates are installed once per process, the programs do
not import each other, and what two processes do not share (allocator, caches, autotuning, address space) is part of
the noise that a claim has to beat. Not for the decision (ab.py).
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from libs.flags.environment import CONFIG_PREFIX, PREFIX, child_environment
from libs.flags.errors import ExitStatus, RunRefused, UserError
from libs.flags.logcheck import check_log
from libs.flags.runlog import read_events

# What the comparison sets itself: where the run goes, how far, and nothing beside the steps.
_OURS = ("--run-dir", "--resume", "--from-step", "--show-config", "--dry-run", "--train.stop_after")
_NEVER = "1000000000"


class Arm(NamedTuple):
    """variables: FATHOM_ variables. words: arguments of `fathom train`."""

    name: str
    variables: dict[str, str]
    words: tuple[str, ...]

    @classmethod
    def parse(cls, name: str, text: str) -> Arm:
        """From "FATHOM_GATE=value ... --recipe R --section.key VALUE ...", as one would write it in a shell.

        Raises:
            UserError: unbalanced quotes, a variable that is not FATHOM_*, or an option that the comparison sets itself.
        """
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UserError(f"--{name} {text!r}: {error}") from error
        variables: dict[str, str] = {}
        while words and not words[0].startswith("-"):
            variable, equals, value = words.pop(0).partition("=")
            if not equals or not variable.startswith(PREFIX) or variable.startswith(CONFIG_PREFIX):
                raise UserError(
                    f"--{name} {text!r}: {variable!r} is neither a gate's variable ({PREFIX}GATE=value) nor an option; "
                    "settings are given as --section.key VALUE"
                )
            variables[variable] = value
        for word in words:
            if word.partition("=")[0] in _OURS:
                raise UserError(f"--{name}: {word} is set by the comparison itself")
        return cls(name, variables, tuple(words))

    def describe(self) -> str:
        """The command line as a person would write it."""
        return shlex.join([*(f"{k}={v}" for k, v in self.variables.items()), "fathom", "train", *self.words])


class Steps(NamedTuple):
    """The steps of one process: the first `skipped` are left out (compiling, caches), `timed` make the sample."""

    skipped: int
    timed: int


class ArmRun(NamedTuple):
    """One process that ended as it should. steps: its train.step events, in order. violations: of the log's rules."""

    events: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    violations: int

    def event(self, name: str) -> dict[str, Any]:
        return next(event for event in self.events if event["event"] == name)

    def seconds(self, skipped: int) -> float:
        """The sample: mean seconds of a whole step, data to optimizer, over the timed steps."""
        return statistics.fmean(step["time_s"] for step in self.steps[skipped:])


def run_arm(arm: Arm, run_dir: Path, steps: Steps, launcher: Sequence[str], limit_s: float) -> ArmRun:
    """Train for the steps in a new process, and read its log. launcher: what stands before `-m apps.train`.

    Raises:
        RunRefused: a gate of this arm cannot be honoured here. UserError: the process failed, or took too long.
    """
    # The gates of this process's own environment are not handed on: an arm is what its text says.
    words = [*(launcher or [sys.executable]), "-m", "apps.train", *arm.words, "--run-dir", str(run_dir)]
    words += ["--train.stop_after", str(steps.skipped + steps.timed), "--train.eval_every", _NEVER]
    words += ["--checkpoint.every", _NEVER, "--log.tensorboard", "false"]
    environment = child_environment(arm.variables)
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{arm.name}: no end after {limit_s:.0f} s: {arm.describe()}") from error
    if done.returncode == ExitStatus.GATE_REFUSED:
        raise RunRefused(f"{arm.name} is refused: {arm.describe()}\n{done.stderr.strip()}")
    if done.returncode not in (ExitStatus.OK, ExitStatus.REQUEUE):
        said = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise UserError(f"{arm.name} ended with exit status {done.returncode}: {arm.describe()}\n{said}")
    events = list(read_events(run_dir))
    found = [event for event in events if event["event"] == "train.step"]
    if len(found) != steps.skipped + steps.timed:
        raise UserError(f"{arm.name} did {len(found)} steps, not {steps.skipped + steps.timed}: {arm.describe()}")
    return ArmRun(events, found, len(check_log(run_dir).violations))
