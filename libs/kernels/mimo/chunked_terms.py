"""Per-token weights, document masks and wrapped angles of the chunked scan: everything that is small.

All of it is ordinary differentiable torch on (B, H, S)-sized tensors, except the wrapped cumulative sum of the
angles, which has its own backward. The large tensors are the business of `chunked_tile`.
"""
# B sequences  H heads  c chunks  C tokens of a chunk  A rotary angles  N state  P head width  R rank

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnF

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


def document_ids(bounds: list[int] | Tensor, tokens: int, device: torch.device) -> Tensor:
    """(tokens,) number of the document [bounds[i], bounds[i+1]) that each token is in; padding is in the last one."""
    edges = torch.as_tensor(bounds, device=device)
    return torch.bucketize(torch.arange(tokens, device=device), edges[1:-1], right=True)


def document_masks(bounds: list[int] | Tensor, chunks: int, C: int, device: torch.device) -> DocumentMasks:
    """Masks for packed documents; see `document_ids`."""
    doc_cC = document_ids(bounds, chunks * C, device).view(chunks, C)
    first_c = torch.cat([doc_cC[:1, 0], doc_cC[:-1, -1]])  # document in force just before the chunk
    lower = torch.ones(C, C, dtype=torch.bool, device=device).tril()
    return DocumentMasks(
        pair_cCC=(doc_cC[:, :, None] == doc_cC[:, None, :]) & lower,
        carry_cC=doc_cC == first_c[:, None],
        leave_cC=doc_cC == doc_cC[:, -1:],
        through_c=doc_cC[:, -1] == first_c,
    )


def _running_sum(u_BcxC: Tensor, pair_cCC: Tensor | None) -> Tensor:
    """Sum up to each token inside its chunk and document. With documents it is a product with a 0/1 matrix: the
    difference of two running sums would let the last bits of one document leak into the next."""
    if pair_cCC is None:
        return u_BcxC.cumsum(dim=-1)
    return u_BcxC @ pair_cCC.transpose(1, 2).to(u_BcxC.dtype)


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
    dt, adt = nnF.pad(dt_BHS, pad), nnF.pad(adt_BHS, pad)
    lam = torch.sigmoid(nnF.pad(trap_BHS, pad))
    gamma = lam * dt
    lead = dt * (1 - lam)  # what token t adds to its predecessor's key, before decay
    shifted = nnF.pad(lead[..., 1:], (0, 1))

    def by_chunk(u_BHS: Tensor) -> Tensor:
        return u_BHS.view(B, H, chunks, C).transpose(1, 2)

    gamma_c, shifted_c = by_chunk(gamma), by_chunk(shifted)
    later = gamma_c + nnF.pad(shifted_c[..., :-1], (0, 1))
    return Weights(
        log_decay=_running_sum(by_chunk(adt), None if masks is None else masks.pair_cCC),
        gamma=gamma_c,
        later=later,
        shift_BcH=shifted_c[..., -1],
        first_BH=lead[..., 0],
    )


# Angles between chunks are counted in whole steps of a turn, so that their sums are exact: in any order, and however a
# sequence is cut on the chunk grid. A step is wide enough for the decode state's dtype to tell it from the next.
_STEPS_PER_TURN = {torch.float32: 2**23, torch.float64: 2**50}


def _steps(angle: Tensor, per_turn: int) -> Tensor:
    turns = torch.remainder(angle.double() / TWO_PI, 1.0)
    return torch.round(turns * per_turn).to(torch.int64)


def _last_restart(through_c: Tensor) -> Tensor:
    """(c,) the last chunk up to each one in which a document starts, or -1."""
    place = torch.arange(len(through_c), device=through_c.device)
    return torch.where(through_c, -1, place).cummax(dim=0).values


def _sum_onward(u_Bc: Tensor, through_c: Tensor | None) -> Tensor:
    """Sum from each chunk to the end, or to the first chunk through which nothing passes; in log2(c) steps, and
    adding nothing that is not part of the sum."""
    passes = torch.ones(u_Bc.shape[1], dtype=torch.bool, device=u_Bc.device) if through_c is None else through_c
    total, shift = u_Bc, 1
    while shift < u_Bc.shape[1]:
        moved = torch.where(passes[:-shift, None, None], total[:, shift:], 0.0)
        total = torch.cat([total[:, :-shift] + moved, total[:, -shift:]], dim=1)
        passes = torch.cat([passes[:-shift] & passes[shift:], passes[-shift:]])
        shift *= 2
    return total


