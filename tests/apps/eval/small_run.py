"""A small data directory, a small run with checkpoints, and its records, all made through the real interfaces.

Not a fixture file: conftest.py beside it turns these functions into fixtures.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from libs.flags.audit import AuditLog
from libs.flags.audit_record import audit_path
from libs.flags.errors import GateRefused
from libs.flags.events import (
    BackendChosen,
    CheckpointBegin,
    CheckpointCommit,
    ConfigResolved,
    CursorRecord,
    DataFingerprint,
    EnvSnapshot,
    EvalResult,
    RunStart,
    RunStop,
    TrainStep,
)
from libs.flags.facts import Facts
from libs.flags.gateset import GateSet
from libs.flags.installed import install, record_refusals
from libs.flags.provenance import snapshot
from libs.flags.resolve import resolve
from libs.flags.runlog import RunLog
from libs.model import HybridLM, ModelConfig, preset
from libs.model.checkpoint import checkpoint_name, commit, staging_directory
from libs.model.text.tokenizer import Tokenizer
from libs.model.weights import save_model
from tests.support.data_dir import write_data_dir

RUN_ID = "20260101T000000Z-cpu_tiny-abc123"
CONFIG = {"data": {"dir": "", "window": 128}, "optim": {"lr": 0.001}, "train": {"steps": 40, "device": "cpu"}}


def cpp_text(seed: int, n_bytes: int) -> bytes:
    """C++-like text: regular enough to compress, different from document to document."""
    rng = np.random.default_rng(seed)
    names = [f"value_{number}" for number in rng.integers(0, 500, size=12)]
    lines: list[str] = []
    while sum(map(len, lines)) < n_bytes:
        a, b, c = rng.choice(names, 3)
        lines.append(f"    const int {a} = {b} + {c} * {rng.integers(0, 9999)};\n")
    return "".join(lines).encode()[:n_bytes]


def build_data_dir(path: Path, sizes: dict[str, list[int]]) -> Path:
    """A data directory with the bytes tokenizer and documents of the given sizes, per split."""

    def text(split: str, index: int, size: int) -> tuple[str, bytes]:
        return f"{split}/{index}.cc", cpp_text(hash((split == "valid", index)) % 1000 + index, size)

    return write_data_dir(
        path, {split: [text(split, *of) for of in enumerate(of_split)] for split, of_split in sizes.items()}
    )


def tiny_config(vocab_size: int | None = None) -> ModelConfig:
    """vocab_size: None for that of the bytes tokenizer."""
    base = preset("cpu_tiny").model_dump()
    return ModelConfig.parse({**base, "vocab_size": vocab_size or Tokenizer.bytes_tokenizer().vocab_size})


def tiny_model(seed: int = 0, vocab_size: int | None = None) -> HybridLM:
    model = HybridLM(tiny_config(vocab_size))
    model.reset_parameters(seed)
    return model


def save_checkpoint(run_dir: Path, step: int, data_dir: Path, *, anchor: str, vocab_size: int | None = None) -> str:
    final = run_dir / "checkpoints" / checkpoint_name(step)
    staging = staging_directory(final)
    save_model(staging, tiny_model(step, vocab_size))
    (staging / "tokenizer.json").write_bytes((data_dir / "tokenizer.json").read_bytes())
    (staging / "trainer.json").write_text(json.dumps({"step": step, "audit_anchor": anchor}))
    return commit(staging, final)


def train_step(step: int) -> TrainStep:
    loss = 2.0 + 3.5 * math.exp(-step / 12) + 0.05 * math.sin(step * 2.1)
    return TrainStep(
        loss=loss, main_loss=loss - 0.1, mtp_loss=0.2, bpb=loss / math.log(2), lr=1e-3 * min(1, step / 5),
        grad_norm=1.0 + 1 / step, tokens=512, tokens_total=512 * step, tokens_per_s=5000 + 300 * math.sin(step),
        time_s=0.1, data_s=0.004, forward_backward_s=0.08, optimizer_s=0.01, other_s=0.006, mfu=None,
        mfu_reason="the peak of 'x86_64' is not known", max_memory_bytes=(400 + 2 * step) << 20,
        cursor=CursorRecord(epoch=0, index=step, token_offset=0),
    )  # fmt: skip


def open_records(run_dir: Path, data_dir: Path, gates: GateSet | None, attempt: int = 0) -> tuple[RunLog, AuditLog]:
    """A run up to the point where training begins (or is refused)."""
    log = RunLog.open(run_dir, run_id=RUN_ID, attempt=attempt)
    config = {**CONFIG, "data": {"dir": str(data_dir), "window": 128}}
    origins = {"data.dir": "recipe cpu_tiny", "data.window": "default", "optim.lr": "command line --optim.lr"}
    origins |= {"train.steps": "recipe cpu_tiny", "train.device": "default"}
    log.emit(
        RunStart(
            command=["fathom", "train", "--optim.lr", "1e-3"], recipe="cpu_tiny", config_hash="c" * 64,
            gates_hash=None if gates is None else gates.hash, world_size=1,
        )
    )  # fmt: skip
    log.emit(ConfigResolved(config=config, origins=origins))
    content = {"run_id": RUN_ID, "recipe": "cpu_tiny", "config": config, "origins": origins, "config_hash": "c" * 64}
    (run_dir / "config.json").write_text(json.dumps(content))
    return log, AuditLog.open(audit_path(run_dir), RUN_ID, attempt)


def make_run(run_dir: Path, data_dir: Path, *, steps: int = 40, vocab_size: int | None = None) -> Path:
    """A completed run: training steps, three validations, two checkpoints."""
    gates = resolve({}, Facts())
    log, audit = open_records(run_dir, data_dir, gates)
    install(gates, audit, log)
    log.emit(EnvSnapshot.model_validate(snapshot({"seed": 0})))
    log.emit(
        DataFingerprint(
            fingerprint="d" * 64, data_dir=str(data_dir), train_tokens=9000, valid_tokens=3000, tokenizer="t" * 64
        )
    )
    log.emit(BackendChosen(op="mimo", value="chunked", reason="auto: first of chunked, reference"))
    for step in range(steps + 1):
        if step:
            log.emit(train_step(step), step=step)
        if step % 20 == 0:
            metrics = {"bpb": 8.0 - 0.1 * step}
            log.emit(EvalResult(suite="validation", metrics=metrics, n=5, excluded=0), step=step)
        if step and step % 20 == 0:
            path = f"checkpoints/{checkpoint_name(step)}"
            log.emit(CheckpointBegin(path=path, reason="schedule"), step=step)
            anchor = str(audit.anchor())
            digest = save_checkpoint(run_dir, step, data_dir, anchor=anchor, vocab_size=vocab_size)
            log.emit(CheckpointCommit(path=path, sha256=digest, seconds=0.2, audit_anchor=anchor), step=step)
    log.emit(RunStop(status="completed", exit_code=0, reason="all steps done", audit_anchor=str(audit.anchor())))
    log.close()
    audit.close()
    return run_dir


def make_refused_run(run_dir: Path, data_dir: Path) -> Path:
    """A run that asked for what it cannot have: stopped before its first step."""
    log, audit = open_records(run_dir, data_dir, None)
    with pytest.raises(GateRefused) as refused:
        resolve({"FATHOM_PSIV_CACHE": "yes", "FATHOM_PSVI_CACHE": "off", "FATHOM_TMA": "all"}, Facts())
    record_refusals(refused.value, audit, log)
    log.emit(
        RunStop(status="refused", exit_code=78, reason=str(refused.value), audit_anchor=str(audit.anchor())),
        level="error",
    )
    log.close()
    audit.close()
    return run_dir
