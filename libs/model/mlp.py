"""Gated MLP (SwiGLU, Shazeer 2020): down(silu(gate(x)) * up(x)). Carries no state between tokens."""
# B sequences  S tokens  D hidden  W width

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from libs.model.config import MlpConfig
from libs.model.layers import ForwardContext, Projection
from libs.model.sharding import local_mlp
from libs.parallel.mesh import Parallel


class GatedMlp(nn.Module):
    """`gate_up` holds gate and up one after the other, so that both are one matrix product.

    A tensor-parallel rank holds a part of the width: a partial sum.
    """

    def __init__(self, hidden_size: int, config: MlpConfig, parallel: Parallel | None = None) -> None:
        super().__init__()
        if parallel is not None:
            config = local_mlp(config, parallel.tp.size)
        self.width = config.width
        self.gate_up = Projection(hidden_size, 2 * config.width)
        self.down = Projection(config.width, hidden_size, role="output")

    def forward(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        gate_BSW, up_BSW = self.gate_up.segments(x_BSD, (self.width, self.width))
        out: Tensor = self.down(F.silu(gate_BSW) * up_BSW)
        return out

    def prefill(self, x_BSD: Tensor, context: ForwardContext, state: None = None) -> tuple[Tensor, None]:
        return self(x_BSD, context), None

    def step(self, x_B1D: Tensor, context: ForwardContext, state: None) -> tuple[Tensor, None]:
        return self(x_B1D, context), None
