"""The scan state handed from one slice of a sequence to the next: what a slice does to a state, and the folding.

The state entering a slice enters everything linearly, up to a rotation by its angle. So what a slice of tokens does is
described by O(state) numbers, found without knowing what came before. Not for communication (libs.parallel.context).
"""
# B sequences  S tokens  H heads  G groups  R rank  N state  P head width  A rotary angles

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from libs.kernels.mimo.chunked_tile import rotary_slices
from libs.kernels.mimo.shapes import TWO_PI, Dims, MimoInputs, MimoState, accumulation_dtype

# Tokens whose rotated keys and spread values exist at one time; backward recomputes them block by block.
BLOCK_TOKENS = 256


class SliceSummary(NamedTuple):
    """What some consecutive tokens of one document do to the state that enters them. All in the accumulation dtype.

    Attributes:
        turn_BHA: sum of the rotations, mod 2 pi.
        log_decay_BH: sum of A*dt: the entering state leaves multiplied by its exponential.
        first_BH: dt_0 (1 - lambda_0): weight of the token before the first one (the shifted term).
        ssm_BHNP: state after the last token when the scan starts from zero at angle 0.
        k_BHNR: last key, biased, rotated as if the slice had started at angle 0.
        x_BHP: last value.
    """

    turn_BHA: Tensor
    log_decay_BH: Tensor
    first_BH: Tensor
    ssm_BHNP: Tensor
    k_BHNR: Tensor
    x_BHP: Tensor

    @staticmethod
    def shapes(dims: Dims) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parts in order; none depends on the number of tokens."""
        B, _, H, _, R, N, P, A = dims
        return (B, H, A), (B, H), (B, H), (B, H, N, P), (B, H, N, R), (B, H, P)


def summary_numel(dims: Dims) -> int:
    """Numbers in one summary: B H (A + 2 + N P + N R + P)."""
    B, _, H, _, R, N, P, A = dims
    return B * H * (A + 2 + N * P + N * R + P)


def rotate_rows(u_BHNx: Tensor, angle_BHA: Tensor, divisor: int) -> Tensor:
    """Turn the state axis N of `u` by `angle`: the rotation of the keys, applied to all columns."""
    lo, hi = rotary_slices(u_BHNx.shape[2], divisor)
    cos, sin = angle_BHA.cos()[..., None], angle_BHA.sin()[..., None]
    a, b = u_BHNx[:, :, lo], u_BHNx[:, :, hi]
    turned_lo, turned_hi = a * cos - b * sin, a * sin + b * cos
    if divisor == 2:
        return torch.cat([turned_lo, turned_hi], dim=2)
    keep1, keep3 = u_BHNx[:, :, lo.stop : hi.start], u_BHNx[:, :, hi.stop :]
    return torch.cat([turned_lo, keep1, turned_hi, keep3], dim=2)


def summarize(inputs: MimoInputs, dims: Dims, divisor: int) -> SliceSummary:
    """Summary of tokens of one document, differentiable in every operand that the state depends on.

    One product K^T X per block of tokens, each token weighted by its decay to the end of the slice: a quarter of the
    scan's arithmetic, and no walk from chunk to chunk.
    """
    acc = accumulation_dtype(inputs.v.dtype)
    adt_BHS, dt_BHS = inputs.adt.to(acc), inputs.dt.to(acc)
    lam_BHS = torch.sigmoid(inputs.trap.to(acc))
    lead_BHS = dt_BHS * (1 - lam_BHS)
    # The last token's shifted term belongs to whoever follows.
    weight_BHS = lam_BHS * dt_BHS + F.pad(lead_BHS[..., 1:], (0, 1))
    total_BHS = adt_BHS.double().cumsum(dim=-1)
    end_BH1 = total_BHS[..., -1:]
    reach_BHS = (end_BH1 - total_BHS).exp().to(acc) * weight_BHS
    angle_BHA = adt_BHS.new_zeros(dims.B, dims.H, dims.A)
    ssm_BHNP = adt_BHS.new_zeros(dims.B, dims.H, dims.N, dims.P)
    along_tokens = ((inputs.k, 1), (inputs.v, 1), (inputs.angles, 1), (dt_BHS, 2), (reach_BHS, 2))
    for block in zip(*(torch.split(tensor, BLOCK_TOKENS, dim) for tensor, dim in along_tokens), strict=True):
        arguments = (*block, angle_BHA, inputs.k_bias, inputs.mimo_v, divisor)
        if torch.is_grad_enabled():
            added, angle_BHA, k_BHNR = checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            added, angle_BHA, k_BHNR = _block(*arguments)
        ssm_BHNP = ssm_BHNP + added
    return SliceSummary(angle_BHA, end_BH1[..., 0].to(acc), lead_BHS[..., 0], ssm_BHNP, k_BHNR, inputs.v[:, -1].to(acc))


def _block(
    k_BSRGN: Tensor, v_BSHP: Tensor, angles_BSHA: Tensor, dt_BHS: Tensor, reach_BHS: Tensor, start_BHA: Tensor,
    k_bias_HRN: Tensor, psi_HRP: Tensor, divisor: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One block of tokens: what it adds to the final state (B,H,N,P), its last angle (B,H,A) and key (B,H,N,R)."""
    acc = dt_BHS.dtype
    B, S, R, G, N = k_BSRGN.shape
    H, P = v_BSHP.shape[2:]
    turn_BHAS = torch.tanh(angles_BSHA.to(acc)).permute(0, 2, 3, 1) * (dt_BHS * torch.pi)[:, :, None]
    theta_BHAS = (start_BHA[..., None].double() + turn_BHAS.double().cumsum(dim=-1)).remainder(TWO_PI).to(acc)
    k_BHNRS = k_BSRGN.to(acc).permute(0, 3, 4, 2, 1).repeat_interleave(H // G, dim=1)
    k_BHNRS = k_BHNRS + k_bias_HRN.to(acc).transpose(1, 2)[..., None]
    lo, hi = rotary_slices(N, divisor)
    cos, sin = theta_BHAS.cos()[:, :, :, None], theta_BHAS.sin()[:, :, :, None]
    a, b = k_BHNRS[:, :, lo], k_BHNRS[:, :, hi]
    parts = [a * cos - b * sin, a * sin + b * cos]
    if divisor == 4:
        parts = [parts[0], k_BHNRS[:, :, lo.stop : hi.start], parts[1], k_BHNRS[:, :, hi.stop :]]
    k_BHNRS = torch.cat(parts, dim=2)
    v_BHSP = v_BSHP.to(acc).transpose(1, 2) * reach_BHS[..., None]
    x_BHRSP = v_BHSP[:, :, None] * psi_HRP.to(acc)[:, :, None]
    added = torch.bmm(k_BHNRS.reshape(B * H, N, R * S), x_BHRSP.reshape(B * H, R * S, P)).view(B, H, N, P)
    return added, theta_BHAS[..., -1], k_BHNRS[..., -1]


def advance(entering: MimoState, summary: SliceSummary, psi_HRP: Tensor, divisor: int) -> MimoState:
    """The state after a slice, from the one before it: scanning the slice's tokens gives the same."""
    psi = psi_HRP.to(summary.ssm_BHNP.dtype)
    before_BHNR, values_BHRP = entering.k.permute(0, 2, 3, 1), entering.x[:, :, None] * psi
    first_BHNP = entering.ssm.transpose(2, 3) + summary.first_BH[..., None, None] * (before_BHNR @ values_BHRP)
    decay = summary.log_decay_BH.exp()[..., None, None]
    ssm_BHNP = decay * first_BHNP + rotate_rows(summary.ssm_BHNP, entering.angle, divisor)
    k_BHNR = rotate_rows(summary.k_BHNR, entering.angle, divisor)
    angle_BHA = (entering.angle + summary.turn_BHA).remainder(TWO_PI)
    return MimoState(angle_BHA, ssm_BHNP.transpose(2, 3), k_BHNR.permute(0, 3, 1, 2), summary.x_BHP)


def fold(
    zero: MimoState, summaries: Sequence[SliceSummary], passes: Sequence[bool], psi_HRP: Tensor, divisor: int
) -> MimoState:
    """The state after several slices. passes[i]: no document starts in slice i, so what enters it also leaves it."""
    state = zero
    for summary, through in zip(summaries, passes, strict=True):
        state = advance(state if through else zero, summary, psi_HRP, divisor)
    return state
