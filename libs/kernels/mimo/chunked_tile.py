"""One tile of the chunked scan: a few chunks of a block of heads, small enough to stay in cache.

The forward pieces, as batched matrix products; their hand-derived backward is `chunked_grad`. How tiles are
walked, and how the state goes from one to the next, is the business of `chunked`.
"""
# c chunks of the tile  h heads of the tile  C tokens of a chunk  R rank  F = R*C (rank outer, token inner)
# N state  P head width  A rotary angles.  Keys and queries live transposed, (c,h,N,F), so that the rotated
# pairs are contiguous blocks; values live as (c,h,F,P).

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnF


class Scratch:
    """Named buffers that all tiles of one call share.

    A tile's temporaries are a megabyte each: taken fresh from the allocator they cost more in page faults than
    the arithmetic on them. A buffer is valid until the same name is asked for again.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor of `shape`, in the memory kept under `name`."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = self._like.new_empty(size)
        return buffer[:size].view(shape)


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


def project(tile: TileInputs, params: HeadParams, divisor: int, scratch: Scratch) -> Projected:
    """Bias and rotate q and k, spread v over the ranks (PsiV)."""
    qk = tile.qk_2cgNRC
    if tile.heads_to_groups is not None:
        qk = qk.index_select(2, tile.heads_to_groups)
    c, h, C, P = tile.v_chCP.shape
    N, R = qk.shape[3:5]
    qk = torch.add(qk, params.qk_bias_2hNRC[:, None], out=scratch("qk", 2, c, h, N, R, C))
    lo, hi = rotary_slices(N, divisor)
    cos, sin = tile.cos_chAC[:, :, :, None], tile.sin_chAC[:, :, :, None]
    a, b = qk[:, :, :, lo], qk[:, :, :, hi]
    a_sin = torch.mul(a, sin, out=scratch("a_sin", *a.shape))
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(a_sin)
    x = torch.mul(tile.v_chCP[:, :, None], params.psi_hR1P, out=scratch("x", c, h, R, C, P))
    flat = qk.view(2, c * h, N, R * C)
    return Projected(flat[0], flat[1], x.view(c * h, R * C, P))


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


def state_updates(tile: TileInputs, decay: Decays, proj: Projected, scratch: Scratch) -> Tensor:
    """(c,h,N,P): what each chunk adds to the state at its end, without its last token's shifted term."""
    c, h, _ = tile.later_chC.shape
    keys = scale_tokens(proj.k_xNF, decay.leave_chC * tile.later_chC, scratch)
    x, N, P = keys.shape[0], keys.shape[1], proj.x_xFP.shape[-1]
    return torch.bmm(keys, proj.x_xFP, out=scratch("updates", x, N, P)).view(c, h, N, P)


def scale_tokens(k_xNF: Tensor, factor_chC: Tensor, scratch: Scratch) -> Tensor:
    """k with every token scaled, (x,N,F)."""
    x, N, F = k_xNF.shape
    C = factor_chC.shape[-1]
    shape = (x, N * (F // C), C)
    return torch.mul(k_xNF.view(shape), factor_chC.reshape(x, 1, C), out=scratch("keys", *shape)).view(x, N, F)


def last_products(proj: Projected, chunks: int, C: int) -> Tensor:
    """(c,h,N,P): sum over ranks of the last token's key times its value, the part whose weight comes later."""
    x, N, F = proj.k_xNF.shape
    # Contiguous copies (R columns of each): bmm would otherwise clone every matrix by itself.
    keys = proj.k_xNF.view(x, N, F // C, C)[..., -1].contiguous()
    values = proj.x_xFP.view(x, F // C, C, -1)[:, :, -1].contiguous()
    return torch.bmm(keys, values).view(chunks, x // chunks, N, -1)


def scores(proj: Projected, scratch: Scratch) -> Tensor:
    """(c*h, F, F): q . k for every pair of tokens and ranks of a chunk."""
    x, _, F = proj.q_xNF.shape
    return torch.bmm(proj.q_xNF.transpose(1, 2), proj.k_xNF, out=scratch("scores", x, F, F))


def weigh(scores_xFF: Tensor, weights_chCC: Tensor, params: HeadParams, scratch: Scratch) -> Tensor:
    """Apply the pair weights; the skip weight D is a diagonal, so it rides along for free."""
    c, h, C, _ = weights_chCC.shape
    F = scores_xFF.shape[-1]
    shape = (c, h, F // C, C, F // C, C)
    weighed = torch.mul(scores_xFF.view(shape), weights_chCC[:, :, None, :, None], out=scratch("weighed", *shape))
    if params.d_h is not None:
        weighed.view(c, h, F, F).diagonal(dim1=-2, dim2=-1).add_(params.d_h[:, None])
    return weighed.view_as(scores_xFF)


def raw_outputs(proj: Projected, weighed_xFF: Tensor, decay: Decays, h_in_chNP: Tensor, scratch: Scratch) -> Tensor:
    """(c,h,R,C,P): y before norm and gate = carried state + pairs inside the chunk."""
    c, h, N, P = h_in_chNP.shape
    x, _, F = proj.q_xNF.shape
    C = decay.carry_chC.shape[-1]
    y = torch.bmm(proj.q_xNF.transpose(1, 2), h_in_chNP.view(x, N, P), out=scratch("y", x, F, P))
    y.view(c, h, -1, C, P).mul_(decay.carry_chC[:, :, None, :, None])
    y.baddbmm_(weighed_xFF, proj.x_xFP)
    return y.view(c, h, -1, C, P)


def finish(y_chRCP: Tensor, tile: TileInputs, params: HeadParams, scratch: Scratch) -> Tensor:
    """Norm, gate and sum over ranks: (c,h,C,P), or (c,h,R,C,P) without `phi`. Overwrites y."""
    if params.norm_h11P is not None:
        y_chRCP.mul_(inverse_rms(y_chRCP, params.norm_eps)).mul_(params.norm_h11P)
    if tile.z_chCP is not None and params.zeta_hR1P is not None:
        pre = torch.mul(tile.z_chCP[:, :, None], params.zeta_hR1P, out=scratch("pre", *y_chRCP.shape))
        y_chRCP.mul_(nnF.silu(pre, inplace=True))
    if params.phi_hR1P is None:
        return y_chRCP
    return sum_ranks(y_chRCP, params.phi_hR1P)


def sum_ranks(u_chRCP: Tensor, factor_hR1P: Tensor) -> Tensor:
    """(c,h,C,P): sum over ranks of u * factor, without a temporary of the size of u."""
    total = u_chRCP[:, :, 0] * factor_hR1P[:, 0]
    for r in range(1, u_chRCP.shape[2]):
        total.addcmul_(u_chRCP[:, :, r], factor_hR1P[:, r])
    return total


def inverse_rms(y_chRCP: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(y_chRCP.square().mean(dim=-1, keepdim=True) + eps)
