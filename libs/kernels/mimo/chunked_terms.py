"""Per-token weights, document masks and wrapped angles of the chunked scan: everything that is small.

All of it is ordinary differentiable torch on (B, H, S)-sized tensors, except the wrapped cumulative sum of the
angles, which has its own backward. The large tensors are the business of `chunked_tile`.
"""
# B sequences  H heads  c chunks  C tokens of a chunk  A rotary angles  N state  P head width  R rank

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from libs.kernels.mimo.shapes import TWO_PI


class DocumentMasks(NamedTuple):
    """Where packed documents meet inside and between chunks. Positions count from the start of the row.

    Attributes:
        pair_cCC: same document and not in the future: token t may look at token s.
        carry_cC: the token still belongs to the document that the chunk began with.
        leave_cC: the token belongs to the document that the chunk ends with.
        through_c: no document starts in this chunk: the state passes through.
    """

    pair_cCC: Tensor
    carry_cC: Tensor
    leave_cC: Tensor
    through_c: Tensor


def document_masks(bounds: list[int], chunks: int, C: int, device: torch.device) -> DocumentMasks:
    """Masks for documents [bounds[i], bounds[i+1]); the padding behind the last token belongs to the last one."""
    edges = torch.tensor(bounds, device=device)
    position = torch.arange(chunks * C, device=device)
    document = torch.bucketize(position, edges[1:-1], right=True)
    doc_cC = document.view(chunks, C)
    first_c = torch.cat([doc_cC[:1, 0], doc_cC[:-1, -1]])  # document in force just before the chunk
    lower = torch.ones(C, C, dtype=torch.bool, device=device).tril()
    return DocumentMasks(
        pair_cCC=(doc_cC[:, :, None] == doc_cC[:, None, :]) & lower,
        carry_cC=doc_cC == first_c[:, None],
        leave_cC=doc_cC == doc_cC[:, -1:],
        through_c=doc_cC[:, -1] == first_c,
    )


def _running_sum(u_BcxC: Tensor, masks: DocumentMasks | None) -> Tensor:
    """Sum up to each token inside its chunk and document. With documents it is a product with a 0/1 matrix: the
    difference of two running sums would let the last bits of one document leak into the next."""
    if masks is None:
        return u_BcxC.cumsum(dim=-1)
    return u_BcxC @ masks.pair_cCC.transpose(1, 2).to(u_BcxC.dtype)


class Weights(NamedTuple):
    """Decay and trapezoid weights, all (B, c, H, C) unless the name says otherwise.

    Attributes:
        log_decay: running sum of A*dt inside the chunk, up to and with the token.
        gamma: weight of a token on its own output.
        later: weight on all later outputs, gamma plus the shifted term of the next token. The shifted term of a
            chunk's last token is left out: it enters when the next chunk starts, exactly as after a restored state.
        shift_BcH: that left-out shifted term. Where a document ends it needs no mask: nobody after it looks back.
        first_BH: dt_0 (1 - lambda_0): weight of the token before the first one, for an initial state.
    """

    log_decay: Tensor
    gamma: Tensor
    later: Tensor
    shift_BcH: Tensor
    first_BH: Tensor


def scan_weights(
    adt_BHS: Tensor, dt_BHS: Tensor, trap_BHS: Tensor, chunks: int, C: int, masks: DocumentMasks | None
) -> Weights:
    """Weights of the chunked form (MAMBA-3 trapezoid): key t acts on its own output with gamma_t = lambda_t dt_t
    and on later ones with gamma_t + dt_{t+1} (1 - lambda_{t+1}). Padding has dt = 0 and so no weight."""
    B, H, S = dt_BHS.shape
    pad = (0, chunks * C - S)
    dt, adt = F.pad(dt_BHS, pad), F.pad(adt_BHS, pad)
    lam = torch.sigmoid(F.pad(trap_BHS, pad))
    gamma = lam * dt
    lead = dt * (1 - lam)  # what token t adds to its predecessor's key, before decay
    shifted = F.pad(lead[..., 1:], (0, 1))

    def by_chunk(u_BHS: Tensor) -> Tensor:
        return u_BHS.view(B, H, chunks, C).transpose(1, 2)

    gamma_c, shifted_c = by_chunk(gamma), by_chunk(shifted)
    later = gamma_c + F.pad(shifted_c[..., :-1], (0, 1))
    return Weights(
        log_decay=_running_sum(by_chunk(adt), masks),
        gamma=gamma_c,
        later=later,
        shift_BcH=shifted_c[..., -1],
        first_BH=lead[..., 0],
    )


