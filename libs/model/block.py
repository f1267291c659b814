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
from libs.model.layers import ForwardContext, RMSNorm, between_layers
from libs.model.mixer import MambaMixer
from libs.model.mlp import GatedMlp
from libs.model.pattern import LayerKind
from libs.parallel.mesh import Parallel
from libs.parallel.tensor import enter, leave

LayerState: TypeAlias = MimoState | KvState | None


def build_layer(
    config: ModelConfig, kind: LayerKind, parallel: Parallel | None = None
) -> MambaMixer | Attention | GatedMlp:
    """The layer of one pattern character; the config has already checked that its part is there."""
    if kind is LayerKind.MAMBA:
        assert config.mixer is not None
        return MambaMixer(config.hidden_size, config.mixer, parallel)
    if kind is LayerKind.ATTENTION:
        assert config.attention is not None
        return Attention(config.hidden_size, config.attention, parallel)
    assert kind is LayerKind.MLP
    assert config.mlp is not None
    return GatedMlp(config.hidden_size, config.mlp, parallel)


class ResidualBlock(nn.Module):
    """x + layer(norm(x)). Under tensor parallelism the layer is sharded and its partial sums are added here."""

    def __init__(self, config: ModelConfig, kind: LayerKind, parallel: Parallel | None = None) -> None:
        super().__init__()
        self.kind, self.parallel = kind, parallel
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, between_layers(parallel))
        self.layer = build_layer(config, kind, parallel)

    def _normed(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        return enter(self.norm(x_BSD), self.parallel, context.seq_len)

    def forward(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        out: Tensor = x_BSD + leave(self.layer(self._normed(x_BSD, context), context), self.parallel)
        return out

    def prefill(self, x_BSD: Tensor, context: ForwardContext, state: LayerState = None) -> tuple[Tensor, LayerState]:
        """As forward, and the state after the last token; from an earlier state of the same block if one is given."""
        layer: Any = self.layer
        y_BSD, state = layer.prefill(self._normed(x_BSD, context), context, state)
        return x_BSD + leave(y_BSD, self.parallel), state

    def step(self, x_B1D: Tensor, context: ForwardContext, state: LayerState) -> tuple[Tensor, LayerState]:
        """One token; `state` must come from the same block."""
        layer: Any = self.layer
        y_B1D, state = layer.step(self._normed(x_B1D, context), context, state)
        return x_B1D + leave(y_B1D, self.parallel), state
