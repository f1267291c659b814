"""Where an evaluation takes its checkpoint and data from, and where its result goes.

Not for reading any of them (run.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apps.eval.config import EvalConfig
from apps.eval.record import owning_run
from apps.eval.results import check_place
from libs.flags.errors import UserError
from libs.model.checkpoint import resolve_checkpoint

RUN_CONFIG = "config.json"
EVAL_FOLDER = "eval"


class Place(NamedTuple):
    """Where the checkpoint and its run are, where the data is, and where the result of each suite goes."""

    checkpoint: Path
    run_dir: Path | None
    data: Path
    out: Mapping[str, Path]
    trained_window: int | None


def locate(config: EvalConfig) -> Place:
    """Resolve the three, from the options or from the run that the checkpoint lies in.

    Raises:
        UserError: no committed checkpoint, a place that neither an option nor a run names, or one for a result that
            cannot be written: said before anything is scored.
    """
    checkpoint = resolve_checkpoint(config.checkpoint)
    run_dir = owning_run(checkpoint)
    trained = _run_config(run_dir)
    data_section = trained.get("data", {})
    if config.data is not None:
        data = config.data
    elif "dir" in data_section:
        data = Path(data_section["dir"])
    else:
        raise UserError(f"{checkpoint} does not lie in a run that names its data: give --data DIR")
    out = _results(config, checkpoint, run_dir)
    for path in out.values():
        check_place(path)
    return Place(checkpoint, run_dir, data, out, data_section.get("window"))


def _results(config: EvalConfig, checkpoint: Path, run_dir: Path | None) -> dict[str, Path]:
    """A file for one suite; for several a directory, which gets a file for each."""
    if config.out is None and run_dir is None:
        raise UserError(f"{checkpoint} does not lie in a run, so there is no place for the result: give --out FILE")
    if config.out is not None and len(config.suites) == 1:
        return {config.suites[0]: config.out}
    folder = config.out if config.out is not None else (run_dir or checkpoint) / EVAL_FOLDER
    if folder.is_file():
        raise UserError(f"--out {folder} is a file: several suites need the name of a directory")
    return {suite: folder / f"{suite}.json" for suite in config.suites}


def _run_config(run_dir: Path | None) -> dict[str, Any]:
    """The config a run began with; empty when there is no run or it wrote none."""
    if run_dir is None or not (run_dir / RUN_CONFIG).is_file():
        return {}
    path = run_dir / RUN_CONFIG
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from error
    return content


def shown_path(path: Path, run_dir: Path | None) -> str:
    """Relative to the run where possible, so that a moved run still makes sense."""
    if run_dir is not None and path.resolve().is_relative_to(run_dir.resolve()):
        return path.resolve().relative_to(run_dir.resolve()).as_posix()
    return str(path)
