"""What this machine and its packages offer for FP8 parameters. Importing this imports neither megatron-core nor
transformer-engine; `probe` does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import NamedTuple

import torch

from libs.flags.environment import allowed_variables

TE = "transformer-engine"
_TE_PARTS = (TE, "transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13")


class Environment(NamedTuple):
    """What the machine and its packages offer. `probe` fills it; None means absent.

    te_versions: the parts of transformer-engine that are installed. te_error: why it cannot be imported.
    te_recipes: TE's own reason against a recipe, by recipe. te_adam: the distributed optimizer uses TE's FusedAdam.
    """

    cuda: bool
    hip: bool
    device_name: str | None
    capability: tuple[int, int] | None
    toolkit: tuple[int, int] | None
    cudnn: tuple[int, int] | None
    te_versions: Mapping[str, str]
    te_error: str | None
    te_recipes: Mapping[str, str]
    megatron_has_te: bool
    te_adam: bool
    max_connections: str | None


def probe() -> Environment:
    """Look at this machine. Imports transformer-engine and megatron-core where they are installed."""
    cuda = torch.cuda.is_available()
    cudnn = torch.backends.cudnn.version() if cuda else None  # type: ignore[no-untyped-call]
    error, recipes = _import_te()
    # A transformer-engine that is installed and does not import takes megatron-core down with it.
    has_te, te_adam = _ask_megatron() if error is None else (False, False)
    return Environment(
        cuda=cuda,
        hip=torch.version.hip is not None,
        device_name=torch.cuda.get_device_name() if cuda else None,
        capability=torch.cuda.get_device_capability() if cuda else None,
        toolkit=None if torch.version.cuda is None else _major_minor(torch.version.cuda),
        cudnn=None if cudnn is None else (cudnn // 10_000, cudnn % 10_000 // 100),
        te_versions=_te_versions(),
        te_error=error,
        te_recipes=recipes,
        megatron_has_te=has_te,
        te_adam=te_adam,
        max_connections=allowed_variables().get("CUDA_DEVICE_MAX_CONNECTIONS"),
    )


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _te_versions() -> dict[str, str]:
    found = {}
    for name in _TE_PARTS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _import_te() -> tuple[str | None, dict[str, str]]:
    """Why transformer-engine cannot be imported, or None and its reasons against single recipes.

    Where it is only half installed it raises RuntimeError, and OSError where a CUDA library is missing.
    """
    try:
        te = importlib.import_module("transformer_engine.pytorch")
        importlib.import_module("transformer_engine_torch")
    except (ImportError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}", {}
    answers = {
        "tensorwise": te.is_fp8_available(return_reason=True),
        "blockwise": te.is_fp8_block_scaling_available(return_reason=True),
    }
    return None, {recipe: reason for recipe, (able, reason) in answers.items() if not able}


def _ask_megatron() -> tuple[bool, bool]:
    """Whether megatron-core took up transformer-engine, and whether its distributed optimizer uses TE's Adam."""
    has_te = all(
        importlib.import_module(f"megatron.core.{name}").HAVE_TE
        for name in ("fp8_utils", "extensions.transformer_engine")
    )
    adam: type = importlib.import_module("megatron.core.optimizer.distrib_optimizer").Adam
    return has_te, adam.__module__.partition(".")[0] == "transformer_engine"
