"""One tile of the chunked scan: a few chunks of a block of heads, small enough to stay in cache.

The forward pieces, as batched matrix products; their hand-derived backward is `chunked_grad`. How tiles are
walked, and how the state goes from one to the next, is the business of `chunked`.
"""
# c chunks of the tile  h heads of the tile  C tokens of a chunk  R rank  F = R*C (rank outer, token inner)
# N state  P head width  A rotary angles.  Keys and queries live transposed, (c,h,N,F), so that the rotated
# pairs are contiguous blocks; values live as (c,h,F,P).

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnF


class HeadParams(NamedTuple):
    """Per-head parameters of the tile's heads, laid out for it. None where the option is off."""

    qk_bias_2hNRC: Tensor
    psi_hR1P: Tensor
    zeta_hR1P: Tensor | None
    phi_hR1P: Tensor | None
    d_h: Tensor | None
    norm_h11P: Tensor | None
    norm_eps: float


class TileInputs(NamedTuple):
    """What one tile reads. q and k are per group here; `heads_to_groups` (h,) says which group a head uses."""

    qk_2cgNRC: Tensor
    v_chCP: Tensor
    z_chCP: Tensor | None
    cos_chAC: Tensor
    sin_chAC: Tensor
    log_decay_chC: Tensor
    gamma_chC: Tensor
    later_chC: Tensor
    pair_cCC: Tensor
    carry_cC: Tensor | None
    leave_cC: Tensor | None
    through_c: Tensor | None
    heads_to_groups: Tensor | None


class Projected(NamedTuple):
    """Rotated queries and keys, and the values of every rank."""

    q_xNF: Tensor
    k_xNF: Tensor
    x_xFP: Tensor


class Decays(NamedTuple):
    """Exponentials of one tile: between tokens, from the chunk's start, to its end, and across it."""

    pair_chCC: Tensor
    carry_chC: Tensor
    leave_chC: Tensor
    through_ch: Tensor


def rotary_slices(N: int, divisor: int) -> tuple[slice, slice]:
    """The two blocks of state channels that form rotated pairs: quarters 0 and 2, or both halves."""
    A = N // divisor
    return slice(0, A), slice(2 * A, 3 * A) if divisor == 4 else slice(A, 2 * A)


def project(tile: TileInputs, params: HeadParams, divisor: int) -> Projected:
    """Bias and rotate q and k, spread v over the ranks (PsiV)."""
    qk = tile.qk_2cgNRC
    if tile.heads_to_groups is not None:
        qk = qk.index_select(2, tile.heads_to_groups)
    qk = qk + params.qk_bias_2hNRC[:, None]
    _, c, h, N, R, C = qk.shape
    lo, hi = rotary_slices(N, divisor)
    cos, sin = tile.cos_chAC[:, :, :, None], tile.sin_chAC[:, :, :, None]
    a, b = qk[:, :, :, lo], qk[:, :, :, hi]
    a_sin = a * sin
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(a_sin)
    x = tile.v_chCP[:, :, None] * params.psi_hR1P
    flat = qk.view(2, c * h, N, R * C)
    return Projected(flat[0], flat[1], x.view(c * h, R * C, x.shape[-1]))


def decays(tile: TileInputs) -> Decays:
    """Decay factors of the tile; documents that end inside it cut them to zero."""
    s = tile.log_decay_chC
    pair = (s[..., :, None] - s[..., None, :]).masked_fill_(~tile.pair_cCC[:, None], -torch.inf).exp_()
    end = s[..., -1:]
    carry, leave, through = s.exp(), (end - s).exp_(), end[..., 0].exp()
    if tile.carry_cC is not None and tile.leave_cC is not None and tile.through_c is not None:
        carry = carry * tile.carry_cC[:, None]
        leave = leave * tile.leave_cC[:, None]
        through = through * tile.through_c[:, None]
    return Decays(pair, carry, leave, through)


def pair_weights(tile: TileInputs, decay: Decays) -> Tensor:
    """(c,h,C,C) weight of token s on token t: gamma on the diagonal, decayed `later` below it."""
    weights = decay.pair_chCC * tile.later_chC[..., None, :]
    weights.diagonal(dim1=-2, dim2=-1).copy_(tile.gamma_chC)
    return weights


def state_updates(tile: TileInputs, decay: Decays, proj: Projected) -> Tensor:
    """(c,h,N,P): what each chunk adds to the state at its end, without its last token's shifted term."""
    c, h, C = tile.later_chC.shape
    keys = proj.k_xNF.view(c, h, -1, C) * (decay.leave_chC * tile.later_chC)[:, :, None]
    return torch.bmm(keys.view_as(proj.k_xNF), proj.x_xFP).view(c, h, proj.k_xNF.shape[1], -1)


def last_products(proj: Projected, chunks: int, C: int) -> Tensor:
    """(c,h,N,P): sum over ranks of the last token's key times its value, the part whose weight comes later."""
    x, N, F = proj.k_xNF.shape
    keys = proj.k_xNF.view(x, N, F // C, C)[..., -1]
    values = proj.x_xFP.view(x, F // C, C, -1)[:, :, -1]
    return torch.bmm(keys, values).view(chunks, x // chunks, N, -1)


def scores(proj: Projected) -> Tensor:
    """(c*h, F, F): q . k for every pair of tokens and ranks of a chunk."""
    return torch.bmm(proj.q_xNF.transpose(1, 2), proj.k_xNF)


def weigh(scores_xFF: Tensor, weights_chCC: Tensor, params: HeadParams) -> Tensor:
    """Apply the pair weights in place; the skip weight D is a diagonal, so it rides along for free."""
    c, h, C, _ = weights_chCC.shape
    F = scores_xFF.shape[-1]
    scores_xFF.view(c, h, F // C, C, F // C, C).mul_(weights_chCC[:, :, None, :, None])
    if params.d_h is not None:
        scores_xFF.view(c, h, F, F).diagonal(dim1=-2, dim2=-1).add_(params.d_h[:, None])
    return scores_xFF


def raw_outputs(proj: Projected, weighed_xFF: Tensor, decay: Decays, h_in_chNP: Tensor) -> Tensor:
    """(c,h,R,C,P): y before norm and gate = carried state + pairs inside the chunk."""
    c, h, N, P = h_in_chNP.shape
    C = decay.carry_chC.shape[-1]
    y = torch.bmm(proj.q_xNF.transpose(1, 2), h_in_chNP.reshape(c * h, N, P))
    y.view(c, h, -1, C, P).mul_(decay.carry_chC[:, :, None, :, None])
    y.baddbmm_(weighed_xFF, proj.x_xFP)
    return y.view(c, h, -1, C, P)


def finish(y_chRCP: Tensor, tile: TileInputs, params: HeadParams) -> Tensor:
    """Norm, gate and sum over ranks: (c,h,C,P), or (c,h,R,C,P) without `phi`. May overwrite y."""
    if params.norm_h11P is not None:
        y_chRCP = y_chRCP * inverse_rms(y_chRCP, params.norm_eps) * params.norm_h11P
    if tile.z_chCP is not None and params.zeta_hR1P is not None:
        y_chRCP.mul_(nnF.silu(tile.z_chCP[:, :, None] * params.zeta_hR1P, inplace=True))
    if params.phi_hR1P is None:
        return y_chRCP
    return y_chRCP.mul_(params.phi_hR1P).sum(dim=2)


def inverse_rms(y_chRCP: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(y_chRCP.square().mean(dim=-1, keepdim=True) + eps)