class _WrappedCumsum(torch.autograd.Function):
    """Cumulative sum modulo 2 pi along the sequence, restarting at documents.

    The sum inside a chunk is taken in fp64, between chunks in whole steps of a turn. No loop over chunks.
    """

    @staticmethod
    def forward(
        ctx: Any, turn_BcHAC: Tensor, start_BHA: Tensor, pair_cCC: Tensor | None, carry_cC: Tensor | None,
        leave_cC: Tensor | None, through_c: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(pair_cCC, carry_cC, leave_cC, through_c)
        dtype = turn_BcHAC.dtype
        inside = _running_sum(turn_BcHAC.flatten(2, 3).double(), pair_cCC).view(turn_BcHAC.shape)
        per_turn = _STEPS_PER_TURN[dtype]
        start = _steps(start_BHA, per_turn)[:, None]
        steps = _steps(inside[..., -1], per_turn)
        total = steps.cumsum(dim=1) + start
        if through_c is not None:
            # A document that starts in a chunk takes back everything before: an exact difference of integers.
            restart = _last_restart(through_c)
            taken = (total - steps)[:, restart.clamp_min(0)]
            total = total - torch.where(restart[:, None, None] < 0, 0, taken)
        after = (torch.bitwise_and(total, per_turn - 1).double() * (TWO_PI / per_turn)).to(dtype)
        before = torch.cat([start_BHA[:, None].to(dtype), after[:, :-1]], dim=1)
        carried = before[..., None].double()
        if carry_cC is not None:
            carried = carried * carry_cC[None, :, None, None, :]
        theta = (inside + carried).remainder(TWO_PI).to(dtype)
        # The last token's angle is the state: bit-equal by construction, not by a second rounding.
        theta = torch.cat([theta[..., :-1], after[..., None]], dim=-1)
        return theta, after[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        d_theta_BcHAC, d_end_BHA = grads
        pair_cCC, carry_cC, leave_cC, through_c = ctx.saved_tensors
        # Inside a chunk: the sum from each token to the end of the chunk or of its document.
        if pair_cCC is None:
            upto = d_theta_BcHAC.cumsum(dim=-1)
            total = upto[..., -1:]
            d_turn = d_theta_BcHAC - upto + total
            carried_BcHA = total[..., 0]
        else:
            d_turn = (d_theta_BcHAC.flatten(2, 3) @ pair_cCC.to(d_theta_BcHAC.dtype)).view(d_theta_BcHAC.shape)
            carried_BcHA = (d_theta_BcHAC * carry_cC[None, :, None, None, :]).sum(dim=-1)
        # Between chunks; in fp64, since a sequence has thousands of them.
        arriving = torch.cat([carried_BcHA.double(), d_end_BHA[:, None].double()], dim=1)
        passes = None if through_c is None else nnF.pad(through_c, (0, 1))
        onward = _sum_onward(arriving, passes)[:, 1:, ..., None].to(d_turn.dtype)
        d_turn = d_turn + (onward if leave_cC is None else onward * leave_cC[None, :, None, None, :])
        return d_turn, d_turn[:, 0, :, :, 0].clone(), None, None, None, None


def wrapped_angles(
    angles_BSHA: Tensor, dt_BHS: Tensor, start_BHA: Tensor, chunks: int, C: int, masks: DocumentMasks | None
) -> tuple[Tensor, Tensor]:
    """theta_t = theta_{t-1} + tanh(angle_t) pi dt_t, mod 2 pi. Returns theta (B,c,H,A,C) and its last value (B,H,A)."""
    B, S, H, A = angles_BSHA.shape
    turn_BHAS = torch.tanh(angles_BSHA).permute(0, 2, 3, 1) * (dt_BHS * torch.pi)[:, :, None]
    turn_BHAS = nnF.pad(turn_BHAS, (0, chunks * C - S))
    turn_BcHAC = turn_BHAS.view(B, H, A, chunks, C).permute(0, 3, 1, 2, 4)
    theta, end = _WrappedCumsum.apply(  # type: ignore[no-untyped-call]
        turn_BcHAC, start_BHA, *([None] * 4 if masks is None else masks)
    )
    return theta, end
