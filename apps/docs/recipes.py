"""The table of recipes in apps/train/README.md, from the recipe files."""

from __future__ import annotations

from pathlib import Path

from apps.docs.blocks import table
from apps.train.config import TrainConfig
from apps.train.dry_run import planned_layout
from apps.train.origins import PRESET_KEY, Resolved, recipe_layer, recipe_names, resolve_config
from libs.model import parameter_count

_COLUMNS = ("recipe", "preset", "parameters", "window", "tokens per step", "lane", "layout")


def recipe_table(_root: Path) -> str:
    """A row for every recipe that ships."""
    return table(_COLUMNS, (_row(name, resolve_config([recipe_layer(name)])) for name in recipe_names()))


def _row(name: str, resolved: Resolved) -> tuple[str, ...]:
    config = resolved.config
    per_step = config.data.window * config.data.windows_per_batch * config.train.grad_accumulation
    return (
        f"`{name}`",
        _preset(resolved),
        f"{parameter_count(config.model.architecture()).total:,}",
        f"{config.data.window:,}",
        f"{per_step:,}",
        _lane(config),
        _layout(config),
    )


def _preset(resolved: Resolved) -> str:
    """The preset, and what the recipe replaces in it."""
    replaced = [
        key.removeprefix("model.")
        for key, origin in resolved.origins.items()
        if key.startswith("model.") and key != PRESET_KEY and origin.startswith("recipe")
    ]
    return resolved.config.model.preset + (f" ({', '.join(replaced)})" if replaced else "")


def _lane(config: TrainConfig) -> str:
    device = config.train.device_name or config.train.device
    return f"{device}, {config.train.precision}"


def _layout(config: TrainConfig) -> str:
    """Processes on CPUs and GPUs, chips of one process on a TPU."""
    if config.train.device in ("tpu", "xla"):
        mesh = config.xla
        return f"data={mesh.data} fsdp={mesh.fsdp} tensor={mesh.tensor}"
    layout = planned_layout(config)
    return "one process" if layout.world_size == 1 else str(layout)
