"""A checkpoint as tensor-parallel ranks would leave it, written by one process."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from apps.train.save import checkpoint_dir
from apps.train.snapshot import OPTIMIZER, STATE, TOKENIZER
from libs.model import HybridLM
from libs.model.checkpoint import commit, staging_directory
from libs.model.shard_files import LAYOUT_FILE, SavedLayout, shard_name, write_shard
from libs.model.text.tokenizer import Tokenizer
from libs.model.weights import WEIGHTS_FILE, save_model, write_config
from tests.support.saved_layouts import state_of
from tests.support.sharding import shard_state_dict
from tests.support.tensor_parallel import config, rough_model

VOCAB = Tokenizer.bytes_tokenizer().vocab_size + Tokenizer.bytes_tokenizer().vocab_size % 2


def model(pattern: str = "M-*-/*-") -> HybridLM:
    """A model for the bytes tokenizer that two ranks can share."""
    return rough_model(config(pattern, vocab_size=VOCAB))


def parameters(full: HybridLM) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in full.named_parameters()}


def moments(full: HybridLM) -> dict[str, Tensor]:
    """Optimizer state by name, made up but different everywhere."""
    named = parameters(full)
    steps = {f"step/{name}": torch.tensor(3.0) for name in named}
    return steps | {
        f"{part}/{n}": t * 2 + i for i, part in enumerate(("exp_avg", "exp_avg_sq")) for n, t in named.items()
    }


def cut(tensors: dict[str, Tensor], full: HybridLM, rank: int, size: int) -> dict[str, Tensor]:
    found = {}
    for key, tensor in tensors.items():
        part, _, name = key.rpartition("/")
        whole = part == "step"
        found[key] = tensor if whole else shard_state_dict({name: tensor}, full.config, rank, size)[name]
    return found


def write_checkpoint(run: Path, step: int, full: HybridLM, tp: int) -> Path:
    """A committed checkpoint of `tp` ranks; tp 1 gives the whole files."""
    final = checkpoint_dir(run, step)
    staging = staging_directory(final)
    names = {kind: tuple(shard_name(kind, rank, tp) for rank in range(tp)) for kind in ("model", "optimizer")}
    if tp == 1:
        save_model(staging, full)
        names = {"model": (WEIGHTS_FILE,), "optimizer": (OPTIMIZER,)}
        save_file(moments(full), staging / OPTIMIZER)
    else:
        write_config(staging, full.config)
        for rank in range(tp):
            write_shard(staging / names["model"][rank], cut(parameters(full), full, rank, tp), full.config, rank, tp)
            write_shard(staging / names["optimizer"][rank], cut(moments(full), full, rank, tp), full.config, rank, tp)
        layout = SavedLayout(dp=2, cp=1, tp=tp, weights=names["model"], optimizer=names["optimizer"])
        (staging / LAYOUT_FILE).write_text(layout.model_dump_json())
    Tokenizer.bytes_tokenizer().save(staging / TOKENIZER)
    (staging / STATE).write_text(state_of(step).model_dump_json())
    commit(staging, final)
    return final
