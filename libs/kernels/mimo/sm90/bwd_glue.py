"""From the operands of a call to the weights the backward kernels read, and from what these write back to the gradients
of the operands. Only small tensors are computed on; nothing here launches a kernel (`bwd_launch` does).
"""
# B sequences  S tokens, whole chunks  H heads  G groups  R rank  N state  P head width  A rotary angles
# c chunks  C tokens of a chunk  F = C*R

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from libs.kernels.mimo.sm90.bwd_common import Shapes
from libs.kernels.mimo.sm90.spec import KernelOperands, ScanSpec, documents_before


class Packed(NamedTuple):
    """The per-token weights of a call, (B,H,c,C), and what the kernels read of them.

    Attributes:
        small: (B, H, c, rows * C), see `bwd_common`.
        leave: decay from the token to the chunk's end, 0 if its document ends before.
        carry_cC: the token belongs to the document that the chunk began with; None without documents.
        through_c: no document starts in the chunk; None without documents.
    """

    small: Tensor
    leave: Tensor
    through_BHc: Tensor
    later: Tensor
    gamma: Tensor
    carry_cC: Tensor | None
    through_c: Tensor | None


def pack_weights(op: KernelOperands, doc_S: Tensor | None, C: int) -> Packed:
    """All exponentials that belong to one token, taken once per call."""
    log, gamma, later = (u.view(*u.shape[:2], -1, C) for u in (op.log_decay, op.gamma, op.later))  # B,H,c,C
    end = log[..., -1:]
    carry, leave, through = log.exp(), (end - log).exp(), end.exp()
    rows = [log, gamma, later]
    carries = passes = None
    if doc_S is not None:
        doc_cC, before_c = doc_S.view(-1, C), documents_before(doc_S, C)[::C]
        carries, passes = doc_cC == before_c[:, None], doc_cC[:, -1] == before_c
        # `where`, not a product: across a boundary the exponential may be infinite.
        carry = torch.where(carries, carry, 0.0)
        leave = torch.where(doc_cC == doc_cC[:, -1:], leave, 0.0)
        through = torch.where(passes[:, None], through, 0.0)
    rows += [carry, leave * later, through.expand_as(log)]
    if doc_S is not None:
        rows.append(doc_S.view(-1, C).to(log.dtype).expand_as(log))
    small = torch.stack(rows, dim=3).flatten(3).contiguous()
    return Packed(small, leave, through[..., 0], later, gamma, carries, passes)


def empty(shapes: Shapes, low: torch.dtype, full: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Uninitialised tensors for a table of shapes, in its order. `low`, `full`: the dtypes of bf16 and fp32."""
    return {
        name: torch.empty(shape, dtype=low if is_low else full, device=device)
        for name, (is_low, shape) in shapes.items()
    }


def _weight_grads(spec: ScanSpec, packed: Packed, row: Tensor, late: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Gradients of log decay, gamma and later, (B,H,S).

    The running log decay s_t of a token raises what it receives and lowers what it gives. What it receives is
    sum_r <dY, Y> without skip (`row`), its own pair included; what it gives is gamma d_gamma + later d_later, the pair
    again included: the own pair cancels and no row sum of an F x F tile is needed. What leaves the chunk, the keys'
    part of the state and the entering state alike, also grows with the log decay of the last token.
    """

    def by_token(u_BHF: Tensor) -> Tensor:
        return u_BHF.view(spec.B, spec.H, spec.chunks, spec.C, spec.R).sum(dim=-1)

    later, gamma, entry = by_token(late["d_later"]), by_token(late["d_gamma"]), by_token(late["d_entry"])
    leaving = entry * packed.leave * packed.later
    log = by_token(row) - packed.gamma * gamma - packed.later * later - leaving
    at_end = leaving.sum(dim=-1) + late["d_through"].sum(dim=-1) * packed.through_BHc
    log = torch.cat([log[..., :-1], log[..., -1:] + at_end[..., None]], dim=-1)
    return tuple(u.flatten(2) for u in (log, gamma, later + entry * packed.leave))


def _anchored(spec: ScanSpec, turn_BSHA: Tensor, spin_BHcN: Tensor, packed: Packed) -> Tensor:
    """The angle gradient with its sum over every chunk set to what the states at the chunk's two ends say.

    The gradient of an angle increment is the sum of `turn` from its token on, over thousands of tokens whose parts
    from queries and keys nearly cancel: their bf16 rounding would pile up. But turning all tokens from a chunk on is
    turning the state that enters it the other way, so that sum is known at every chunk's start, from `spin`, without
    any summing. The difference goes to the chunk's first token; in exact arithmetic it is zero. The last chunk has no
    state behind it and keeps its own sum.
    """
    half, A = spec.N // 2, spec.A
    turn_BcCHA = turn_BSHA.view(spec.B, spec.chunks, spec.C, spec.H, A)
    spin = (spin_BHcN[..., half : half + A] - spin_BHcN[..., :A]).transpose(1, 2)  # B,c,H,A
    behind, own = spin[:, 1:], turn_BcCHA[:, :-1]
    if packed.carry_cC is not None and packed.through_c is not None:
        behind = behind * packed.through_c[:-1, None, None]
        own = own * packed.carry_cC[:-1, :, None, None]
    missing = behind - spin[:, :-1] - own.sum(dim=2)
    done = turn_BcCHA.clone()
    done[:, :-1, 0] += missing
    return done.flatten(1, 2)


def operand_grads(
    spec: ScanSpec, op: KernelOperands, packed: Packed, early: dict[str, Tensor], late: dict[str, Tensor]
) -> KernelOperands:
    """Gradients of the operands in their shapes; the dtypes are the kernels'."""
    B, S, H, G, R, N = spec[:6]

    def ranked(u: Tensor) -> tuple[Tensor, Tensor]:
        """Of a per-head q or k gradient: that of the operand (B,S,R,G,N) and of the bias (H,R,N)."""
        heads = u.view(B, S, R, G, H // G, N).to(op.psi.dtype)  # bf16 is summed in fp32
        return heads.sum(dim=4), heads.sum(dim=(0, 1)).reshape(R, H, N).transpose(0, 1)

    d_q, d_q_bias = ranked(early["dq"])
    d_k, d_k_bias = ranked(late["dk"])
    mix, skip = (early[name].sum(dim=(0, 2)) for name in ("mix", "skip"))
    d_norm = mix if op.phi is None else mix * op.phi
    d_phi = mix if op.norm_w is None else mix * op.norm_w[:, None]
    d_log, d_gamma, d_later = _weight_grads(spec, packed, early["row"], late)
    return KernelOperands(
        q=d_q, k=d_k, v=late["dv"], z=None if op.z is None else early["dz"], q_bias=d_q_bias, k_bias=d_k_bias,
        psi=late["d_psi"].sum(dim=(0, 2)), zeta=None if op.zeta is None else early["d_zeta"].sum(dim=(0, 2)),
        phi=None if op.phi is None else d_phi, d=None if op.d is None else skip.sum(dim=(1, 2)),
        norm_w=None if op.norm_w is None else d_norm.sum(dim=1), log_decay=d_log, gamma=d_gamma, later=d_later,
        theta=_anchored(spec, early["turn"] + late["turn"], late["spin"], packed), first=late["d_first"][:, :, 0],
    )  # fmt: skip
