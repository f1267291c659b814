"""The hand-derived backward of one tile of the chunked scan (forward: `chunked_tile`, derivation: README.md).

Everything is recomputed from the tile's inputs and the states at its chunk starts; nothing of size S x F is saved.
"""
# c chunks  h heads  x = c*h  C tokens of a chunk  R rank  F = R*C (rank outer, token inner)  N state  P head width

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnF

from libs.kernels.mimo.chunked_tile import (
    Decays,
    HeadParams,
    Projected,
    Scratch,
    TileInputs,
    inverse_rms,
    pair_weights,
    raw_outputs,
    rotary_slices,
    scale_tokens,
    scores,
    sum_ranks,
    weigh,
)


class ParamSums(NamedTuple):
    """Gradients of per-head parameters, added up over the tiles of one block of heads; None where the option is
    off. They keep the token axis C of a chunk, so that adding is one streaming pass; the reader sums it once."""

    qk_bias_2hNRC: Tensor
    psi_hRCP: Tensor
    zeta_hRCP: Tensor | None
    phi_hRCP: Tensor | None
    norm_hRCP: Tensor | None
    d_h: Tensor | None

    @classmethod
    def zeros(cls, params: HeadParams, C: int) -> ParamSums:
        """Fresh totals for the heads of `params`."""
        h, R, _, P = params.psi_hR1P.shape

        def like(u: Tensor | None) -> Tensor | None:
            return None if u is None else u.new_zeros(h, R, C, P)

        return cls(
            torch.zeros_like(params.qk_bias_2hNRC),
            params.psi_hR1P.new_zeros(h, R, C, P),
            like(params.zeta_hR1P),
            like(params.phi_hR1P),
            like(params.norm_h11P),
            None if params.d_h is None else torch.zeros_like(params.d_h),
        )


class TileGrads(NamedTuple):
    """Gradients of one tile's own inputs. `d_state_hNP` is that of the state entering the tile."""

    d_qk_2cgNRC: Tensor
    d_v_chCP: Tensor
    d_z_chCP: Tensor | None
    d_theta_chAC: Tensor
    d_log_decay_chC: Tensor
    d_gamma_chC: Tensor
    d_later_chC: Tensor
    d_shift_ch: Tensor
    d_state_hNP: Tensor


def tile_backward(
    d_out: Tensor, d_next_hNP: Tensor, tile: TileInputs, shift_ch: Tensor, params: HeadParams, divisor: int,
    proj: Projected, decay: Decays, h_in_chNP: Tensor, d_key_hNR: Tensor | None, key_token: int,
    sums: ParamSums, scratch: Scratch,
) -> TileGrads:  # fmt: skip
    """Backward of one tile.

    Args:
        d_out: gradient of the tile's output, (c,h,C,P), or (c,h,R,C,P) without MIMO_Out.
        d_next_hNP: gradient of the state entering the following tile.
        shift_ch: weight of each chunk's last token that enters with the next chunk.
        proj, decay, h_in_chNP: recomputed by the caller, which needs them to walk the states forward.
        d_key_hNR: gradient of the rotated key of the last chunk's token `key_token`, which is part of the final
            state; None for every tile but the last.
        sums: parameter gradients, added to in place.
    """
    weights = pair_weights(tile, decay)
    raw = scores(proj, scratch)
    weighed = weigh(raw, weights, params, scratch)
    y = raw_outputs(proj, weighed, decay, h_in_chNP, scratch)
    d_y, d_z = finish_backward(d_out, y, tile, params, sums, scratch)
    core = _scan_backward(d_y, d_next_hNP, tile, shift_ch, proj, decay, weights, raw, weighed, h_in_chNP, scratch)
    if d_key_hNR is not None:
        c, h, C = tile.later_chC.shape
        core.d_qk_2xNF[1].view(c, h, *d_key_hNR.shape[1:], C)[-1, ..., key_token] += d_key_hNR
    d_qk, d_theta = _unrotate(core.d_qk_2xNF, proj, tile, divisor, scratch)
    if tile.heads_to_groups is None:
        d_group = d_qk.sum(dim=2, keepdim=True)
    else:
        d_group = torch.zeros_like(tile.qk_2cgNRC).index_add_(2, tile.heads_to_groups, d_qk)
    c, h, C, P = tile.v_chCP.shape
    d_x = core.d_x_xFP.view(c, h, -1, C, P)
    d_v = sum_ranks(d_x, params.psi_hR1P)
    add_products(sums.psi_hRCP, d_x, tile.v_chCP[:, :, None])
    for i in range(c):
        sums.qk_bias_2hNRC.add_(d_qk[:, i])
    if sums.d_h is not None:
        sums.d_h.add_(core.d_d_h)
    return TileGrads(
        d_group, d_v, d_z, d_theta, core.d_log_decay_chC, core.d_gamma_chC, core.d_later_chC, core.d_shift_ch,
        core.d_state_hNP,
    )  # fmt: skip


