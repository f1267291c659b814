"""The Mamba-3 MIMO mixer around the scan: projections, dt and A, the norms of B and C, parameters and their
precision.

Mathematics and packing order are MAMBA3.md's; the recurrence itself is libs.kernels.mimo.
"""
# B sequences  S tokens  D hidden  H heads  P headdim  G groups  R rank  N state  A angles

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libs.flags.errors import UserError
from libs.kernels.mimo import MimoState, mamba3_mimo, mamba3_mimo_step
from libs.model.config import AActivation, MixerConfig
from libs.model.layers import ForwardContext, Projection, RMSNorm, at_least_fp32
from libs.model.sharding import local_mixer
from libs.parallel.context import mamba3_mimo_context
from libs.parallel.mesh import Parallel

# Kept fp32 in a bf16 model: rounding dt_bias or A's factors changes decay over thousands of tokens.
FP32_PARAMETERS = ("dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")
BC_NORM_EPS = 1e-5


def a_activation(x: Tensor, kind: AActivation) -> Tensor:
    """-A before the floor. softplus, or heavy_tail: 1 + x for x >= 0, 1 / (1 - x) for x < 0."""
    if kind == "softplus":
        return F.softplus(x)
    # The clamp keeps the branch not taken away from its pole at x = 1, whose gradient would be inf * 0.
    return torch.where(x >= 0, 1 + x, 1 / (1 - x.clamp(max=0)))


class ScanOperands(NamedTuple):
    """Operands of the scan, token axis second: (B,S,...); of one step without it."""

    q_BSRGN: Tensor
    k_BSRGN: Tensor
    v_BSHP: Tensor
    z_BSHP: Tensor
    adt_BSH: Tensor
    dt_BSH: Tensor
    trap_BSH: Tensor
    angles_BSHA: Tensor


