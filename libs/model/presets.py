"""Named model sizes, from one that trains on two CPU cores to one for eight H200, their dense twins, and an ablation.

A preset is a `ModelConfig` and nothing else; training options live in the recipes of apps.train.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from libs.flags.errors import UserError
from libs.model.config import AttentionConfig, MixerConfig, MlpConfig, ModelConfig
from libs.model.flops import parameter_count
from libs.model.pattern import LayerKind, parse_pattern

TWIN_TOLERANCE = 0.005
TWIN_SUFFIX = "_dense"

_HYBRIDS = (
    # For tests: every layer kind, milliseconds per step.
    ModelConfig(
        name="cpu_tiny",
        vocab_size=64,
        hidden_size=32,
        pattern="M-*-/*-",
        mixer=MixerConfig(nheads=4, headdim=16, d_state=16, mimo_rank=2, chunk_size=8),
        attention=AttentionConfig(nheads=4, kv_heads=2, head_dim=8),
        mlp=MlpConfig(width=64),
    ),
    # About 2M parameters: trains visibly in minutes on two cores.
    ModelConfig(
        name="cpu_demo",
        vocab_size=4096,
        hidden_size=128,
        pattern="M-M-*-M-",
        mixer=MixerConfig(nheads=4, headdim=64, d_state=32, mimo_rank=4, chunk_size=16),
        attention=AttentionConfig(nheads=4, kv_heads=1, head_dim=32),
        mlp=MlpConfig(width=640),
    ),
    ModelConfig(
        name="130m",
        vocab_size=32_768,
        hidden_size=768,
        pattern="M-M-M-M-M-*-M-M-M-M-M-*-/*-",
        mixer=MixerConfig(nheads=24),
        attention=AttentionConfig(nheads=12, kv_heads=4, head_dim=64, rope_theta=500_000.0),
        mlp=MlpConfig(width=2048),
    ),
    ModelConfig(
        name="1b",
        vocab_size=65_536,
        hidden_size=2048,
        pattern="M-M-M-M-M-M-M-*-M-M-M-M-M-M-M-*-/*-",
        mixer=MixerConfig(nheads=64, ngroups=4),
        attention=AttentionConfig(nheads=16, kv_heads=4, head_dim=128, rope_theta=500_000.0),
        mlp=MlpConfig(width=5632),
    ),
    # 128 heads and 8 groups: split eight ways, each device holds the reference geometry H=16, G=1, N=P=64,
    # R=4.
    ModelConfig(
        name="h200_8x",
        vocab_size=65_536,
        hidden_size=4096,
        pattern="M-M-M-M-M-M-M-*-M-M-M-M-M-M-M-*-/*-",
        mixer=MixerConfig(nheads=128, ngroups=8),
        attention=AttentionConfig(nheads=32, kv_heads=8, head_dim=128, rope_theta=500_000.0),
        mlp=MlpConfig(width=11_008),
    ),
)


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The attention-only ablation of a hybrid: every `M` becomes `*`, the MLP width makes the parameter count
    equal.

    Raises:
        UserError: no `M` to replace, no attention or MLP to replace it with, or no width within 0.5 %.
    """
    if LayerKind.MAMBA not in config.layers.kinds:
        raise UserError(f"dense twin of {config.name!r}: pattern {config.pattern!r} has no 'M' to replace")
    if config.attention is None or config.mlp is None or LayerKind.MLP not in config.layers.kinds:
        raise UserError(f"dense twin of {config.name!r}: needs `attention`, `mlp` and at least one '-' in the pattern")
    pattern = config.pattern.replace(LayerKind.MAMBA.value, LayerKind.ATTENTION.value)
    return same_size(config, pattern, config.name + TWIN_SUFFIX)


def same_size(config: ModelConfig, pattern: str, name: str) -> ModelConfig:
    """`config` with another pattern, and the MLP width that makes the parameter count equal.

    Raises:
        UserError: a part that the pattern needs is missing, or no width is within 0.5 %.
    """
    kinds = parse_pattern(pattern).kinds
    mixer = None if config.mixer is None or LayerKind.MAMBA not in kinds else config.mixer.model_dump()
    attention = None if config.attention is None or LayerKind.ATTENTION not in kinds else config.attention.model_dump()
    changes = {"name": name, "pattern": pattern, "mixer": mixer, "attention": attention}
    target = parameter_count(config).total
    base = config.parse({**config.model_dump(), **changes, "mlp": {"width": 1}})
    total = parameter_count(base).total
    per_unit = parameter_count(base.parse({**base.model_dump(), "mlp": {"width": 2}})).total - total
    exact = 1 + (target - total) / per_unit if per_unit else 0.0
    # Wide multiples are kinder to matrix units; take the widest that stays within the tolerance.
    for multiple in (128, 64, 16, 8, 1):
        width = round(exact / multiple) * multiple
        if width >= 1 and math.fabs(total + (width - 1) * per_unit - target) < TWIN_TOLERANCE / 2 * target:
            return base.parse({**base.model_dump(), "mlp": {"width": width}})
    raise UserError(f"{name!r}: no MLP width gives {target} parameters within {TWIN_TOLERANCE:.1%}")


def _ablation() -> tuple[ModelConfig, ...]:
    """What the minority of attention layers buys: none, 1 in 8, 1 in 4 and all, at equal parameters."""
    eighth = ModelConfig(
        name="ablation_eighth",
        vocab_size=4096,
        hidden_size=128,
        pattern="M-M-M-M-M-M-M-*-",
        mixer=MixerConfig(nheads=4, headdim=64, d_state=32, mimo_rank=4, chunk_size=16),
        attention=AttentionConfig(nheads=4, kv_heads=1, head_dim=32),
        mlp=MlpConfig(width=384),
    )
    others = {"none": "M-M-M-M-M-M-M-M-", "quarter": "M-M-M-*-M-M-M-*-", "all": "*-*-*-*-*-*-*-*-"}
    return (eighth, *(same_size(eighth, pattern, f"ablation_{name}") for name, pattern in others.items()))


PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {config.name: config for hybrid in _HYBRIDS for config in (hybrid, dense_twin(hybrid))}
    | {config.name: config for config in _ablation()}
)


def preset(name: str) -> ModelConfig:
    """The preset of that name. Raises UserError listing the known ones."""
    if name not in PRESETS:
        raise UserError.unknown("model preset", name, PRESETS)
    return PRESETS[name]
