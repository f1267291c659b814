"""Decode: one token in, one token out, the state moved on by one.

Not the oracle (that is `reference`): here both rank-R updates of the state are one matrix product.
"""
# B sequences  H heads  G groups of B/C  R MIMO rank  N state  P head width  A rotary angles

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from libs.kernels.mimo.shapes import TWO_PI, MimoInputs, MimoState, accumulation_dtype, check_inputs, check_state


def _rotated_BHNR(u_BRGN: Tensor, bias_HRN: Tensor, cos_BHA1: Tensor, sin_BHA1: Tensor, divisor: int) -> Tensor:
    """Broadcast groups to heads, add the bias, rotate; the state axis ends up before the rank axis."""
    G = u_BRGN.shape[2]
    H, A = cos_BHA1.shape[1:3]
    u = u_BRGN.permute(0, 2, 3, 1).repeat_interleave(H // G, dim=1) + bias_HRN.transpose(1, 2)
    # Partner of channel i sits 2A further on for divisor 4 (quarter 2), A further on for divisor 2 (upper half).
    lo, hi = slice(0, A), slice(2 * A, 3 * A) if divisor == 4 else slice(A, 2 * A)
    a, b = u[:, :, lo], u[:, :, hi]
    out = u.clone()
    out[:, :, lo] = a * cos_BHA1 - b * sin_BHA1
    out[:, :, hi] = a * sin_BHA1 + b * cos_BHA1
    return out


def mamba3_mimo_step(
    state: MimoState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    adt: Tensor,
    dt: Tensor,
    trap: Tensor,
    q_bias: Tensor,
    k_bias: Tensor,
    mimo_v: Tensor,
    mimo_z: Tensor | None,
    mimo_out: Tensor | None,
    angles: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    *,
    rotary_dim_divisor: int,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, MimoState]:
    """Advance the recurrence of `api.mamba3_mimo` by one token.

    Args:
        state: four parts of B sequences; not modified.
        q, k: (B,R,G,N) after their norm, before bias. v, z: (B,H,P). adt, dt, trap: (B,H). angles: (B,H,A).
        The rest as in `mamba3_mimo`. dtype: of the result; that of v by default.

    Returns:
        Output (B,H,P), or (B,R,H,P) when `mimo_out` is None, and the new state.

    Raises:
        ValueError: an operand or a state part whose shape does not fit.
    """
    token = MimoInputs(
        q=q.unsqueeze(1), k=k.unsqueeze(1), v=v.unsqueeze(1), adt=adt.unsqueeze(2), dt=dt.unsqueeze(2),
        trap=trap.unsqueeze(2), q_bias=q_bias, k_bias=k_bias, mimo_v=mimo_v, angles=angles.unsqueeze(1),
        mimo_z=mimo_z, mimo_out=mimo_out, d=d, z=None if z is None else z.unsqueeze(1), norm_weight=norm_weight,
    )  # fmt: skip
    dims = check_inputs(token, rotary_dim_divisor)
    check_state(state, dims.B, dims)
    acc = accumulation_dtype(v.dtype)
    dt_BH, lam_BH = dt.to(acc), torch.sigmoid(trap.to(acc))
    alpha_BH = torch.exp(adt.to(acc))
    angle_BHA = torch.remainder(state.angle + torch.tanh(angles.to(acc)) * torch.pi * dt_BH[..., None], TWO_PI)
    cos, sin = angle_BHA.cos()[..., None], angle_BHA.sin()[..., None]
    q_BHNR = _rotated_BHNR(q.to(acc), q_bias.to(acc), cos, sin, rotary_dim_divisor)
    k_BHNR = _rotated_BHNR(k.to(acc), k_bias.to(acc), cos, sin, rotary_dim_divisor)

    psi_HPR = mimo_v.to(acc).transpose(1, 2)
    xr_BHPR = v.to(acc)[..., None] * psi_HPR
    before = ((1 - lam_BH) * dt_BH * alpha_BH)[..., None, None]
    now = (lam_BH * dt_BH)[..., None, None]
    keys_BHN2R = torch.cat([state.k.to(acc).permute(0, 2, 3, 1) * before, k_BHNR * now], dim=-1)
    values_BHP2R = torch.cat([state.x.to(acc)[..., None] * psi_HPR, xr_BHPR], dim=-1)
    h_BHPN = alpha_BH[..., None, None] * state.ssm + values_BHP2R @ keys_BHN2R.transpose(2, 3)

    y_BHPR = h_BHPN @ q_BHNR
    if d is not None:
        y_BHPR = y_BHPR + d.to(acc)[:, None, None] * xr_BHPR
    if norm_weight is not None:
        scale = torch.rsqrt(y_BHPR.square().mean(dim=2, keepdim=True) + norm_eps)
        y_BHPR = y_BHPR * scale * norm_weight.to(acc)[..., None]
    if z is not None and mimo_z is not None:
        y_BHPR = y_BHPR * F.silu(z.to(acc)[..., None] * mimo_z.to(acc).transpose(1, 2))
    weighed = y_BHPR if mimo_out is None else y_BHPR * mimo_out.to(acc).transpose(1, 2)
    out = weighed.permute(0, 3, 1, 2) if mimo_out is None else weighed.sum(dim=-1)
    new_state = MimoState(angle_BHA, h_BHPN, k_BHNR.permute(0, 3, 1, 2).to(state.k.dtype), v.to(state.x.dtype))
    return out.to(v.dtype if dtype is None else dtype), new_state