def add_products(total_hRCP: Tensor, u_chRCP: Tensor, w_ch1CP: Tensor) -> None:
    """Add sum over chunks of u * w to a running total; its token axis is summed once, at the end of the walk."""
    for u_hRCP, w_h1CP in zip(u_chRCP, w_ch1CP, strict=True):
        total_hRCP.addcmul_(u_hRCP, w_h1CP)


def finish_backward(
    d_out: Tensor, y_chRCP: Tensor, tile: TileInputs, params: HeadParams, sums: ParamSums, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """Backward of `chunked_tile.finish`: gradient of y (c,h,R,C,P) and of z (c,h,C,P). May overwrite y."""
    unit = inverse = d_z = None
    shape = y_chRCP.shape
    if params.norm_h11P is not None:
        inverse = inverse_rms(y_chRCP, params.norm_eps)
        unit = torch.mul(y_chRCP, inverse, out=scratch("unit", *shape))
        torch.mul(unit, params.norm_h11P, out=y_chRCP)
    spread = d_out if params.phi_hR1P is None else d_out[:, :, None]
    grad = scratch("d_y", *shape)
    if params.phi_hR1P is None:
        grad.copy_(spread)
    else:
        torch.mul(spread, params.phi_hR1P, out=grad)
    if tile.z_chCP is not None and params.zeta_hR1P is not None and sums.zeta_hRCP is not None:
        z = tile.z_chCP[:, :, None]
        pre = torch.mul(z, params.zeta_hR1P, out=scratch("pre", *shape))
        d_pre = torch.mul(grad, y_chRCP, out=scratch("d_pre", *shape))
        torch.ops.aten.silu_backward.grad_input(d_pre, pre, grad_input=d_pre)
        gate = nnF.silu(pre, inplace=True)
        grad.mul_(gate)
        y_chRCP.mul_(gate)
        d_z = sum_ranks(d_pre, params.zeta_hR1P)
        add_products(sums.zeta_hRCP, d_pre, z)
    if sums.phi_hRCP is not None:
        add_products(sums.phi_hRCP, y_chRCP, spread)
    if params.norm_h11P is not None and unit is not None and inverse is not None and sums.norm_hRCP is not None:
        add_products(sums.norm_hRCP, grad, unit)
        d_unit = grad.mul_(params.norm_h11P)
        along = torch.mul(d_unit, unit, out=scratch("pre", *shape)).mean(dim=-1, keepdim=True)
        grad.sub_(unit.mul_(along)).mul_(inverse)
    return grad, d_z


class _ScanGrads(NamedTuple):
    d_qk_2xNF: Tensor
    d_x_xFP: Tensor
    d_d_h: Tensor
    d_log_decay_chC: Tensor
    d_gamma_chC: Tensor
    d_later_chC: Tensor
    d_shift_ch: Tensor
    d_state_hNP: Tensor


def _scan_backward(
    d_y_chRCP: Tensor, d_next_hNP: Tensor, tile: TileInputs, shift_ch: Tensor, proj: Projected, decay: Decays,
    weights_chCC: Tensor, raw_xFF: Tensor, weighed_xFF: Tensor, h_in_chNP: Tensor, scratch: Scratch,
) -> _ScanGrads:  # fmt: skip
    """Backward of `raw_outputs` and of the state recurrence. Consumes `raw_xFF` and `weighed_xFF`."""
    c, h, N, P = h_in_chNP.shape
    x, _, F = proj.q_xNF.shape
    C = tile.later_chC.shape[-1]
    d_y = d_y_chRCP.view(x, F, P)
    d_qk = scratch("d_qk", 2, x, N, F)
    d_q, d_k = d_qk[0], d_qk[1]

    # Pairs inside the chunk: y += weighed @ x, weighed = weights * raw (+ D on the diagonal), raw = q^T k.
    d_pairs = torch.bmm(d_y, proj.x_xFP.transpose(1, 2), out=scratch("d_pairs", x, F, F))
    d_x = torch.bmm(weighed_xFF.transpose(1, 2), d_y, out=scratch("d_x", x, F, P))
    d_d = d_pairs.view(c, h, F, F).diagonal(dim1=-2, dim2=-1).sum(dim=(0, 2))
    # Two sums, not one over (2, 4): torch's two-axis reduction of this shape is ten times slower.
    d_weights = raw_xFF.mul_(d_pairs).view(c, h, F // C, C, F // C, C).sum(dim=2).sum(dim=3)
    d_raw = d_pairs
    d_raw.view(c, h, F // C, C, F // C, C).mul_(weights_chCC[:, :, None, :, None])

    # The carried state: y += carry * (q^T h).
    d_carried = torch.mul(d_y_chRCP, decay.carry_chC[:, :, None, :, None], out=scratch("pre", *d_y_chRCP.shape))
    d_carried = d_carried.view(x, F, P)
    torch.bmm(h_in_chNP.view(x, N, P), d_carried.transpose(1, 2), out=d_q)
    d_log = _sum_channels(d_q, proj.q_xNF, C, scratch).view(c, h, C)  # = carry * d carry, without dividing by it
    d_h = torch.bmm(proj.q_xNF, d_carried, out=scratch("updates", x, N, P)).view(c, h, N, P)
    d_q.baddbmm_(proj.k_xNF, d_raw.transpose(1, 2))
    torch.bmm(proj.q_xNF, d_raw, out=d_k)

    # The recurrence between chunks, backwards: h_{c+1} = through * h_c + sum_s entry_s k_s x_s.
    d_states = scratch("d_states", c + 1, h, N, P)
    d_states[c] = d_next_hNP
    for i in range(c - 1, -1, -1):
        torch.addcmul(d_h[i], decay.through_ch[i, :, None, None], d_states[i + 1], out=d_states[i])
    d_after = d_states[1:].view(x, N, P)
    d_through = torch.mul(d_after, h_in_chNP.view(x, N, P), out=scratch("d_keys", x, N, P)).flatten(1).sum(dim=1)
    d_through = d_through.view(c, h) * decay.through_ch

    entry = decay.leave_chC * tile.later_chC
    entry[..., -1] += shift_ch
    d_keys = torch.bmm(d_after, proj.x_xFP.transpose(1, 2), out=scratch("d_keys", x, N, F))
    d_entry = _sum_channels(d_keys, proj.k_xNF, C, scratch).view(c, h, C)
    d_k.view(x, -1, C).addcmul_(d_keys.view(x, -1, C), entry.view(x, 1, C))
    d_x.baddbmm_(scale_tokens(proj.k_xNF, entry, scratch).transpose(1, 2), d_after)

    # Small weights: everything below is (c,h,C) or (c,h,C,C).
    log_pair = (d_weights * weights_chCC).tril_(-1)
    leaving = d_entry * decay.leave_chC * tile.later_chC
    d_log = d_log + log_pair.sum(dim=-1) - log_pair.sum(dim=-2) - leaving
    d_log[..., -1] += leaving.sum(dim=-1) + d_through
    d_later = (d_weights * decay.pair_chCC).tril_(-1).sum(dim=-2) + d_entry * decay.leave_chC
    d_gamma = d_weights.diagonal(dim1=-2, dim2=-1)
    return _ScanGrads(d_qk, d_x, d_d, d_log, d_gamma, d_later, d_entry[..., -1], d_states[0].clone())


def _sum_channels(a_xNF: Tensor, b_xNF: Tensor, C: int, scratch: Scratch) -> Tensor:
    """(x, C): sum of a*b over state channels and ranks."""
    x, N, F = a_xNF.shape
    return torch.mul(a_xNF, b_xNF, out=scratch("keys", x, N, F)).view(x, -1, C).sum(dim=1)


def _unrotate(
    d_qk_2xNF: Tensor, proj: Projected, tile: TileInputs, divisor: int, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Backward of the rotation, in place: gradient of biased q and k (2,c,h,N,R,C), and of the angle (c,h,A,C)."""
    c, h, _, C = tile.cos_chAC.shape
    N = proj.q_xNF.shape[1]
    d_qk = d_qk_2xNF.view(2, c, h, N, -1, C)
    lo, hi = rotary_slices(N, divisor)
    cos, sin = tile.cos_chAC[:, :, :, None], tile.sin_chAC[:, :, :, None]
    d_a, d_b = d_qk[:, :, :, lo], d_qk[:, :, :, hi]
    d_theta = torch.zeros_like(tile.cos_chAC)
    for d_pair, rotated in ((d_qk[0], proj.q_xNF), (d_qk[1], proj.k_xNF)):
        pair = rotated.view(c, h, N, -1, C)
        turn = torch.mul(d_pair[:, :, hi], pair[:, :, lo], out=scratch("turn", *pair[:, :, lo].shape))
        turn.addcmul_(d_pair[:, :, lo], pair[:, :, hi], value=-1)
        d_theta += turn.sum(dim=3)
    d_a_sin = torch.mul(d_a, sin, out=scratch("a_sin", *d_a.shape))
    d_a.mul_(cos).addcmul_(d_b, sin)
    d_b.mul_(cos).sub_(d_a_sin)
    return d_qk, d_theta
