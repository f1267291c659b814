# B sequences, S tokens, H heads, G groups, N state, P head width, R rank, A angles, K chunks of C tokens
"""The plain PyTorch formulation of Mamba-3 MIMO: whole-sequence einsums at one chunk size, under autograd.

For the benchmark only: it is what a competent reader writes from `MAMBA3.md` on the first day, one full
tensor after another. Not an op of the project (see `libs.kernels.mimo`): it holds all scores and states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def plain_mimo(
    q_BSRGN: Tensor,
    k_BSRGN: Tensor,
    v_BSHP: Tensor,
    adt_BHS: Tensor,
    dt_BHS: Tensor,
    trap_BHS: Tensor,
    q_bias_HRN: Tensor,
    k_bias_HRN: Tensor,
    mimo_v_HRP: Tensor,
    mimo_z_HRP: Tensor,
    mimo_out_HRP: Tensor,
    angles_BSHA: Tensor,
    d_H: Tensor,
    z_BSHP: Tensor,
    chunk_size: int,
    rotary_dim_divisor: int,
) -> Tensor:
    """Mamba-3 MIMO in chunked form, gated, without state in or out; differentiable in every argument.

    Arguments are those of `libs.kernels.mimo.mamba3_mimo` in its order. Source of the formula: `MAMBA3.md`,
    "The mixer" and "Chunked form".

    Returns:
        (B, S, H, P) in the dtype of `v_BSHP`.

    Raises:
        ValueError: S is not a multiple of `chunk_size` (the plain form has no ragged tail).
    """
    n_heads, seq_len = dt_BHS.shape[1], dt_BHS.shape[2]
    if seq_len % chunk_size:
        raise ValueError(f"plain formulation: S={seq_len} is not a multiple of chunk_size={chunk_size}")

    # float64 for the running sum only: in float32 the angle drifts over a long sequence (MAMBA3.md, step 3)
    rate_BSHA = torch.tanh(angles_BSHA) * math.pi * dt_BHS.transpose(1, 2)[..., None]
    theta_BSHA = torch.cumsum(rate_BSHA.double(), dim=1).remainder(2 * math.pi).to(v_BSHP.dtype)
    q_BSRHN = _rotate(_per_head(q_BSRGN, n_heads) + q_bias_HRN.transpose(0, 1), theta_BSHA, rotary_dim_divisor)
    k_BSRHN = _rotate(_per_head(k_BSRGN, n_heads) + k_bias_HRN.transpose(0, 1), theta_BSHA, rotary_dim_divisor)
    x_BSRHP = v_BSHP[:, :, None] * mimo_v_HRP.transpose(0, 1)

    y_BSRHP = _scan(q_BSRHN, k_BSRHN, x_BSRHP, adt_BHS, dt_BHS, trap_BHS, chunk_size)
    y_BSRHP = y_BSRHP + d_H[:, None] * x_BSRHP
    y_BSRHP = y_BSRHP * torch.nn.functional.silu(z_BSHP[:, :, None] * mimo_z_HRP.transpose(0, 1))
    return torch.einsum("bsrhp,hrp->bshp", y_BSRHP, mimo_out_HRP)


def _per_head(t_BSRGN: Tensor, n_heads: int) -> Tensor:
    return t_BSRGN.repeat_interleave(n_heads // t_BSRGN.shape[3], dim=3)


def _rotate(t_BSRHN: Tensor, theta_BSHA: Tensor, divisor: int) -> Tensor:
    cos, sin = theta_BSHA.cos()[:, :, None], theta_BSHA.sin()[:, :, None]
    if divisor == 2:
        a, b = t_BSRHN.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    assert divisor == 4, f"rotary_dim_divisor is 2 or 4, not {divisor}"
    a, keep_1, b, keep_3 = t_BSRHN.chunk(4, dim=-1)
    return torch.cat([a * cos - b * sin, keep_1, a * sin + b * cos, keep_3], dim=-1)


def _scan(
    q_BSRHN: Tensor,
    k_BSRHN: Tensor,
    x_BSRHP: Tensor,
    adt_BHS: Tensor,
    dt_BHS: Tensor,
    trap_BHS: Tensor,
    chunk: int,
) -> Tensor:
    """y[t,r] = q[t,r] . h_t for every token, all chunks at once; (B,S,R,H,P)."""
    batch, seq_len, rank, heads, _ = q_BSRHN.shape
    n_chunks = seq_len // chunk

    def chunked(t: Tensor) -> Tensor:
        return t.reshape(batch, n_chunks, chunk, rank, heads, t.shape[-1])

    lam_BHS = torch.sigmoid(trap_BHS)
    own_BHS = lam_BHS * dt_BHS
    shifted_BHS = torch.nn.functional.pad((dt_BHS * (1 - lam_BHS))[..., 1:], (0, 1))
    own_BHKC = own_BHS.reshape(batch, heads, n_chunks, chunk)
    later_BHKC = (own_BHS + shifted_BHS).reshape(batch, heads, n_chunks, chunk)
    decay_BHKC = adt_BHS.reshape(batch, heads, n_chunks, chunk).cumsum(dim=-1)
    q_BKCRHN, k_BKCRHN, x_BKCRHP = chunked(q_BSRHN), chunked(k_BSRHN), chunked(x_BSRHP)

    below = torch.ones(chunk, chunk, dtype=torch.bool, device=adt_BHS.device).tril(-1)
    gap_BHKCC = (decay_BHKC[..., :, None] - decay_BHKC[..., None, :]).masked_fill(~below, -torch.inf)
    weight_BHKCC = gap_BHKCC.exp() * later_BHKC[..., None, :] + torch.diag_embed(own_BHKC)
    scores = torch.einsum("bktrhn,bksuhn->bhktrsu", q_BKCRHN, k_BKCRHN)
    scores = scores * weight_BHKCC[:, :, :, :, None, :, None]
    y_BKCRHP = torch.einsum("bhktrsu,bksuhp->bktrhp", scores, x_BKCRHP)

    to_end_BHKC = (decay_BHKC[..., -1:] - decay_BHKC).exp() * later_BHKC
    added_BKHPN = torch.einsum("bhks,bksuhp,bksuhn->bkhpn", to_end_BHKC, x_BKCRHP, k_BKCRHN)
    state_BHPN = torch.zeros_like(added_BKHPN[:, 0])
    before = []
    for chunk_decay_BH, added_BHPN in zip(decay_BHKC[..., -1].exp().unbind(2), added_BKHPN.unbind(1), strict=True):
        before.append(state_BHPN)
        state_BHPN = chunk_decay_BH[..., None, None] * state_BHPN + added_BHPN
    from_state = torch.einsum("bktrhn,bkhpn->bktrhp", q_BKCRHN, torch.stack(before, dim=1))
    y_BKCRHP = y_BKCRHP + from_state * decay_BHKC.exp().permute(0, 2, 3, 1)[:, :, :, None, :, None]
    return y_BKCRHP.reshape(batch, seq_len, rank, heads, x_BSRHP.shape[-1])
