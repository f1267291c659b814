"""What one request keeps in memory, as numbers: parts and layers of the recurrent state, widths of the KV cache, and
the name under which either may be reused. From these both the tensors and the plan of their bytes are made.

Not for allocating (`state_slots`, `kv_blocks`).
"""
# H heads  P head width  N state  R MIMO rank  A rotary angles  L layers that have a part  G kv heads  K head width

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from libs.flags.errors import UserError
from libs.kernels.mimo.shapes import accumulation_dtype
from libs.model.config import ModelConfig
from libs.model.pattern import LayerKind

CONV = "conv"
MIN_BLOCK, MAX_BLOCK = 16, 256


class StatePart(NamedTuple):
    """One kind of state: its name, and shape and dtype for one request and one layer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _check_layers(what: str, layers: tuple[int, ...]) -> None:
    if any(layer < 0 for layer in layers) or any(a >= b for a, b in pairwise(layers)):
        raise UserError(f"{what} must be block indices that rise from 0 or above, got {layers}")


@dataclass(frozen=True)
class StateLayout:
    """Which blocks of a model have which state.

    Attributes:
        layers: indices of the blocks that have every part of `recurrent`. conv_layers: of those that have `conv`, of
            shape (conv_dim, kernel). Either may be empty.

    Raises:
        UserError: indices that do not rise, parts without layers or layers without parts, an empty dimension, a name
            that is used twice.
    """

    layers: tuple[int, ...] = ()
    recurrent: tuple[StatePart, ...] = ()
    conv_layers: tuple[int, ...] = ()
    conv: StatePart | None = None

    def __post_init__(self) -> None:
        _check_layers("layers", self.layers)
        _check_layers("conv_layers", self.conv_layers)
        if bool(self.layers) != bool(self.recurrent):
            raise UserError(f"layers {self.layers} and recurrent parts {self.recurrent} go together")
        if bool(self.conv_layers) != (self.conv is not None):
            raise UserError(f"conv_layers {self.conv_layers} and the conv part {self.conv} go together")
        names = [part.name for part in self.recurrent]
        if len(set(names)) != len(names) or CONV in names or "" in names:
            raise UserError(f"recurrent parts need names of their own, other than {CONV!r}: got {names}")
        if self.conv is not None and (self.conv.name != CONV or len(self.conv.shape) != 2):
            raise UserError(f"the conv part is {CONV!r} of shape (conv_dim, kernel), got {self.conv}")
        for part, _ in self.kinds:
            if not part.shape or min(part.shape) < 1:
                raise UserError(f"state part {part.name!r} has an empty shape {part.shape}; every size must be >= 1")

    @property
    def kinds(self) -> tuple[tuple[StatePart, tuple[int, ...]], ...]:
        """Every part with the layers that have it."""
        conv = () if self.conv is None else ((self.conv, self.conv_layers),)
        return (*((part, self.layers) for part in self.recurrent), *conv)

    @property
    def num_layers(self) -> int:
        """Layers with any state."""
        return len({*self.layers, *self.conv_layers})

    def nbytes(self, requests: int) -> int:
        """Bytes of the states of that many requests."""
        return requests * sum(part.nbytes * len(layers) for part, layers in self.kinds)


@dataclass(frozen=True)
class KvLayout:
    """Which blocks of a model are attention, and how wide their keys and values are; block_size in tokens.

    Raises:
        UserError: a block size outside 16..256, an empty width, or indices that do not rise.
    """

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int

    def __post_init__(self) -> None:
        _check_layers("layers", self.layers)
        if not MIN_BLOCK <= self.block_size <= MAX_BLOCK:
            raise UserError(f"block_size={self.block_size} tokens is outside {MIN_BLOCK}..{MAX_BLOCK}")
        if self.kv_heads < 1 or self.head_dim < 1:
            raise UserError(f"kv_heads={self.kv_heads} and head_dim={self.head_dim} must be >= 1")

    def nbytes(self, blocks: int) -> int:
        """Bytes of keys and values of that many blocks, all layers."""
        per_token = 2 * len(self.layers) * self.kv_heads * self.head_dim * self.dtype.itemsize
        return blocks * self.block_size * per_token

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold that many tokens."""
        return -(-tokens // self.block_size)


def _blocks_of(config: ModelConfig, kind: LayerKind) -> tuple[int, ...]:
    return tuple(index for index, found in enumerate(config.layers.trunk) if found is kind)


def state_layout(config: ModelConfig, dtype: torch.dtype) -> StateLayout:
    """The four parts of every Mamba-3 block of the trunk, in the order of `MimoState`.

    All parts are fp32 (fp64 in an fp64 model), `k` too: the scan hands over its last key in fp32, and rounding it on
    the way into the slots would make a continued request differ from an uninterrupted one.
    """
    layers, mixer = _blocks_of(config, LayerKind.MAMBA), config.mixer
    if not layers or mixer is None:
        return StateLayout()
    heads, acc = mixer.nheads, accumulation_dtype(dtype)
    parts = {
        "angle": (heads, mixer.angles),
        "ssm": (heads, mixer.headdim, mixer.d_state),
        "k": (mixer.mimo_rank, heads, mixer.d_state),
        "x": (heads, mixer.headdim),
    }
    return StateLayout(layers, tuple(StatePart(name, shape, acc) for name, shape in parts.items()))


def kv_layout(config: ModelConfig, dtype: torch.dtype, block_size: int) -> KvLayout:
    """Keys and values of every attention block of the trunk; without any, blocks are counted but hold no bytes."""
    layers, attention = _blocks_of(config, LayerKind.ATTENTION), config.attention
    if not layers or attention is None:
        return KvLayout((), 1, 1, dtype, block_size)
    return KvLayout(layers, attention.kv_heads, attention.head_dim, dtype, block_size)


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_fingerprint(config: ModelConfig, weights: str) -> str:
    """What a state or a block may be reused by: the model's identity and its weights (`weights_digest`, or the digest
    of the committed checkpoint they came from)."""
    identity = json.dumps([config.identity(), weights], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()