class _WrappedCumsum(torch.autograd.Function):
    """Cumulative sum modulo 2 pi along the sequence, restarting at documents.

    The sum inside a chunk is taken in fp64; the offset between chunks is kept mod 2 pi in the dtype of the decode
    state, so that a scan continued from a saved state on the chunk grid gives the same bits.
    """

    @staticmethod
    def forward(ctx: Any, turn_BcHAC: Tensor, start_BHA: Tensor, masks: DocumentMasks | None) -> tuple[Tensor, Tensor]:
        chunks, C = turn_BcHAC.shape[1], turn_BcHAC.shape[-1]
        ctx.masks = masks
        inside = _running_sum(turn_BcHAC.flatten(2, 3).double(), masks).view(turn_BcHAC.shape)
        offsets = torch.empty(chunks + 1, *start_BHA.shape, device=inside.device, dtype=turn_BcHAC.dtype)
        offsets[0] = start_BHA
        ends_cBHA = inside[..., -1].transpose(0, 1).contiguous()
        through = [True] * chunks if masks is None else masks.through_c.tolist()
        for c in range(chunks):
            total = offsets[c] + ends_cBHA[c] if through[c] else ends_cBHA[c]
            offsets[c + 1].copy_(total.remainder_(TWO_PI) if through[c] else total.remainder(TWO_PI))
        carried = offsets[:-1].transpose(0, 1)[..., None].double()
        if masks is not None:
            carried = carried * masks.carry_cC[None, :, None, None, :]
        theta = inside.add_(carried).remainder_(TWO_PI).to(turn_BcHAC.dtype)
        # The last token's angle is the state: bit-equal by construction, not by a second rounding.
        theta[..., C - 1] = offsets[1:].transpose(0, 1)
        return theta, offsets[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        d_theta_BcHAC, d_end_BHA = grads
        masks: DocumentMasks | None = ctx.masks
        chunks = d_theta_BcHAC.shape[1]
        # Inside a chunk: the sum from each token to the end of the chunk or of its document.
        if masks is None:
            upto = d_theta_BcHAC.cumsum(dim=-1)
            total = upto[..., -1:].clone()
            d_turn = upto.neg_().add_(d_theta_BcHAC).add_(total)
            carried_cBHA = total[..., 0].transpose(0, 1)
        else:
            d_turn = (d_theta_BcHAC.flatten(2, 3) @ masks.pair_cCC.to(d_theta_BcHAC.dtype)).view(d_theta_BcHAC.shape)
            carried_cBHA = (d_theta_BcHAC * masks.carry_cC[None, :, None, None, :]).sum(dim=-1).transpose(0, 1)
        # Between chunks, from the last to the first; summed in fp64, since a sequence has thousands of them.
        later_cBHA = torch.empty(chunks, *d_end_BHA.shape, dtype=torch.float64, device=d_turn.device)
        later_cBHA[-1] = d_end_BHA
        through = [True] * chunks if masks is None else masks.through_c.tolist()
        for c in range(chunks - 1, 0, -1):
            later = carried_cBHA[c] + later_cBHA[c] if through[c] else carried_cBHA[c]
            later_cBHA[c - 1].copy_(later)
        onward = later_cBHA.transpose(0, 1)[..., None].to(d_turn.dtype)
        d_turn.add_(onward if masks is None else onward * masks.leave_cC[None, :, None, None, :])
        return d_turn, d_turn[:, 0, :, :, 0].clone(), None


def wrapped_angles(
    angles_BSHA: Tensor, dt_BHS: Tensor, start_BHA: Tensor, chunks: int, C: int, masks: DocumentMasks | None
) -> tuple[Tensor, Tensor]:
    """theta_t = theta_{t-1} + tanh(angle_t) pi dt_t, mod 2 pi. Returns theta (B,c,H,A,C) and its last value (B,H,A)."""
    B, S, H, A = angles_BSHA.shape
    turn_BHAS = torch.tanh(angles_BSHA).permute(0, 2, 3, 1) * (dt_BHS * torch.pi)[:, :, None]
    turn_BHAS = F.pad(turn_BHAS, (0, chunks * C - S))
    turn_BcHAC = turn_BHAS.view(B, H, A, chunks, C).permute(0, 3, 1, 2, 4)
    theta, end = _WrappedCumsum.apply(turn_BcHAC, start_BHA, masks)  # type: ignore[no-untyped-call]
    return theta, end
