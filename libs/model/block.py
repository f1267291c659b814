"""One pre-norm residual block per character of the pattern: x + layer(norm(x)).

Also the type of what a block carries from token to token when decoding.
"""
# B sequences  S tokens  D hidden

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor, nn

from libs.kernels.mimo import MimoState
from libs.model.attention import Attention, KvState
from libs.model.config import ModelConfig
from libs.model.layers import ForwardContext, RMSNorm
from libs.model.mixer import MambaMixer
from libs.model.mlp import GatedMlp
from libs.model.pattern import LayerKind

LayerState: TypeAlias = MimoState | KvState | None


def build_layer(config: ModelConfig, kind: LayerKind) -> MambaMixer | Attention | GatedMlp:
    """The layer of one pattern character; the config has already checked that its part is there."""
    if kind is LayerKind.MAMBA:
        assert config.mixer is not None
        return MambaMixer(config.hidden_size, config.mixer)
    if kind is LayerKind.ATTENTION:
        assert config.attention is not None
        return Attention(config.hidden_size, config.attention)
    assert kind is LayerKind.MLP
    assert config.mlp is not None
    return GatedMlp(config.hidden_size, config.mlp)


class ResidualBlock(nn.Module):
    """x + layer(norm(x))."""

    def __init__(self, config: ModelConfig, kind: LayerKind) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.layer = build_layer(config, kind)

    def forward(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        out: Tensor = x_BSD + self.layer(self.norm(x_BSD), context)
        return out

    def prefill(self, x_BSD: Tensor, context: ForwardContext) -> tuple[Tensor, LayerState]:
        """As forward, and the state after the last token."""
        y_BSD, state = self.layer.prefill(self.norm(x_BSD), context)
        return x_BSD + y_BSD, state

    def step(self, x_B1D: Tensor, context: ForwardContext, state: LayerState) -> tuple[Tensor, LayerState]:
        """One token; `state` must come from the same block."""
        layer: Any = self.layer
        y_B1D, state = layer.step(self.norm(x_B1D), context, state)
        return x_B1D + y_B1D, state
