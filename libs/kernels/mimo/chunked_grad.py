"""The hand-derived backward of one tile of the chunked scan (forward: `chunked_tile`, derivation: README.md).

Everything is recomputed from the tile's inputs and the states at its chunk starts; nothing of size S x F is saved.
"""
# c chunks  h heads  x = c*h  C tokens of a chunk  R rank  F = R*C (rank outer, token inner)  N state  P head width

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from libs.kernels.mimo.chunked_tile import (
    Decays,
    HeadParams,
    Projected,
    TileInputs,
    inverse_rms,
    pair_weights,
    raw_outputs,
    rotary_slices,
    scores,
    weigh,
)


class FinishGrads(NamedTuple):
    """Gradients through `finish`; parameter gradients are summed over the tile's tokens."""

    d_y_chRCP: Tensor
    d_z_chCP: Tensor | None
    d_zeta_hRP: Tensor | None
    d_phi_hRP: Tensor | None
    d_norm_hP: Tensor | None


class TileGrads(NamedTuple):
    """All gradients of one tile. `d_state_hNP` is that of the state entering the tile."""

    finish: FinishGrads
    d_qk_2cgNRC: Tensor
    d_qk_bias_2hNR: Tensor
    d_v_chCP: Tensor
    d_psi_hRP: Tensor
    d_d_h: Tensor | None
    d_theta_chAC: Tensor
    d_log_decay_chC: Tensor
    d_gamma_chC: Tensor
    d_later_chC: Tensor
    d_shift_ch: Tensor
    d_state_hNP: Tensor


def tile_backward(
    d_out: Tensor, d_next_hNP: Tensor, tile: TileInputs, shift_ch: Tensor, params: HeadParams, divisor: int,
    proj: Projected, decay: Decays, h_in_chNP: Tensor, d_key_hNR: Tensor | None, key_token: int,
) -> TileGrads:  # fmt: skip
    """Backward of one tile.

    Args:
        d_out: gradient of the tile's output, (c,h,C,P), or (c,h,R,C,P) without MIMO_Out.
        d_next_hNP: gradient of the state entering the following tile.
        shift_ch: weight of each chunk's last token that enters with the next chunk.
        proj, decay, h_in_chNP: recomputed by the caller, which needs them to walk the states forward.
        d_key_hNR: gradient of the rotated key of the last chunk's token `key_token`, which is part of the final
            state; None for every tile but the last.
    """
    weights = pair_weights(tile, decay)
    raw = scores(proj)
    weighed = weigh(raw.clone(), weights, params)
    y = raw_outputs(proj, weighed, decay, h_in_chNP)
    finish = finish_backward(d_out, y, tile, params)
    core = _scan_backward(finish.d_y_chRCP, d_next_hNP, tile, shift_ch, proj, decay, weights, raw, weighed, h_in_chNP)
    if d_key_hNR is not None:
        c, h, C = tile.later_chC.shape
        core.d_qk_2xNF[1].view(c, h, *d_key_hNR.shape[1:], C)[-1, ..., key_token] += d_key_hNR
    d_qk, d_theta = _unrotate(core.d_qk_2xNF, proj, tile, divisor)
    d_bias = d_qk.sum(dim=(1, 5))
    if tile.heads_to_groups is None:
        d_group = d_qk.sum(dim=2, keepdim=True)
    else:
        d_group = torch.zeros_like(tile.qk_2cgNRC).index_add_(2, tile.heads_to_groups, d_qk)
    c, h, C, P = tile.v_chCP.shape
    d_x = core.d_x_xFP.view(c, h, -1, C, P)
    d_v = (d_x * params.psi_hR1P).sum(dim=2)
    d_psi = sum_tokens(d_x.mul_(tile.v_chCP[:, :, None]))
    return TileGrads(
        finish, d_group, d_bias, d_v, d_psi, core.d_d_h if params.d_h is not None else None, d_theta,
        core.d_log_decay_chC, core.d_gamma_chC, core.d_later_chC, core.d_shift_ch, core.d_state_hNP,
    )  # fmt: skip


def sum_tokens(u_chRCP: Tensor) -> Tensor:
    """Sum over the tile's tokens: (h,R,P)."""
    return u_chRCP.sum(dim=(0, 3))


