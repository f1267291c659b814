"""Shared by the tests of libs/flags: a process without gates, small catalogues, runs by the real code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from libs.flags import installed
from libs.flags.audit import AuditLog
from libs.flags.audit_record import audit_path
from libs.flags.errors import ExitStatus, GateRefused
from libs.flags.events import (
    CheckpointBegin,
    CheckpointCommit,
    CheckpointRestore,
    ConfigResolved,
    CursorRecord,
    DataFingerprint,
    EnvSnapshot,
    RunStart,
    RunStop,
    TrainStep,
)
from libs.flags.facts import Facts
from libs.flags.installed import GateState, install, is_enabled, record_refusals
from libs.flags.provenance import snapshot
from libs.flags.registry import GateSpec, Kind, Stage, build_catalog
from libs.flags.resolve import resolve
from libs.flags.runlog import RunLog, next_attempt

Catalog = Mapping[str, GateSpec]


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> GateState:
    """A process in which nothing is installed yet."""
    state = GateState()
    monkeypatch.setattr(installed, "_PROCESS", state)
    return state


def make_spec(name: str, **fields: object) -> GateSpec:
    """An experimental on/off gate without preconditions, with `fields` on top."""
    plain: dict[str, object] = {
        "name": name,
        "kind": Kind.BOOL,
        "values": ("off", "on"),
        "stage": Stage.EXPERIMENTAL,
        "since": "0.1.0",
        "expiry": "9.0.0",
        "owner": "tests",
        "summary": "A gate that exists for the tests only.",
    }
    return GateSpec.model_validate(plain | fields)


@pytest.fixture(name="spec")
def spec_fixture() -> Callable[..., GateSpec]:
    return make_spec


@pytest.fixture
def working_catalog() -> Catalog:
    """Three gates that can be had."""
    stages = ("off", "first", "second", "third")
    return build_catalog(
        [
            make_spec("alpha"),
            make_spec("beta", kind=Kind.ENUM, values=("off", "fwd", "all")),
            make_spec("gamma", kind=Kind.STAGES, values=stages),
        ]
    )


def train_step(step: int, **fields: object) -> TrainStep:
    plain: dict[str, object] = {
        "loss": 2.0,
        "main_loss": 2.0,
        "mtp_loss": None,
        "bpb": 1.5,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 10,
        "tokens_total": 10 * step,
        "tokens_per_s": 100.0,
        "time_s": 0.1,
        "data_s": 0.01,
        "forward_backward_s": 0.05,
        "optimizer_s": 0.02,
        "other_s": 0.02,
        "mfu": None,
        "mfu_reason": "unknown peak of this device",
        "max_memory_bytes": None,
        "cursor": CursorRecord(epoch=0, index=step, token_offset=0),
    }
    return TrainStep.model_validate(plain | fields)


@pytest.fixture(name="train_step")
def train_step_fixture() -> Callable[..., TrainStep]:
    return train_step


@pytest.fixture
def write_run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """write(folder, environ, catalog, steps=, stop=, rank=, world_size=): one attempt of a run, as an app writes it."""

    def write(
        folder: Path,
        environ: Mapping[str, str] | None = None,
        catalog: Catalog | None = None,
        *,
        steps: int = 3,
        stop: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> Path:
        monkeypatch.setattr(installed, "_PROCESS", GateState())
        attempt = next_attempt(folder, rank=rank)
        first = 1 + attempt * steps
        with RunLog.open(folder, run_id=folder.name, attempt=attempt, rank=rank) as log:
            audit = AuditLog.open(audit_path(folder, rank), folder.name, attempt, rank)
            try:
                gates = resolve(environ or {}, Facts(), catalog) if catalog else resolve(environ or {}, Facts())
            except GateRefused as error:
                log.emit(_start(None, world_size))
                record_refusals(error, audit, log)
                _stop(log, audit, "refused", ExitStatus.GATE_REFUSED)
                return folder
            log.emit(_start(gates.hash, world_size))
            log.emit(ConfigResolved(config={"optim": {"lr": 1e-3}}, origins={"optim.lr": "default"}))
            install(gates, audit, log)
            log.emit(EnvSnapshot.model_validate(snapshot({"device": "cpu"})))
            log.emit(DataFingerprint(fingerprint="f", data_dir="data", train_tokens=9, valid_tokens=1, tokenizer="t"))
            if attempt:
                log.emit(CheckpointRestore(path=f"step-{first - 1}"), step=first - 1)
            is_enabled(gates.resolutions[0].gate)
            for step in range(first, first + steps):
                log.emit(train_step(step), step=step)
            path = f"step-{first + steps - 1}"
            log.emit(CheckpointBegin(path=path), step=first + steps - 1)
            anchor = str(audit.anchor())
            log.emit(CheckpointCommit(path=path, seconds=0.1, audit_anchor=anchor), step=first + steps - 1)
            if stop:
                _stop(log, audit, "completed", ExitStatus.OK)
            audit.close()
        return folder

    return write


def _start(gates_hash: str | None, world_size: int) -> RunStart:
    command = ["fathom", "train"]
    return RunStart(command=command, recipe=None, config_hash="c", gates_hash=gates_hash, world_size=world_size)


def _stop(log: RunLog, audit: AuditLog, status: str, code: int) -> None:
    event = {"status": status, "exit_code": int(code), "reason": "test", "audit_anchor": str(audit.anchor())}
    log.emit(RunStop.model_validate(event))
    audit.close()