class MambaMixer(nn.Module):
    """u (B,S,D) -> (B,S,D). `in_proj` packs [z, x, B, C, dd_dt, dd_A, trap]; B and C lie as (g, r, n).

    Tensor-parallel ranks hold heads and groups of their own (`config` is then the local one) and return partial sums,
    which the block adds. `angle_proj` and the norms of B and C serve every head, so each rank holds them whole and
    sees a part of their gradient.
    """

    def __init__(self, hidden_size: int, config: MixerConfig, parallel: Parallel | None = None) -> None:
        super().__init__()
        group = None if parallel is None else parallel.tp
        self.config = config = config if group is None else local_mixer(config, group.size)
        heads, rank = config.nheads, config.mimo_rank
        self.in_proj = Projection(hidden_size, sum(config.packed_widths))
        self.angle_proj = Projection(hidden_size, config.angles, summed_over=group)
        self.out_proj = Projection(config.inner, hidden_size, role="output")
        self.B_norm = RMSNorm(config.d_state, BC_NORM_EPS, group)
        self.C_norm = RMSNorm(config.d_state, BC_NORM_EPS, group)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.B_bias = nn.Parameter(torch.empty(heads, rank, config.d_state))
        self.C_bias = nn.Parameter(torch.empty(heads, rank, config.d_state))
        self.mimo_x = nn.Parameter(torch.empty(heads, rank, config.headdim))
        self.mimo_z = nn.Parameter(torch.empty(heads, rank, config.headdim))
        self.mimo_o = nn.Parameter(torch.empty(heads, rank, config.headdim))
        self.out_norm = nn.Parameter(torch.empty(heads, config.headdim)) if config.outproj_norm else None

    def operands(self, u_BSD: Tensor) -> ScanOperands:
        """What the scan takes of each token. Raises UserError when parameters that must stay fp32 did not."""
        cfg = self.config
        if self.dt_bias.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"mixer parameters {', '.join(FP32_PARAMETERS)} must stay fp32, got {self.dt_bias.dtype}; "
                "cast a model with libs.model.cast_model, not with .to(dtype)"
            )
        z, x, b, c, dd_dt, dd_a, trap = self.in_proj.segments(u_BSD, cfg.packed_widths)
        grn = (cfg.ngroups, cfg.mimo_rank, cfg.d_state)
        k_BSRGN = self.B_norm(b.unflatten(-1, grn)).transpose(2, 3)
        q_BSRGN = self.C_norm(c.unflatten(-1, grn)).transpose(2, 3)
        dt_BSH = F.softplus(at_least_fp32(dd_dt) + self.dt_bias)
        decay_BSH = a_activation(at_least_fp32(dd_a), cfg.a_activation).clamp(min=cfg.a_floor)
        angles_BS1A = at_least_fp32(self.angle_proj(u_BSD)).unsqueeze(2)
        heads = (cfg.nheads, cfg.headdim)
        return ScanOperands(
            q_BSRGN=q_BSRGN,
            k_BSRGN=k_BSRGN,
            v_BSHP=x.unflatten(-1, heads),
            z_BSHP=z.unflatten(-1, heads),
            adt_BSH=-decay_BSH * dt_BSH,
            dt_BSH=dt_BSH,
            trap_BSH=at_least_fp32(trap),
            angles_BSHA=angles_BS1A.expand(-1, -1, cfg.nheads, -1),
        )

    def _scan(
        self, u_BSD: Tensor, context: ForwardContext, return_state: bool, initial: MimoState | None = None
    ) -> Any:
        assert context.mimo_backend is not None, "a pattern with 'M' resolves its backend"
        ops = self.operands(u_BSD)
        operands = (
            ops.q_BSRGN,
            ops.k_BSRGN,
            ops.v_BSHP,
            ops.adt_BSH.transpose(1, 2),
            ops.dt_BSH.transpose(1, 2),
            ops.trap_BSH.transpose(1, 2),
            self.C_bias,
            self.B_bias,
            self.mimo_x,
            self.mimo_z,
            self.mimo_o,
            ops.angles_BSHA,
            self.D,
            ops.z_BSHP,
            self.config.chunk_size,
            self.config.rotary_dim_divisor,
            ops.v_BSHP.dtype,
        )
        options: Any = {"norm_weight": self.out_norm, "backend": context.mimo_backend}
        if context.cp is not None:
            assert not return_state, "decode has no context parallelism"
            return mamba3_mimo_context(*operands, shard=context.cp, **options)
        return mamba3_mimo(  # type: ignore[call-overload]
            *operands,
            return_state,
            context.cu_seqlens,
            initial_state=initial,
            document_ids=context.document_ids,
            **options,
        )

    def forward(self, u_BSD: Tensor, context: ForwardContext) -> Tensor:
        out: Tensor = self.out_proj(self._scan(u_BSD, context, False).flatten(2))
        return out

    def prefill(
        self, u_BSD: Tensor, context: ForwardContext, state: MimoState | None = None
    ) -> tuple[Tensor, MimoState]:
        """As forward, from an earlier `state` if given; the bits of one call where the cut is on the chunk grid."""
        y_BSHP, state = self._scan(u_BSD, context, True, state)
        return self.out_proj(y_BSHP.flatten(2)), state

    def step(self, u_B1D: Tensor, context: ForwardContext, state: MimoState) -> tuple[Tensor, MimoState]:
        token = ScanOperands(*(operand.squeeze(1) for operand in self.operands(u_B1D)))
        y_BHP, state = self.advance(token, state)
        return self.out_proj(y_BHP.flatten(1)).unsqueeze(1), state

    def advance(self, token: ScanOperands, state: MimoState) -> tuple[Tensor, MimoState]:
        """One token of the recurrence: (B,H,P) before the output projection, and the new state."""
        return mamba3_mimo_step(
            state,
            token.q_BSRGN,
            token.k_BSRGN,
            token.v_BSHP,
            token.adt_BSH,
            token.dt_BSH,
            token.trap_BSH,
            self.C_bias,
            self.B_bias,
            self.mimo_x,
            self.mimo_z,
            self.mimo_o,
            token.angles_BSHA,
            self.D,
            token.z_BSHP,
            rotary_dim_divisor=self.config.rotary_dim_divisor,
            norm_weight=self.out_norm,
        )
