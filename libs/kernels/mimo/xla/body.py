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

    log_BHC, theta_BHCA: logarithm of the decay and the angle, summed up inside the chunk from the first token of each
    document on (`running_sum`). documents_BC: number of the document each token is in. before_B: that of the token
    before the chunk.
    """

    q_BCRGN: Tensor
    k_BCRGN: Tensor
    v_BCHP: Tensor
    log_BHC: Tensor
    theta_BHCA: Tensor
    gamma_BHC: Tensor
    later_BHC: Tensor
    z_BCHP: Tensor | None
    x_BCRHP: Tensor | None
    documents_BC: Tensor | None
    before_B: Tensor | None


class Carry(NamedTuple):
    """What enters a chunk: the angle, and the state with the shifted term of the token before in it."""

    angle_BHA: Tensor
    h_BHNP: Tensor


class _Masks(NamedTuple):
    """What a token may look at; None without documents.

    penalty: added to the logarithm of the decay from token s to t > s, 0 or -inf. carry: the document that was open
    before the chunk still lasts. through: it lasts to the end. leave: the chunk's last document has begun.
    """

    penalty_BFF: Tensor
    carry_B1C: Tensor | None
    through_B1: Tensor | None
    leave_B1C: Tensor | None


def _masks(chunk: ChunkInputs, ranks: int) -> _Masks:
    documents_BC, dtype = chunk.documents_BC, chunk.log_BHC.dtype
    token_F = _ranked(torch.arange(chunk.log_BHC.shape[-1], device=chunk.log_BHC.device), ranks)
    seen_BFF = (token_F[:, None] > token_F[None, :])[None]
    if documents_BC is not None:
        documents_BF = _ranked(documents_BC, ranks)
        seen_BFF = seen_BFF & (documents_BF[:, :, None] == documents_BF[:, None, :])
    # Added, not selected: a TPU would write the mask out for every head before it uses it.
    penalty_BFF = torch.where(seen_BFF, 0.0, -torch.inf).to(dtype)
    if documents_BC is None or chunk.before_B is None:
        return _Masks(penalty_BFF, None, None, None)
    carry_B1C = (documents_BC == chunk.before_B[:, None])[:, None]
    return _Masks(penalty_BFF, carry_B1C, carry_B1C[..., -1], (documents_BC == documents_BC[:, -1:])[:, None])


def _ranked(u_xC: Tensor, ranks: int) -> Tensor:
    """(x,F): once for each rank, rank outer."""
    return torch.cat([u_xC] * ranks, dim=-1)


def running_sum(u_xC: Tensor, documents_xC: Tensor | None) -> Tensor:
    """Sum over the last axis up to each token inside its document, by doubling: log2(C) shifted additions.

    Not a product with a mask: matrix units would round to bf16.
    """
    step = 1
    while step < u_xC.shape[-1]:
        before_xC = u_xC[..., :-step]
        if documents_xC is not None:
            before_xC = torch.where(documents_xC[..., step:] == documents_xC[..., :-step], before_xC, 0.0)
        u_xC = u_xC + nnF.pad(before_xC, (step, 0))
        step *= 2
    return u_xC


def rotated(u_BCRGN: Tensor, bias_BHRN: Tensor, theta_BHCA: Tensor) -> Tensor:
    """(B,H,R,C,N): one group's rows for each of its heads, biased, then rotated by the head's angle: channel a with
    channel a + N/2."""
    heads, groups = bias_BHRN.shape[1], u_BCRGN.shape[3]
    u_BGRCN = u_BCRGN.permute(0, 3, 2, 1, 4).to(bias_BHRN.dtype)
    per_head = bias_BHRN.reshape(bias_BHRN.shape[0], groups, heads // groups, *bias_BHRN.shape[2:])
    u = (u_BGRCN[:, :, None] + per_head[:, :, :, :, None]).flatten(1, 2)
    lo, hi = rotary_slices(u.shape[-1], u.shape[-1] // theta_BHCA.shape[-1])
    cos, sin = (part[:, :, None] for part in (theta_BHCA.cos(), theta_BHCA.sin()))
    a, b = u[..., lo], u[..., hi]
    turned_lo, turned_hi = a * cos - b * sin, a * sin + b * cos
    if lo.stop == hi.start:
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
    params: HeadParams, carry: Carry, chunk: ChunkInputs, *, norm_eps: float, dtype: torch.dtype
) -> tuple[Carry, Tensor]:
    """The state after the chunk, and y (B,C,H,P) ((B,C,R,H,P) without mimo_out) in the accumulation dtype.

    dtype: operands of matrix products are rounded to it (bf16) and multiplied in the accumulation dtype. That is what a
    matrix unit does with bf16 operands, and the state itself is never rounded.
    """
    acc = params.mimo_v_BHRP.dtype
    log_BHC, R = chunk.log_BHC, params.q_bias_BHRN.shape[2]

    def rounded(u: Tensor) -> Tensor:
        # The value is rounded, its gradient is not.
        return u if dtype == acc else u + (u.to(dtype).to(acc) - u).detach()

    # What enters lasts as long as the first document does; what leaves is of the last one.
    masks = _masks(chunk, R)
    angle_BH1A, carry_BHC, through_BH = carry.angle_BHA[:, :, None], log_BHC.exp(), log_BHC[..., -1].exp()
    leave_log_BHC = log_BHC[..., -1:] - log_BHC
    if masks.carry_B1C is not None and masks.through_B1 is not None and masks.leave_B1C is not None:
        carry_B1C = masks.carry_B1C.to(acc)
        angle_BH1A = angle_BH1A * carry_B1C[..., None]
        carry_BHC, through_BH = carry_BHC * carry_B1C, through_BH * masks.through_B1.to(acc)
        # Masked before the exponential, which a token of another document may overflow.
        leave_log_BHC = torch.where(masks.leave_B1C, leave_log_BHC, -torch.inf)

    theta_BHCA = angle_BH1A + chunk.theta_BHCA
    q_BHRCN = rotated(chunk.q_BCRGN, params.q_bias_BHRN, theta_BHCA)
    k_BHRCN = rotated(chunk.k_BCRGN, params.k_bias_BHRN, theta_BHCA)
    if chunk.x_BCRHP is None:
        x_BHRCP = chunk.v_BCHP.to(acc).transpose(1, 2)[:, :, None] * params.mimo_v_BHRP[:, :, :, None]
    else:
        x_BHRCP = chunk.x_BCRHP.to(acc).permute(0, 3, 2, 1, 4)

    # Of every pair of rows (rank, token): made of the rows' own vectors, which costs a TPU a fifth of widening (C,C).
    log_BHF, later_BHF, gamma_BHF = (_ranked(u, R) for u in (log_BHC, chunk.later_BHC, chunk.gamma_BHC))
    decay_BHFF = (log_BHF[..., :, None] - log_BHF[..., None, :] + masks.penalty_BFF[:, None]).exp()
    same_FF = torch.eye(log_BHC.shape[-1], dtype=acc, device=log_BHC.device).repeat(R, R)
    weight_BHFF = decay_BHFF * later_BHF[..., None, :] + same_FF * gamma_BHF[..., None, :]
    q, k, x = rounded(q_BHRCN).flatten(2, 3), rounded(k_BHRCN).flatten(2, 3), rounded(x_BHRCP).flatten(2, 3)
    y = rounded((q @ k.transpose(2, 3)) * weight_BHFF) @ x
    y_BHRCP = y.view(x_BHRCP.shape) + carry_BHC[:, :, None, :, None] * (q @ rounded(carry.h_BHNP)).view(x_BHRCP.shape)
    if params.d_BH is not None:
        y_BHRCP = y_BHRCP + params.d_BH[:, :, None, None, None] * x_BHRCP
    entry_BHRCN = k_BHRCN * (leave_log_BHC.exp() * chunk.later_BHC)[:, :, None, :, None]
    added_BHNP = rounded(entry_BHRCN).flatten(2, 3).transpose(2, 3) @ x
    h_BHNP = through_BH[..., None, None] * carry.h_BHNP + added_BHNP
    angle_BHA = theta_BHCA[:, :, -1].remainder(TWO_PI)
    return Carry(angle_BHA, h_BHNP), _finish(y_BHRCP, chunk, params, norm_eps)
