"""`fathom checkpoint verify` and `inspect`: are the bytes what was written, and what do they say.

Reads headers and checksums only, never a model into memory. Not for changing anything.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apps.train.save import read_state
from apps.train.snapshot import STATE
from libs.flags.errors import UserError
from libs.model.checkpoint import (
    CHECKPOINTS,
    checkpoint_step,
    committed_checkpoints,
    committed_digest,
    resolve_checkpoint,
    resolve_run,
    verify_checkpoint,
)
from libs.model.config import ModelConfig
from libs.model.shard_files import LocalTensors, TensorRow, read_layout
from libs.model.sharding import shard_rules
from libs.model.weights import read_config


def verify(path: Path) -> None:
    """Check one checkpoint, or every committed one of a run, and print a line for each.

    Raises:
        UserError: nothing committed there, or what is wrong with each damaged one.
    """
    run = resolve_run(path)
    folders = committed_checkpoints(run) if (run / CHECKPOINTS).is_dir() else [run]
    if not folders or not run.is_dir():
        resolve_checkpoint(path)  # says what was looked for and what is there
    problems = []
    for folder in folders:
        try:
            digest = verify_checkpoint(folder)
            weights, moments = tensor_tables(folder)
        except UserError as error:
            problems.append(str(error))
            print(f"damaged  {folder}")
            continue
        counts = f"{len(weights)} parameters, {len(moments)} optimizer tensors"
        print(f"ok       {folder}  {counts}, {_total_bytes(folder):,} bytes, manifest sha256 {digest}")
    if problems:
        raise UserError(f"{len(problems)} of {len(folders)} checkpoints are damaged:\n" + "\n".join(problems))


def tensor_tables(folder: Path) -> tuple[list[TensorRow], list[TensorRow]]:
    """Parameters, and optimizer state, by their full shapes.

    Raises:
        UserError: a shard is missing, or the parameters are not those of the model in `model.json`.
    """
    config, layout = read_config(folder), read_layout(folder)
    weights = LocalTensors([folder / name for name in layout.weights], config)
    weights.check_whole()
    if odd := sorted(set(weights) ^ shard_rules(config).keys()):
        raise UserError(f"{folder} does not hold the parameters of its own model.json: {odd[0]!r}")
    files = [folder / name for name in layout.optimizer if (folder / STATE).exists()]
    moments = LocalTensors(files, config)
    moments.check_whole()
    return weights.table(), moments.table()


def _total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def describe(folder: Path) -> dict[str, Any]:
    """Everything `inspect` knows of a verified checkpoint, as plain JSON values.

    `training` is None for an exported model, which has weights only.
    """
    weights, moments = tensor_tables(folder)
    config, layout = read_config(folder), read_layout(folder)
    state = read_state(folder).model_dump(mode="json", exclude={"rng"}) if (folder / STATE).exists() else None
    return {
        "path": str(folder),
        "step": checkpoint_step(folder) if state is None else state["step"],
        "manifest_sha256": committed_digest(folder),
        "bytes": _total_bytes(folder),
        "layout": {"dp": layout.dp, "cp": layout.cp, "tp": layout.tp},
        "files": {"weights": list(layout.weights), "optimizer": [] if state is None else list(layout.optimizer)},
        "model": config.model_dump(mode="json"),
        "parameters": sum(math.prod(row.shape) for row in weights),
        "training": state,
        "tensors": [row._asdict() for row in weights],
        "optimizer_tensors": [row._asdict() for row in moments],
    }


def inspect(path: Path, *, as_json: bool) -> None:
    """Print what a checkpoint holds.

    Raises:
        UserError: none there, or a damaged one.
    """
    folder = resolve_checkpoint(path)
    found = describe(folder)
    if as_json:
        json.dump(found, sys.stdout, indent=1, sort_keys=True)
        sys.stdout.write("\n")
        return
    console = Console()
    for line in _lines(found, read_config(folder)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = Table("parameter", "type", "shape", "pieces")
    for row in found["tensors"]:
        table.add_row(row["name"], row["dtype"], " x ".join(map(str, row["shape"])), str(row["pieces"]))
    console.print(table)


def _lines(found: dict[str, Any], config: ModelConfig) -> list[str]:
    layout, training = found["layout"], found["training"]
    lines = [
        f"{found['path']}: step {found['step']}, {found['bytes']:,} bytes, manifest sha256 {found['manifest_sha256']}",
        f"written by dp={layout['dp']} cp={layout['cp']} tp={layout['tp']}",
        f"model {config.name}, pattern {config.pattern}: {found['parameters']:,} parameters",
        f"optimizer: {len(found['optimizer_tensors'])} tensors",
    ]
    if training is None:
        return [*lines, "no training state: an exported model"]
    gates = ", ".join(f"{name}={value}" for name, value in training["gates"].items())
    return [
        *lines,
        f"run {training['run_id']}, attempt {training['attempt']}, {training['tokens_total']:,} tokens",
        f"{training['precision']} on {training['device']}, torch {training['torch_version']}",
        f"data {training['data_fingerprint']}, cursor {training['cursor']}",
        f"config {training['config_hash']}",
        f"gates {training['gates_hash']}: {gates}",
        f"audit chain at {training['audit_anchor']}",
    ]
