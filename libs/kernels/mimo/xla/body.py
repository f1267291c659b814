"""One chunk of the scan in plain differentiable torch: no in-place writes, no shape or branch that depends on data.

The mathematics is README.md's of libs.kernels.mimo. Which tensor goes in where is `scan`'s business.
"""
# B sequences  H heads  C tokens of a chunk  G groups  R rank  F = R*C (rank outer, token inner)  N state  P head width
# A rotary angles

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnF

from libs.kernels.mimo.chunked_tile import rotary_slices
from libs.kernels.mimo.shapes import TWO_PI


class HeadParams(NamedTuple):
    """Parameters in the accumulation dtype, one copy for each sequence (`libs.kernels.chunk_loop`); None where the
    option is off."""

    q_bias_BHRN: Tensor
    k_bias_BHRN: Tensor
    mimo_v_BHRP: Tensor
    mimo_z_BHRP: Tensor | None
    mimo_out_BHRP: Tensor | None
    d_BH: Tensor | None
    norm_weight_BHP: Tensor | None


class ChunkInputs(NamedTuple):
    """One chunk. x is None unless the products v * mimo_v were made beforehand; documents without packing.

    documents_BC: number of the document each token is in. before_B: that of the token before the chunk.
    """

    q_BCRGN: Tensor
    k_BCRGN: Tensor
    v_BCHP: Tensor
    adt_BHC: Tensor
    dt_BHC: Tensor
    gamma_BHC: Tensor
    later_BHC: Tensor
    angles_BCHA: Tensor
    z_BCHP: Tensor | None
    x_BCRHP: Tensor | None
    documents_BC: Tensor | None
    before_B: Tensor | None


class Carry(NamedTuple):
    """What enters a chunk: the angle, and the state with the shifted term of the token before in it."""

    angle_BHA: Tensor
    h_BHNP: Tensor


class _Masks(NamedTuple):
    """pair: token t may look at s. carry: the chunk's first document still lasts. leave: the last one has begun."""

    pair_BCC: Tensor
    carry_BC: Tensor | None
    leave_BC: Tensor | None
    through_B: Tensor | None


def _masks(chunk: ChunkInputs) -> _Masks:
    C, device = chunk.dt_BHC.shape[-1], chunk.dt_BHC.device
    token = torch.arange(C, device=device)
    lower_1CC = (token[:, None] >= token[None, :])[None]
    if chunk.documents_BC is None or chunk.before_B is None:
        return _Masks(lower_1CC, None, None, None)
    documents, before = chunk.documents_BC, chunk.before_B
    last_B1 = documents[:, -1:]
    return _Masks(
        (documents[:, :, None] == documents[:, None, :]) & lower_1CC,
        documents == before[:, None],
        documents == last_B1,
        last_B1[:, 0] == before,
    )


def _running_sum(u_BxC: Tensor, pair_BCC: Tensor) -> Tensor:
    """Sum up to each token inside its document. Not a product with the mask: matrix units would round to bf16."""
    pair = pair_BCC.view(pair_BCC.shape[0], *(1 for _ in u_BxC.shape[1:-1]), *pair_BCC.shape[1:])
    return torch.where(pair, u_BxC[..., None, :], 0.0).sum(-1)


