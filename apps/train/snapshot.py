"""What this rank writes of a checkpoint: which tensors, into which files; copied first when training is to go on.

Not for when or where (save.py, writer.py) nor for what is inside a file (libs.model.weights and shard_files).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from apps.train.optim import HeldState
from libs.model import HybridLM
from libs.model.shard_files import LAYOUT_FILE, SavedLayout, shard_name, write_shard
from libs.model.text.tokenizer import Tokenizer
from libs.model.weights import CONFIG_FILE, WEIGHTS_FILE, save_model, write_config
from libs.parallel.mesh import Groups

OPTIMIZER = "optimizer.safetensors"
STATE = "trainer.json"
TOKENIZER = "tokenizer.json"


class Snapshot(NamedTuple):
    """What this rank writes of one step.

    weights, optimizer: by parameter name and "<part>/<parameter name>"; empty when another rank writes them.
    parts: into how many files the optimizer state of one tensor-parallel rank is divided. state_json: `trainer.json`.
    """

    model: HybridLM
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    parts: int
    tokenizer: Tokenizer
    state_json: str
    groups: Groups


class FileJob(NamedTuple):
    """Files that are written in one go, and how, into a given folder."""

    names: tuple[str, ...]
    write: Callable[[Path], None]


def take_snapshot(
    model: HybridLM,
    optimizer: HeldState,
    tokenizer: Tokenizer,
    state_json: str,
    groups: Groups,
    *,
    copy: bool,
) -> Snapshot:
    """This rank's part of a checkpoint. `copy`: on the host, so that training may go on while it is written.

    The first of the ranks that hold the same parameters writes them. Each of them writes its own part of the
    optimizer's state when that is sharded (`held_state` knows).
    """

    def on_host(tensors: dict[str, Tensor], copy: bool) -> dict[str, Tensor]:
        return {name: tensor.detach().to("cpu", copy=copy) for name, tensor in tensors.items()}

    if optimizer.weights is not None:
        weights = optimizer.weights
    else:
        weights = on_host(dict(model.named_parameters()), copy) if groups.dp_cp.rank == 0 else {}
    moments = on_host(optimizer.tensors, copy and not optimizer.copied)
    return Snapshot(model, weights, moments, optimizer.parts, tokenizer, state_json, groups)


def file_jobs(snapshot: Snapshot) -> list[FileJob]:
    """The files this rank writes. One process writes the files it always wrote; several add `layout.json`."""
    groups, config = snapshot.groups, snapshot.model.config
    tp, part = groups.tp, groups.dp_cp.rank
    jobs: list[FileJob] = []

    def whole_model(folder: Path) -> None:
        save_model(folder, snapshot.model, tensors=snapshot.weights)

    def shard(name: str, tensors: dict[str, Tensor]) -> FileJob:
        return FileJob((name,), lambda folder: write_shard(folder / name, tensors, config, tp.rank, tp.size))

    if part == 0:
        whole = FileJob((WEIGHTS_FILE, CONFIG_FILE), whole_model)
        jobs.append(whole if tp.size == 1 else shard(shard_name("model", tp.rank, tp.size), snapshot.weights))
    if tp.size == 1 and snapshot.parts == 1 and part == 0:
        jobs.append(FileJob((OPTIMIZER,), lambda folder: save_file(snapshot.optimizer, folder / OPTIMIZER)))
    elif part == 0 or snapshot.parts > 1:
        jobs.append(shard(shard_name("optimizer", tp.rank, tp.size, part, snapshot.parts), snapshot.optimizer))
    if groups.world.rank == 0:
        jobs.append(FileJob((TOKENIZER,), lambda folder: snapshot.tokenizer.save(folder / TOKENIZER)))
        jobs.append(FileJob((STATE,), lambda folder: _write_text(folder / STATE, snapshot.state_json)))
        if tp.size > 1:
            jobs.append(FileJob((CONFIG_FILE,), lambda folder: write_config(folder, config)))
        if groups.world.size > 1:
            layout = _saved_layout(groups, snapshot.parts).model_dump_json(indent=1)
            jobs.append(FileJob((LAYOUT_FILE,), lambda folder: _write_text(folder / LAYOUT_FILE, layout)))
    return jobs


def _write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def _saved_layout(groups: Groups, parts: int) -> SavedLayout:
    dp, cp, tp = groups.layout
    ranks = range(tp)
    weights = [WEIGHTS_FILE] if tp == 1 else [shard_name("model", rank, tp) for rank in ranks]
    moments = [shard_name("optimizer", rank, tp, part, parts) for rank in ranks for part in range(parts)]
    whole = tp == 1 and parts == 1
    return SavedLayout(dp=dp, cp=cp, tp=tp, weights=tuple(weights), optimizer=(OPTIMIZER,) if whole else tuple(moments))
