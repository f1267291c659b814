"""What a resumed run must find as it was: by its checkpoint, or before the first one by its log.

Not for settings, which `--resume` compares first (arguments.py), nor for the model, which reading weights does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from apps.train.lane import XLA_RUNTIMES, Lane
from apps.train.save import TrainerState
from libs.flags.errors import UserError
from libs.flags.events import AnomalyGeneric
from libs.flags.registry import GateValue
from libs.flags.runlog import read_events


class Circumstances(NamedTuple):
    """source: who says so, for a message. None: not recorded, as in a new run, so nothing is held against it."""

    source: str = "nothing"
    data_fingerprint: str | None = None
    precision: str | None = None
    device: str | None = None
    torch_version: str | None = None
    threads: int | None = None
    gates: dict[str, GateValue] | None = None


def in_checkpoint(state: TrainerState) -> Circumstances:
    """Those of a checkpoint."""
    return Circumstances(
        source=f"the checkpoint of step {state.step}",
        data_fingerprint=state.data_fingerprint,
        precision=state.precision,
        device=state.device,
        torch_version=state.torch_version,
        threads=state.threads,
        gates=state.gates,
    )


def in_log(run_dir: Path, attempt: int) -> Circumstances:
    """Those of the attempts before `attempt`, by rank 0's log, for a run without a checkpoint. torch may be another
    one: nothing that it computed is kept.

    Only what was not refused is recorded, so the last record of each kind counts.
    """
    last: dict[str, dict[str, Any]] = {}
    for event in read_events(run_dir):
        if event["attempt"] < attempt:
            last[f"{event['event']} {event.get('op', '')}".strip()] = event
    data, gates = last.get("data.fingerprint", {}), last.get("gates.resolved")
    device, precision, threads = (
        last.get(f"backend.chosen train.{name}") for name in ("device", "precision", "threads")
    )
    return Circumstances(
        source="an earlier attempt",
        data_fingerprint=data.get("fingerprint"),
        precision=None if precision is None else precision["value"],
        device=None if device is None else "xla" if device["value"] in XLA_RUNTIMES else device["value"],
        threads=None if threads is None else int(threads["value"]),
        gates=None if gates is None else {row["gate"]: row["value"] for row in gates["gates"]},
    )


def torch_anomaly(before: Circumstances) -> AnomalyGeneric | None:
    """For the log, when the checkpoint is of another torch: weights and order of data are the same, further losses are
    not bit for bit those of a run that was never interrupted. Not refused: no run could outlive an upgrade."""
    now = str(torch.__version__)
    if before.torch_version in (None, now):
        return None
    return AnomalyGeneric(what="resumed with another torch", details={"before": before.torch_version, "now": now})


def refuse_others(before: Circumstances, data_fingerprint: str, lane: Lane) -> None:
    """A resumed run must read the same data and compute in the same way.

    Raises:
        UserError: it would not.
    """
    pairs = {
        "data fingerprint": (before.data_fingerprint, data_fingerprint),
        "precision": (before.precision, lane.precision),
        "device": (before.device, lane.device.type),
    }
    for what, (then, now) in pairs.items():
        if then not in (None, now):
            raise UserError(
                f"{before.source} had {what} {then!r}, now it is {now!r}; "
                "resume with what the run began with, or start a new run"
            )