def finish_backward(d_out: Tensor, y_chRCP: Tensor, tile: TileInputs, params: HeadParams) -> FinishGrads:
    """Backward of `chunked_tile.finish`. May overwrite y."""
    unit = inverse = None
    if params.norm_h11P is not None:
        inverse = inverse_rms(y_chRCP, params.norm_eps)
        unit = y_chRCP * inverse
        y_chRCP = unit * params.norm_h11P
    d_z = d_zeta = d_phi = d_norm = None
    spread = d_out if params.phi_hR1P is None else d_out[:, :, None]
    grad = spread if params.phi_hR1P is None else spread * params.phi_hR1P
    if tile.z_chCP is not None and params.zeta_hR1P is not None:
        z = tile.z_chCP[:, :, None]
        pre = z * params.zeta_hR1P
        sig = torch.sigmoid(pre)
        gate = pre.mul_(sig)
        # silu' = sig (1 + pre (1 - sig)) = sig + gate (1 - sig)
        d_pre = torch.addcmul(gate, gate, sig, value=-1).add_(sig).mul_(grad).mul_(y_chRCP)
        grad = grad * gate
        y_chRCP = y_chRCP.mul_(gate)
        d_z = (d_pre * params.zeta_hR1P).sum(dim=2)
        d_zeta = sum_tokens(d_pre.mul_(z))
    if params.phi_hR1P is not None:
        d_phi = sum_tokens(y_chRCP.mul_(spread))
    if params.norm_h11P is not None and unit is not None and inverse is not None:
        d_norm = (grad * unit).sum(dim=(0, 2, 3))
        d_unit = grad * params.norm_h11P
        grad = inverse * (d_unit - unit * (d_unit * unit).mean(dim=-1, keepdim=True))
    return FinishGrads(grad, d_z, d_zeta, d_phi, d_norm)


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
    weights_chCC: Tensor, raw_xFF: Tensor, weighed_xFF: Tensor, h_in_chNP: Tensor,
) -> _ScanGrads:  # fmt: skip
    """Backward of `raw_outputs` and of the state recurrence. Consumes `raw_xFF`."""
    c, h, N, P = h_in_chNP.shape
    x, _, F = proj.q_xNF.shape
    C = tile.later_chC.shape[-1]
    d_y = d_y_chRCP.reshape(x, F, P)
    d_qk = torch.empty(2, x, N, F, dtype=d_y.dtype, device=d_y.device)
    d_q, d_k = d_qk[0], d_qk[1]

    # Pairs inside the chunk: y += weighed @ x, weighed = weights * raw (+ D on the diagonal), raw = q^T k.
    d_pairs = torch.bmm(d_y, proj.x_xFP.transpose(1, 2))
    d_x = torch.bmm(weighed_xFF.transpose(1, 2), d_y)
    d_d = d_pairs.view(c, h, F, F).diagonal(dim1=-2, dim2=-1).sum(dim=(0, 2))
    d_weights = raw_xFF.mul_(d_pairs).view(c, h, F // C, C, F // C, C).sum(dim=(2, 4))
    d_raw = d_pairs
    d_raw.view(c, h, F // C, C, F // C, C).mul_(weights_chCC[:, :, None, :, None])

    # The carried state: y += carry * (q^T h).
    d_carried = (d_y.view(c, h, -1, C, P) * decay.carry_chC[:, :, None, :, None]).view(x, F, P)
    torch.bmm(h_in_chNP.reshape(x, N, P), d_carried.transpose(1, 2), out=d_q)
    d_log = _sum_channels(d_q, proj.q_xNF, C).view(c, h, C)  # = carry * d carry, without dividing by it
    d_h = torch.bmm(proj.q_xNF, d_carried).view(c, h, N, P)
    d_q.baddbmm_(proj.k_xNF, d_raw.transpose(1, 2))
    torch.bmm(proj.q_xNF, d_raw, out=d_k)

    # The recurrence between chunks, backwards: h_{c+1} = through * h_c + sum_s entry_s k_s x_s.
    d_after = torch.empty_like(d_h)
    running = d_next_hNP
    for i in range(c - 1, -1, -1):
        d_after[i] = running
        running = torch.addcmul(d_h[i], decay.through_ch[i, :, None, None], running)
    d_through = (d_after * h_in_chNP).sum(dim=(2, 3)) * decay.through_ch

    entry = decay.leave_chC * tile.later_chC
    entry[..., -1] += shift_ch
    d_after_x = d_after.view(x, N, P)
    d_keys = torch.bmm(d_after_x, proj.x_xFP.transpose(1, 2))
    d_entry = _sum_channels(d_keys, proj.k_xNF, C).view(c, h, C)
    spread = entry[:, :, None, None]  # over N and R
    d_k.view(c, h, N, -1, C).addcmul_(d_keys.view(c, h, N, -1, C), spread)
    keys = (proj.k_xNF.view(c, h, N, -1, C) * spread).view(x, N, F)
    d_x.baddbmm_(keys.transpose(1, 2), d_after_x)

    # Small weights: everything below is (c,h,C) or (c,h,C,C).
    log_pair = (d_weights * weights_chCC).tril_(-1)
    leaving = d_entry * decay.leave_chC * tile.later_chC
    d_log = d_log + log_pair.sum(dim=-1) - log_pair.sum(dim=-2) - leaving
    d_log[..., -1] += leaving.sum(dim=-1) + d_through
    d_later = (d_weights * decay.pair_chCC).tril_(-1).sum(dim=-2) + d_entry * decay.leave_chC
    d_gamma = d_weights.diagonal(dim1=-2, dim2=-1)
    return _ScanGrads(d_qk, d_x, d_d, d_log, d_gamma, d_later, d_entry[..., -1], running)


def _sum_channels(a_xNF: Tensor, b_xNF: Tensor, C: int) -> Tensor:
    """(x, C): sum of a*b over state channels and ranks."""
    x, N, F = a_xNF.shape
    return (a_xNF * b_xNF).view(x, N * (F // C), C).sum(dim=1)


def _unrotate(d_qk_2xNF: Tensor, proj: Projected, tile: TileInputs, divisor: int) -> tuple[Tensor, Tensor]:
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
        turn = d_pair[:, :, hi] * pair[:, :, lo]
        turn.addcmul_(d_pair[:, :, lo], pair[:, :, hi], value=-1)
        d_theta += turn.sum(dim=3)
    d_a_sin = d_a * sin
    d_a.mul_(cos).addcmul_(d_b, sin)
    d_b.mul_(cos).sub_(d_a_sin)
    return d_qk, d_theta
