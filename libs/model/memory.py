"""How many bytes a training step needs, by component, by formula: for `--dry-run`, before anything is
allocated.

An estimate of tensors, checked against what autograd really saves; allocator overhead and the device's own
runtime are not in it.
"""
# T tokens of a micro-batch  D hidden  H heads  P headdim  G groups  R rank  N state  A angles  V vocabulary

from __future__ import annotations

from typing import Literal, NamedTuple

from libs.flags.errors import UserError
from libs.kernels.loss.chunked import default_chunk_tokens
from libs.model.config import MixerConfig, ModelConfig
from libs.model.flops import parameter_count
from libs.model.pattern import LayerKind

# Bytes of optimizer state per parameter: AdamW keeps two fp32 moments, SGD without momentum nothing.
OPTIMIZER_BYTES = {"adamw": 8, "sgd": 0}
FP32 = 4


class MemoryEstimate(NamedTuple):
    """Bytes. `by_component`: parameters, gradients, optimizer, activations (saved for backward), scan_states
    (the fp32 states among them), logits_chunk (logits that exist at one time, and the head's fp32 gradient),
    workspace (gradients of activations inside the block being differentiated).
    """

    by_component: dict[str, int]
    total: int


def _mixer_bytes(hidden: int, mixer: MixerConfig, dtype_bytes: int) -> int:
    state = mixer.ngroups * mixer.mimo_rank * mixer.d_state
    in_dtype = hidden + sum(mixer.packed_widths) + mixer.angles + 2 * state + mixer.inner
    # dt, A and trap with what their activations save, the decays derived from them, angles before and after
    # the sum.
    in_fp32 = 16 * mixer.nheads + 2 * mixer.angles * mixer.nheads
    widened = mixer.inner if dtype_bytes != FP32 else 0
    return in_dtype * dtype_bytes + (in_fp32 + widened) * FP32


def block_activation_bytes(config: ModelConfig, kind: LayerKind, dtype_bytes: int) -> int:
    """Bytes per token that one residual block saves for backward: its norm's input, then its layer's own."""
    hidden = config.hidden_size
    if kind is LayerKind.MAMBA:
        assert config.mixer is not None
        layer = _mixer_bytes(hidden, config.mixer, dtype_bytes)
    elif kind is LayerKind.ATTENTION:
        assert config.attention is not None
        attention = config.attention
        heads = attention.nheads + attention.kv_heads
        per_head = 2 * heads + attention.kv_heads + attention.nheads
        layer = dtype_bytes * (hidden + per_head * attention.head_dim) + FP32 * attention.nheads
    else:
        assert config.mlp is not None
        layer = dtype_bytes * (hidden + 4 * config.mlp.width)
    return FP32 * hidden + layer


def scan_state_bytes(mixer: MixerConfig, tokens: int) -> int:
    """One fp32 state (H, P, N) per chunk of one layer: an upper bound, a backend may keep fewer."""
    return FP32 * mixer.inner * mixer.d_state * -(-tokens // mixer.chunk_size)


def memory_estimate(
    config: ModelConfig,
    *,
    tokens: int,
    dtype_bytes: int,
    optimizer: str = "adamw",
    activation_checkpointing: Literal["none", "block"] = "none",
    parameter_bytes: int = FP32,
    device_type: str = "cuda",
    token_shards: int = 1,
    optimizer_shards: int = 1,
) -> MemoryEstimate:
    """Bytes of one training step on one device: of the whole model, or of a rank's `sharding.local_config`.

    Args:
        tokens: of one micro-batch on the device. dtype_bytes: of activations (2 under bf16 autocast, else 4).
        optimizer: "adamw" or "sgd". parameter_bytes: of parameters and gradients (4 under autocast).
        token_shards: ranks that share the tokens between layers (sequence parallelism). optimizer_shards: ranks that
            share the optimizer's state.

    Raises:
        UserError: an optimizer whose state is not known.
    """
    if optimizer not in OPTIMIZER_BYTES:
        raise UserError.unknown("optimizer", optimizer, OPTIMIZER_BYTES)
    parameters = parameter_count(config).total
    pattern = config.layers
    kinds = [*pattern.trunk, *(kind for depth in pattern.mtp for kind in depth)]
    residual = FP32 * tokens * config.hidden_size
    # Of what a block saves, its norm's input lies between layers; the rest is inside.
    saved_elsewhere = residual - residual // token_shards
    per_block = [tokens * block_activation_bytes(config, kind, dtype_bytes) - saved_elsewhere for kind in kinds]
    states = [
        scan_state_bytes(config.mixer, tokens) if kind is LayerKind.MAMBA and config.mixer is not None else 0
        for kind in kinds
    ]
    heads = residual // token_shards * (1 + 4 * len(pattern.mtp))
    if activation_checkpointing == "block":
        activations, scan = len(kinds) * (residual // token_shards) + max(per_block), max(states)
    else:
        activations, scan = sum(per_block), sum(states)
    chunk = min(tokens, default_chunk_tokens(config.vocab_size, device_type))
    by_component = {
        "parameters": parameters * parameter_bytes,
        "gradients": parameters * parameter_bytes,
        "optimizer": parameters * OPTIMIZER_BYTES[optimizer] // optimizer_shards,
        "activations": activations + heads,
        "scan_states": scan,
        "logits_chunk": FP32 * config.vocab_size * (chunk + config.hidden_size),
        "workspace": max(per_block),
    }
    return MemoryEstimate(by_component, sum(by_component.values()))
