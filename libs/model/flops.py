"""Parameters and FLOPs per layer type, by formula from a config alone: no module is built.

For MFU, `--dry-run` and dense twins. Not a measurement, and not memory (see `memory`).
Letters: H heads, P headdim, N state, G groups, R rank, C chunk, A angles, D hidden, V vocabulary, F = C*R.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from libs.model.config import AttentionConfig, MixerConfig, MlpConfig, ModelConfig
from libs.model.pattern import LayerKind

# Raised whenever a formula below changes, so that two MFU numbers are only compared within one version.
FORMULA_VERSION = 1
# A multiply-add is two FLOPs; backward is twice the forward; recomputation under checkpointing is not
# counted.
TRAIN_FACTOR = 3


class ParameterCount(NamedTuple):
    """`by_layer_type`: "M", "*", "-" (trunk, their norms included), "embedding", "head", "mtp" (whole),
    "final_norm".

    `active` leaves out the MTP depths, which generation does not run.
    """

    by_layer_type: dict[str, int]
    total: int
    active: int


class FlopCount(NamedTuple):
    """FLOPs per token. `by_layer_type` (forward): "M", "*", "-", "head", "mtp"; `by_part` splits the same
    total into "projection" (matrix products with weights), "scan" and "attention_scores". `train` = 3 *
    `forward`.
    """

    formula_version: int
    by_layer_type: dict[str, float]
    by_part: dict[str, float]
    forward: float
    train: float


def mixer_parameters(hidden: int, mixer: MixerConfig) -> int:
    """in_proj, angle_proj, out_proj; dt_bias, D, B/C norm, B/C bias, mimo_x/z/o, output norm."""
    projections = hidden * (sum(mixer.packed_widths) + mixer.angles + mixer.inner)
    biases = 2 * mixer.nheads * mixer.mimo_rank * mixer.d_state
    ranks = 3 * mixer.mimo_rank * mixer.inner
    norm = mixer.inner if mixer.outproj_norm else 0
    return projections + biases + ranks + norm + 2 * mixer.nheads + 2 * mixer.d_state


def attention_parameters(hidden: int, attention: AttentionConfig) -> int:
    """Query, key, value and output projections, no biases."""
    return hidden * attention.head_dim * 2 * (attention.nheads + attention.kv_heads)


def mlp_parameters(hidden: int, mlp: MlpConfig) -> int:
    """Gate, up and down projections, no biases."""
    return 3 * hidden * mlp.width


def block_parameters(config: ModelConfig, kind: LayerKind) -> int:
    """One residual block with its norm."""
    hidden = config.hidden_size
    match kind:
        case LayerKind.MAMBA:
            assert config.mixer is not None
            return hidden + mixer_parameters(hidden, config.mixer)
        case LayerKind.ATTENTION:
            assert config.attention is not None
            return hidden + attention_parameters(hidden, config.attention)
        case LayerKind.MLP:
            assert config.mlp is not None
            return hidden + mlp_parameters(hidden, config.mlp)
        case LayerKind.MOE:
            raise AssertionError("a config with 'E' does not validate")


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Exact parameter counts of `HybridLM(config)`."""
    hidden, pattern = config.hidden_size, config.layers
    counts: Counter[str] = Counter()
    for kind in pattern.trunk:
        counts[kind.value] += block_parameters(config, kind)
    counts["embedding"] = config.vocab_size * hidden
    counts["head"] = 0 if config.tie_embeddings else config.vocab_size * hidden
    counts["final_norm"] = hidden
    for depth in pattern.mtp:
        # two input norms, the joining projection, the depth's final norm
        counts["mtp"] += 3 * hidden + 2 * hidden * hidden + sum(block_parameters(config, kind) for kind in depth)
    total = counts.total()
    return ParameterCount(dict(counts), total, total - counts["mtp"])


def scan_flops(mixer: MixerConfig) -> float:
    """Matrix FLOPs per token of the chunked scan, forward: (2 F^2 N + 2 F^2 P + 4 F N P) / C per head."""
    rows = mixer.chunk_size * mixer.mimo_rank
    n, p = mixer.d_state, mixer.headdim
    return mixer.nheads * (2 * rows * rows * (n + p) + 4 * rows * n * p) / mixer.chunk_size


def _block_flops(config: ModelConfig, kind: LayerKind, context: float) -> dict[str, float]:
    hidden = config.hidden_size
    parts: dict[str, float] = {}
    if kind is LayerKind.MAMBA:
        assert config.mixer is not None
        mixer = config.mixer
        parts["projection"] = 2 * hidden * (sum(mixer.packed_widths) + mixer.angles + mixer.inner)
        parts["scan"] = scan_flops(mixer)
    elif kind is LayerKind.ATTENTION:
        assert config.attention is not None
        parts["projection"] = 2 * attention_parameters(hidden, config.attention)
        parts["attention_scores"] = 4 * context * config.attention.nheads * config.attention.head_dim
    else:
        assert config.mlp is not None
        parts["projection"] = 2 * mlp_parameters(hidden, config.mlp)
    return parts


def flops_per_token(config: ModelConfig, seq_len: int, *, mean_context: float | None = None) -> FlopCount:
    """Model FLOPs per token of `HybridLM.loss`: embeddings are look-ups (0), norms and elementwise work are
    left out.

    Args:
        seq_len: tokens per sequence; a causal query sees (seq_len + 1) / 2 keys on average.
        mean_context: that average where documents are packed (sum L_i (L_i + 1) / 2 over sum L_i).
    """
    context = (seq_len + 1) / 2 if mean_context is None else mean_context
    by_type: dict[str, float] = {}
    by_part: dict[str, float] = {}

    def add(layer_type: str, parts: Mapping[str, float]) -> None:
        for part, flops in parts.items():
            by_type[layer_type] = by_type.get(layer_type, 0.0) + flops
            by_part[part] = by_part.get(part, 0.0) + flops

    hidden, pattern = config.hidden_size, config.layers
    head = {"projection": 2.0 * hidden * config.vocab_size}
    for kind in pattern.trunk:
        add(kind.value, _block_flops(config, kind, context))
    add("head", head)
    for depth in pattern.mtp:
        add("mtp", {"projection": 4.0 * hidden * hidden})
        add("mtp", head)
        for kind in depth:
            add("mtp", _block_flops(config, kind, context))
    forward = sum(by_type.values())
    return FlopCount(FORMULA_VERSION, by_type, by_part, forward, TRAIN_FACTOR * forward)
