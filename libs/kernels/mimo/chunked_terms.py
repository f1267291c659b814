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
        next_S: the next token belongs to the same document.
        before_cC: index inside the chunk of the token before the document's start, -1 when it started earlier.
        end_S: position where the token's document ends (exclusive).
    """

    pair_cCC: Tensor
    carry_cC: Tensor
    leave_cC: Tensor
    through_c: Tensor
    next_S: Tensor
    before_cC: Tensor
    end_S: Tensor


def document_masks(bounds: list[int], chunks: int, C: int, device: torch.device) -> DocumentMasks:
    """Masks for documents [bounds[i], bounds[i+1]); the padding behind the last token belongs to the last one."""
    edges = torch.tensor(bounds, device=device)
    position = torch.arange(chunks * C, device=device)
    document = torch.bucketize(position, edges[1:-1], right=True)
    doc_cC = document.view(chunks, C)
    first_c = torch.cat([doc_cC[:1, 0], doc_cC[:-1, -1]])  # document in force just before the chunk
    lower = torch.ones(C, C, dtype=torch.bool, device=device).tril()
    start_cC = edges[document].view(chunks, C) - torch.arange(chunks, device=device)[:, None] * C
    end_S = edges[document + 1].clone()
    end_S[document == len(bounds) - 2] = chunks * C
    return DocumentMasks(
        pair_cCC=(doc_cC[:, :, None] == doc_cC[:, None, :]) & lower,
        carry_cC=doc_cC == first_c[:, None],
        leave_cC=doc_cC == doc_cC[:, -1:],
        through_c=doc_cC[:, -1] == first_c,
        next_S=F.pad(document[1:] == document[:-1], (0, 1)),
        before_cC=(start_cC - 1).clamp(min=-1),
        end_S=end_S,
    )


class Weights(NamedTuple):
    """Decay and trapezoid weights, all (B, c, H, C) unless the name says otherwise.

    Attributes:
        log_decay: running sum of A*dt inside the chunk, up to and with the token.
        gamma: weight of a token on its own output.
        later: weight on all later outputs, gamma plus the shifted term of the next token. The shifted term of a
            chunk's last token is left out: it enters when the next chunk starts, exactly as after a restored state.
        shift_BcH: that left-out shifted term; 0 at the end of a document.
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
    if masks is not None:
        shifted = shifted * masks.next_S

    def by_chunk(u_BHS: Tensor) -> Tensor:
        return u_BHS.view(B, H, chunks, C).transpose(1, 2)

    gamma_c, shifted_c = by_chunk(gamma), by_chunk(shifted)
    later = gamma_c + F.pad(shifted_c[..., :-1], (0, 1))
    return Weights(
        log_decay=by_chunk(adt).cumsum(dim=-1),
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
        inside = turn_BcHAC.double().cumsum(dim=-1)
        if masks is not None:
            index = masks.before_cC[None, :, None, None, :].expand(inside.shape)
            inside = inside - inside.gather(-1, index.clamp(min=0)).masked_fill_(index < 0, 0.0)
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
        B, chunks, H, A, C = d_theta_BcHAC.shape
        flat = d_theta_BcHAC.permute(0, 2, 3, 1, 4).reshape(B, H, A, chunks * C).double()
        flat[..., -1] += d_end_BHA
        after = F.pad(flat.flip(-1).cumsum(dim=-1).flip(-1), (0, 1))
        d_start = after[..., 0]
        d_turn = after[..., :-1]
        if ctx.masks is not None:
            d_turn = d_turn - after[..., ctx.masks.end_S]
            d_start = after[..., 0] - after[..., ctx.masks.end_S[0]]
        d_turn = d_turn.view(B, H, A, chunks, C).permute(0, 3, 1, 2, 4)
        return d_turn.to(d_theta_BcHAC.dtype), d_start.to(d_theta_BcHAC.dtype), None


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
