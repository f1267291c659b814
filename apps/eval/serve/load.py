"""From a checkpoint to an engine: gates, weights, tokenizer, memory. Not for HTTP."""

from __future__ import annotations

import time
from typing import NamedTuple

from apps.eval.loading import choose_device, engine_facts, load_tokenizer
from apps.eval.serve.config import ServeConfig
from apps.eval.serve.service import Served
from libs.flags.canonical import sha256_hex
from libs.flags.environment import fathom_variables
from libs.flags.installed import install
from libs.flags.resolve import resolve
from libs.model.checkpoint import MANIFEST, resolve_checkpoint
from libs.model.inference import Engine, EngineConfig
from libs.model.weights import load_model, read_config


class Loaded(NamedTuple):
    """An engine and what it serves."""

    engine: Engine
    served: Served


def load(config: ServeConfig) -> Loaded:
    """Open the checkpoint and allocate.

    Raises:
        UserError: no usable checkpoint or device, or settings that do not fit the model.
        GateRefused: the environment asks for a gate that cannot be honoured.
    """
    checkpoint, device = resolve_checkpoint(config.checkpoint), choose_device(config.device)
    saved = read_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint, saved)
    limits = EngineConfig(
        max_batch=config.max_batch,
        max_tokens=config.max_tokens,
        kv_blocks=config.kv_blocks,
        draft_length=config.draft_length,
    )
    install(resolve(fathom_variables(), engine_facts(device, saved, limits)))
    model = load_model(checkpoint, device=device)
    model.eval()
    weights = sha256_hex((checkpoint / MANIFEST).read_bytes())
    engine = Engine(model, limits, weights=weights)
    name = saved.name if config.name is None else config.name
    return Loaded(engine, Served(name, f"fp_{weights[:16]}", int(time.time()), tokenizer, config.max_tokens))


def plan_lines(engine: Engine) -> list[str]:
    """The memory plan, for people: mebibytes by component."""
    plan = engine.plan
    parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in plan.by_component.items() if size)
    return [
        f"memory plan: {plan.total / 2**20:.1f} MiB ({parts}) for {plan.requests} requests of up to "
        f"{engine.config.max_tokens} tokens in {plan.blocks - 1} blocks of {engine.config.block_size}",
        f"prefix cache: {engine.mode}; states kept: at most {engine.config.snapshot_bytes / 2**20:.0f} MiB more"
        if engine.mode == "snapshots"
        else f"prefix cache: {engine.mode}",
    ]