def rotated(u_BCRGN: Tensor, bias_BHRN: Tensor, theta_BHAC: Tensor, divisor: int) -> Tensor:
    """(B,H,R,C,N): one group's rows for each of its heads, biased, then rotated by the head's angle."""
    heads, groups = bias_BHRN.shape[1], u_BCRGN.shape[3]
    u_BGRCN = u_BCRGN.permute(0, 3, 2, 1, 4).to(bias_BHRN.dtype)
    per_head = bias_BHRN.reshape(bias_BHRN.shape[0], groups, heads // groups, *bias_BHRN.shape[2:])
    u = (u_BGRCN[:, :, None] + per_head[:, :, :, :, None]).flatten(1, 2)
    lo, hi = rotary_slices(u.shape[-1], divisor)
    cos, sin = (part.transpose(2, 3)[:, :, None] for part in (theta_BHAC.cos(), theta_BHAC.sin()))
    a, b = u[..., lo], u[..., hi]
    turned_lo, turned_hi = a * cos - b * sin, a * sin + b * cos
    if divisor == 2:
        return torch.cat([turned_lo, turned_hi], dim=-1)
    return torch.cat([turned_lo, u[..., lo.stop : hi.start], turned_hi, u[..., hi.stop :]], dim=-1)


def _finish(y_BHRCP: Tensor, chunk: ChunkInputs, params: HeadParams, norm_eps: float) -> Tensor:
    """Norm, gate and sum over ranks."""

    def ranked(u_BHRP: Tensor) -> Tensor:
        return u_BHRP[:, :, :, None]

    if params.norm_weight_BHP is not None:
        inverse = torch.rsqrt(y_BHRCP.square().mean(dim=-1, keepdim=True) + norm_eps)
        y_BHRCP = y_BHRCP * inverse * params.norm_weight_BHP[:, :, None, None]
    if chunk.z_BCHP is not None and params.mimo_z_BHRP is not None:
        z_BHCP = chunk.z_BCHP.to(y_BHRCP.dtype).transpose(1, 2)
        y_BHRCP = y_BHRCP * nnF.silu(z_BHCP[:, :, None] * ranked(params.mimo_z_BHRP))
    if params.mimo_out_BHRP is None:
        return y_BHRCP.permute(0, 3, 2, 1, 4)
    return (y_BHRCP * ranked(params.mimo_out_BHRP)).sum(dim=2).transpose(1, 2)


def run_chunk(
    params: HeadParams, carry: Carry, chunk: ChunkInputs, *, divisor: int, norm_eps: float, dtype: torch.dtype
) -> tuple[Carry, Tensor]:
    """The state after the chunk, and y (B,C,H,P) ((B,C,R,H,P) without mimo_out) in the accumulation dtype.

    dtype: operands of matrix products are rounded to it (bf16) and multiplied in the accumulation dtype. That is what a
    matrix unit does with bf16 operands, and the state itself is never rounded.
    """
    acc = params.mimo_v_BHRP.dtype
    masks = _masks(chunk)

    def rounded(u: Tensor) -> Tensor:
        # The value is rounded, its gradient is not.
        return u if dtype == acc else u + (u.to(dtype).to(acc) - u).detach()

    # Angles: the running sum inside the chunk, on top of the one that enters.
    turn_BHAC = torch.tanh(chunk.angles_BCHA).permute(0, 2, 3, 1) * (chunk.dt_BHC * torch.pi)[:, :, None]
    start_BHAC = carry.angle_BHA[..., None]
    if masks.carry_BC is not None:
        start_BHAC = start_BHAC * masks.carry_BC[:, None, None].to(acc)
    theta_BHAC = start_BHAC + _running_sum(turn_BHAC, masks.pair_BCC)
    q_BHRCN = rotated(chunk.q_BCRGN, params.q_bias_BHRN, theta_BHAC, divisor)
    k_BHRCN = rotated(chunk.k_BCRGN, params.k_bias_BHRN, theta_BHAC, divisor)
    if chunk.x_BCRHP is None:
        x_BHRCP = chunk.v_BCHP.to(acc).transpose(1, 2)[:, :, None] * params.mimo_v_BHRP[:, :, :, None]
    else:
        x_BHRCP = chunk.x_BCRHP.to(acc).permute(0, 3, 2, 1, 4)

    # Decays: masked before the exponential, so that no future token overflows it.
    log_BHC = _running_sum(chunk.adt_BHC, masks.pair_BCC)
    pair_BHCC = _masked_exp(log_BHC[..., :, None] - log_BHC[..., None, :], masks.pair_BCC[:, None])
    leave_BHC = _masked_exp(log_BHC[..., -1:] - log_BHC, None if masks.leave_BC is None else masks.leave_BC[:, None])
    carry_BHC, through_BH = log_BHC.exp(), log_BHC[..., -1].exp()
    if masks.carry_BC is not None and masks.through_B is not None:
        carry_BHC = carry_BHC * masks.carry_BC[:, None].to(acc)
        through_BH = through_BH * masks.through_B[:, None].to(acc)

    C = log_BHC.shape[-1]
    diagonal_CC = torch.eye(C, dtype=torch.bool, device=log_BHC.device)
    weight_BHCC = torch.where(diagonal_CC, chunk.gamma_BHC[..., None, :], pair_BHCC * chunk.later_BHC[..., None, :])
    q, k, x = rounded(q_BHRCN).flatten(2, 3), rounded(k_BHRCN).flatten(2, 3), rounded(x_BHRCP).flatten(2, 3)
    R = q_BHRCN.shape[2]
    scores = (q @ k.transpose(2, 3)).view(*q.shape[:2], R, C, R, C) * weight_BHCC[:, :, None, :, None]
    y = rounded(scores.view(*q.shape[:2], R * C, R * C)) @ x
    y_BHRCP = y.view(x_BHRCP.shape) + carry_BHC[:, :, None, :, None] * (q @ rounded(carry.h_BHNP)).view(x_BHRCP.shape)
    if params.d_BH is not None:
        y_BHRCP = y_BHRCP + params.d_BH[:, :, None, None, None] * x_BHRCP
    entry_BHRCN = k_BHRCN * (leave_BHC * chunk.later_BHC)[:, :, None, :, None]
    added_BHNP = rounded(entry_BHRCN).flatten(2, 3).transpose(2, 3) @ x
    h_BHNP = through_BH[..., None, None] * carry.h_BHNP + added_BHNP
    angle_BHA = theta_BHAC[..., -1].remainder(TWO_PI)
    return Carry(angle_BHA, h_BHNP), _finish(y_BHRCP, chunk, params, norm_eps)


def _masked_exp(u: Tensor, keep: Tensor | None) -> Tensor:
    """exp, and 0 where not kept; the gradient there is 0 too."""
    return u.exp() if keep is None else torch.where(keep, u, -torch.inf).exp()
