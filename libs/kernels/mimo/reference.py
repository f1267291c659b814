"""The oracle: the Mamba-3 MIMO recurrence, one token at a time, exactly as the method's paper writes it.

Every other backend is compared with this file. It is differentiable by autograd, runs in fp64 when its inputs
are fp64, and makes no attempt to be fast.
Source: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State Space Principles".
"""
# B sequences  S tokens  H heads  G groups of B/C  R MIMO rank  N state  P head width  A rotary angles

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from libs.kernels.mimo.shapes import TWO_PI, Dims, MimoInputs, MimoResult, MimoState, accumulation_dtype


def rotate(u_BRHN: Tensor, theta_BHA: Tensor, rotary_dim_divisor: int) -> Tensor:
    """Rotate pairs of state channels: (a, b) -> (a cos - b sin, a sin + b cos).

    Divisor 4 pairs quarter 0 with quarter 2 of N and leaves quarters 1 and 3; divisor 2 pairs i with i + N/2.
    """
    cos, sin = theta_BHA.cos()[:, None], theta_BHA.sin()[:, None]
    if rotary_dim_divisor == 4:
        a, keep1, b, keep3 = u_BRHN.chunk(4, dim=-1)
        return torch.cat([a * cos - b * sin, keep1, a * sin + b * cos, keep3], dim=-1)
    a, b = u_BRHN.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _finish_token(inputs: MimoInputs, y_BRHP: Tensor, z_BHP: Tensor | None, norm_eps: float) -> Tensor:
    """Output norm, gate and the sum over ranks of one token."""
    if inputs.norm_weight is not None:
        mean_square = y_BRHP.square().mean(dim=-1, keepdim=True)
        y_BRHP = y_BRHP * torch.rsqrt(mean_square + norm_eps) * inputs.norm_weight
    if z_BHP is not None:
        assert inputs.mimo_z is not None
        y_BRHP = y_BRHP * F.silu(z_BHP[:, None] * inputs.mimo_z.transpose(0, 1))
    if inputs.mimo_out is None:
        return y_BRHP
    return (y_BRHP * inputs.mimo_out.transpose(0, 1)).sum(dim=1)


def mimo_reference(
    inputs: MimoInputs, dims: Dims, rotary_dim_divisor: int, norm_eps: float, state: MimoState | None
) -> MimoResult:
    """Run the recurrence over all tokens; see `api.mamba3_mimo` for shapes.

    Returns the output in the accumulation dtype, (B,S,H,P) or (B,S,R,H,P), and the final state.
    """
    acc = accumulation_dtype(inputs.v.dtype)
    inputs = MimoInputs(*(None if t is None else t.to(acc) for t in inputs))  # type: ignore[arg-type]
    if state is None:
        state = MimoState.zeros(dims.B, dims.H, dims.P, dims.N, dims.R, dims.A, inputs.v.device, acc)
    angle_BHA, h_BHPN, k_BRHN, x_BHP = (part.to(acc) for part in state)
    psi_RHP = inputs.mimo_v.transpose(0, 1)
    per_group = dims.H // dims.G
    outputs = []
    for t in range(dims.S):
        dt_BH = inputs.dt[:, :, t]
        lam_BH = torch.sigmoid(inputs.trap[:, :, t])
        alpha_BH = torch.exp(inputs.adt[:, :, t])
        gamma_BH = lam_BH * dt_BH
        beta_BH = (1 - lam_BH) * dt_BH * alpha_BH

        turn_BHA = torch.tanh(inputs.angles[:, t]) * torch.pi * dt_BH[..., None]
        angle_BHA = torch.remainder(angle_BHA + turn_BHA, TWO_PI)
        # Bias before rotation: the bias turns with the token.
        q_BRHN = inputs.q[:, t].repeat_interleave(per_group, dim=2) + inputs.q_bias.transpose(0, 1)
        q_BRHN = rotate(q_BRHN, angle_BHA, rotary_dim_divisor)
        k_before_BRHN, x_before_BHP = k_BRHN, x_BHP
        k_BRHN = inputs.k[:, t].repeat_interleave(per_group, dim=2) + inputs.k_bias.transpose(0, 1)
        k_BRHN = rotate(k_BRHN, angle_BHA, rotary_dim_divisor)
        x_BHP = inputs.v[:, t]

        xr_BRHP = x_BHP[:, None] * psi_RHP
        before_BHPN = torch.einsum("brhn,brhp->bhpn", k_before_BRHN, x_before_BHP[:, None] * psi_RHP)
        now_BHPN = torch.einsum("brhn,brhp->bhpn", k_BRHN, xr_BRHP)
        h_BHPN = (
            alpha_BH[..., None, None] * h_BHPN
            + beta_BH[..., None, None] * before_BHPN
            + gamma_BH[..., None, None] * now_BHPN
        )
        y_BRHP = torch.einsum("bhpn,brhn->brhp", h_BHPN, q_BRHN)
        if inputs.d is not None:
            y_BRHP = y_BRHP + inputs.d[:, None] * xr_BRHP
        z_BHP = None if inputs.z is None else inputs.z[:, t]
        outputs.append(_finish_token(inputs, y_BRHP, z_BHP, norm_eps))
    return torch.stack(outputs, dim=1), MimoState(angle_BHA, h_BHPN, k_BRHN, x_BHP)
