"""Who hears of a run while it trains: the console, TensorBoard, Weights & Biases.

Not for the record: the run log (libs.flags.runlog) is written by the loop itself, whatever sinks there are.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from apps.train.config import LogSection, TrainConfig
from libs.flags.errors import UserError, to_nowhere


class StepReport(NamedTuple):
    """What a sink is told after a step; `step` counts finished steps, `scalars` holds finite numbers only."""

    step: int
    scalars: dict[str, float]


class Sink(Protocol):
    """A listener. A sink that cannot work raises when it is built, not during the run."""

    def on_step(self, report: StepReport) -> None:
        """After each optimizer step."""

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        """After each validation."""

    def on_note(self, text: str) -> None:
        """Something a person at the console should read."""

    def close(self) -> None:
        """The run is over."""


class TensorBoardSink:
    """Scalars under RUN/tensorboard; a resumed run hides what the lost steps wrote."""

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step or None)

    def on_step(self, report: StepReport) -> None:
        for name, value in report.scalars.items():
            self._writer.add_scalar(f"train/{name}", value, report.step)

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"valid/{name}", value, step)

    def on_note(self, text: str) -> None:
        """Notes are for the console."""

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """The same scalars in a Weights & Biases project; the package is imported here and nowhere else."""

    def __init__(self, run_dir: Path, *, project: str, run_id: str, config: TrainConfig) -> None:
        wandb = importlib.import_module("wandb")
        self._run: Any = wandb.init(
            project=project, id=run_id, name=run_id, dir=str(run_dir), resume="allow", config=config.to_json()
        )

    def on_step(self, report: StepReport) -> None:
        self._run.log({f"train/{name}": value for name, value in report.scalars.items()}, step=report.step)

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({f"valid/{name}": value for name, value in metrics.items()}, step=step)

    def on_note(self, text: str) -> None:
        """Notes are for the console."""

    def close(self) -> None:
        self._run.finish()


class ProgressSink:
    """A live bar with loss, bpb, tokens/s and the time left, for a terminal."""

    def __init__(self, *, steps: int, first_step: int, console: Console) -> None:
        self._progress = Progress(
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._progress.start()
        self._task: TaskID = self._progress.add_task("train", total=steps, completed=first_step, numbers="")
        self._valid = ""

    def on_step(self, report: StepReport) -> None:
        self._progress.update(self._task, completed=report.step, numbers=self._numbers(report.scalars))

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        self._valid = f" (valid {metrics['bpb']:.3f})"
        self._progress.console.print(f"step {step}: validation bpb {metrics['bpb']:.4f}")

    def _numbers(self, scalars: dict[str, float]) -> str:
        """Short enough for a terminal of 80 columns."""
        speed = f"{scalars['tokens_per_s']:,.0f} tok/s"
        return f"loss {scalars['loss']:.3f} bpb {scalars['bpb']:.3f}{self._valid} {speed}"

    def on_note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


class LineSink:
    """One plain line every `every` steps, for a log file or a pipe."""

    def __init__(self, *, steps: int, every: int, stream: TextIO) -> None:
        self._steps, self._every, self._stream = steps, every, stream

    def on_step(self, report: StepReport) -> None:
        if report.step % self._every == 0 or report.step in (1, self._steps):
            left = (self._steps - report.step) * report.scalars["time_s"]
            self._print(f"step {report.step}/{self._steps}  {_numbers(report.scalars)}  left about {left:.0f} s")

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        self._print(f"step {step}/{self._steps}  validation bpb {metrics['bpb']:.4f}")

    def on_note(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        """Every line is flushed already."""

    def _print(self, line: str) -> None:
        try:
            print(line, file=self._stream, flush=True)
        except BrokenPipeError:
            to_nowhere(self._stream)  # the reader has gone, as in `| head`: training goes on unheard


def _numbers(scalars: dict[str, float]) -> str:
    return f"loss {scalars['loss']:.4f}  bpb {scalars['bpb']:.3f}  {scalars['tokens_per_s']:,.0f} tok/s"


def refuse_missing_sinks(log: LogSection) -> None:
    """Before anything is written: a sink that was asked for must be installed.

    Raises:
        UserError: the package of a requested sink is missing.
    """
    if log.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"log.wandb_project = {log.wandb_project!r} needs the package wandb, which is not installed: "
            "`pip install wandb`, or leave log.wandb_project at none"
        )
    if log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("log.tensorboard = true needs the package tensorboard, which is not installed")


def open_sinks(config: TrainConfig, run_dir: Path, *, run_id: str, first_step: int) -> Sequence[Sink]:
    """The sinks the config asks for, the console always among them."""
    console = Console(file=sys.stdout)
    sinks: list[Sink] = []
    if console.is_terminal:
        sinks.append(ProgressSink(steps=config.train.steps, first_step=first_step, console=console))
    else:
        sinks.append(LineSink(steps=config.train.steps, every=config.log.every, stream=sys.stdout))
    if config.log.tensorboard:
        sinks.append(TensorBoardSink(run_dir, first_step=first_step))
    if config.log.wandb_project is not None:
        sinks.append(WandbSink(run_dir, project=config.log.wandb_project, run_id=run_id, config=config))
    return sinks
