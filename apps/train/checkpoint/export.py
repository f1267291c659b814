"""`fathom checkpoint export`: the model of a checkpoint of any layout, alone, in one folder that loads anywhere.

The folder is committed like a checkpoint, so every reader of checkpoints takes it. Not for other formats.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from apps.train.save import disk_full_is_usage, read_state
from apps.train.snapshot import STATE, TOKENIZER
from libs.flags.errors import UserError
from libs.model import HybridLM
from libs.model.checkpoint import checkpoint_step, commit, committed_digest, resolve_checkpoint, staging_directory
from libs.model.weights import load_model, save_model

ORIGIN = "export.json"
_TOKENS = 64


def export(path: Path, out: Path) -> None:
    """Write weights, config and tokenizer to `out`, after reading them back and comparing logits.

    Raises:
        UserError: no such checkpoint, a damaged one, `out` is there already, the disk is full, or the model that was
            read back does not compute the same logits; then nothing is left behind.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already: choose a new folder")
    checkpoint = resolve_checkpoint(path)
    if not (checkpoint / TOKENIZER).is_file():
        raise UserError(f"{checkpoint} holds no {TOKENIZER}: nobody could read what the model writes")
    with disk_full_is_usage(f"exporting to {out}"):
        staging = staging_directory(out)
        try:
            _write(checkpoint, staging)
            difference = _parity(checkpoint, staging)
            digest = commit(staging, out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    print(f"{out}: model of {checkpoint}, manifest sha256 {digest}")
    print(f"logits of {_TOKENS} fixed tokens, checkpoint against export: largest difference {difference:g}")
    print(f"evaluate it with: fathom eval --checkpoint {out} --data DIR --out FILE --suite loss_by_position")


def _write(checkpoint: Path, folder: Path) -> None:
    save_model(folder, load_model(checkpoint))
    shutil.copyfile(checkpoint / TOKENIZER, folder / TOKENIZER)
    state = read_state(checkpoint) if (checkpoint / STATE).exists() else None
    origin = {
        "step": checkpoint_step(checkpoint) if state is None else state.step,
        "checkpoint_sha256": committed_digest(checkpoint),
        "run_id": None if state is None else state.run_id,
        "data_fingerprint": None if state is None else state.data_fingerprint,
        "gates_hash": None if state is None else state.gates_hash,
    }
    (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def _parity(checkpoint: Path, folder: Path) -> float:
    """The largest difference of the two models' logits, which must be 0: the same values in the same types."""
    ours, theirs = _logits(load_model(checkpoint)), _logits(load_model(folder))
    if not torch.equal(ours, theirs):
        worst = float((ours.double() - theirs.double()).abs().max())
        raise UserError(
            f"the export does not compute what the checkpoint does: logits of {_TOKENS} fixed tokens differ by up to "
            f"{worst:g}; nothing was written"
        )
    if not bool(ours.isfinite().all()):
        raise UserError(f"{checkpoint}: logits of {_TOKENS} fixed tokens are not finite; nothing was written")
    return float((ours.double() - theirs.double()).abs().max())


@torch.no_grad()
def _logits(model: HybridLM) -> Tensor:
    """(1, 64, V) of tokens spread over the whole vocabulary."""
    model.eval()
    tokens_BS = (torch.arange(_TOKENS) * 7919 + 1)[None] % model.config.vocab_size
    return model.logits(tokens_BS)
