"""How many bytes one rank sends per optimizer step, by what for, by formula: for `--dry-run`.

Counted as rings send them: an all-reduce of n bytes over p ranks is 2 n (p - 1) / p, a reduce-scatter or an all-gather
half of that. Not a time: what a link carries and what overlaps is not known here. Decisions and logged numbers of a
step (some hundred bytes) are left out.
"""
# p ranks of a group

from __future__ import annotations

from libs.kernels.mimo import Dims
from libs.kernels.mimo.handover import summary_numel
from libs.model.config import ModelConfig
from libs.model.flops import parameter_count
from libs.model.pattern import LayerKind
from libs.model.sharding import local_config
from libs.parallel.mesh import Layout

FP32 = 4


def _one_way(nbytes: float, p: int) -> float:
    """An all-gather to, or a reduce-scatter of, `nbytes` in all."""
    return nbytes * (p - 1) / p


def step_communication(
    config: ModelConfig,
    layout: Layout,
    *,
    tokens: int,
    micro_batches: int,
    dtype_bytes: int,
    recompute: bool,
    gradients_whole: bool,
    optimizer_sharded: bool,
    fp8_elements: int = 0,
) -> dict[str, int]:
    """Bytes sent by one rank: "tp layers", "tp embedding and head", "cp scan", "cp attention", "dp gradients" and "dp
    parameters".

    Args:
        config: the whole model. tokens: of a micro-batch on one rank. dtype_bytes: of activations inside a layer (2
            under autocast). recompute: blocks run their forward twice (activation checkpointing). gradients_whole:
            every replica gets all of them (torch's engine), not the part that it updates (Megatron's).
            optimizer_sharded: a replica updates a part of the parameters, and gathers the others. fp8_elements: of a
            rank's parameters, those gathered as bytes; all others are fp32.

    Sequence parallelism sends the same bytes as an all-reduce does. Under tp a layer's input comes in fp32, since norms
    keep the dtype of the residual stream.
    """
    kinds = [*config.layers.trunk, *(kind for depth in config.layers.mtp for kind in depth)]
    heads, passes = 1 + len(config.layers.mtp), 2 if recompute else 1
    hidden, tp, cp = tokens * config.hidden_size, layout.tp, layout.cp
    # A reduction of the output forward, and of the input's gradient backward.
    per_layer = 2 * _one_way(hidden * dtype_bytes, tp) * passes + 2 * _one_way(hidden * FP32, tp)
    # An embedding is reduced forward; a head's input gradient backward, and three numbers of each token.
    ends = heads * (4 * _one_way(hidden * FP32, tp) + 2 * _one_way(3 * tokens * FP32, tp))
    once = {
        "tp layers": len(kinds) * per_layer,
        "tp embedding and head": ends,
        "cp scan": kinds.count(LayerKind.MAMBA) * _handover(config, layout) * (passes + 1),
        "cp attention": kinds.count(LayerKind.ATTENTION) * _keys(config, layout, tokens, dtype_bytes) * (passes + 1),
    }
    of_rank = parameter_count(local_config(config, tp)).total
    replicas = layout.dp * cp
    gathered = (of_rank - fp8_elements) * FP32 + fp8_elements
    per_step = {
        "dp gradients": _one_way(of_rank * FP32, replicas) * (2 if gradients_whole else 1),
        "dp parameters": _one_way(gathered if optimizer_sharded else 0, replicas),
    }
    sent = {name: nbytes * micro_batches for name, nbytes in once.items()} | per_step
    return {name: round(nbytes) for name, nbytes in sent.items()}


def _handover(config: ModelConfig, layout: Layout) -> float:
    """One exchange of a scan's end state."""
    mixer = config.mixer
    if mixer is None:
        return 0.0
    H, G = mixer.nheads // layout.tp, mixer.ngroups // layout.tp
    dims = Dims(1, 1, H, G, mixer.mimo_rank, mixer.d_state, mixer.headdim, mixer.angles)
    return _one_way(summary_numel(dims) * FP32 * layout.cp, layout.cp)


def _keys(config: ModelConfig, layout: Layout, tokens: int, dtype_bytes: int) -> float:
    """One exchange of keys and values of the whole row."""
    attention = config.attention
    if attention is None:
        return 0.0
    per_token = 2 * attention.kv_heads // layout.tp * attention.head_dim * dtype_bytes
    return _one_way(tokens * layout.cp * per_token, layout.cp)
