"""From the operands of the chunked scan to the tensors of the backward kernels, and from what these write back to the
gradients of the operands. Only small tensors are computed on; nothing here launches a kernel (`bwd_launch` does).
"""
# B sequences  S tokens, padded to whole chunks  H heads  G groups  R rank  N state  P head width  A rotary angles
# c chunks  C tokens of a chunk  F = C*R

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnF

from libs.kernels.mimo.chunked_layout import Layout, Operands
from libs.kernels.mimo.chunked_terms import DocumentMasks
from libs.kernels.mimo.chunked_tile import rotary_slices
from libs.kernels.mimo.sm90.bwd_common import BwdSpec, Shapes


class Packed(NamedTuple):
    """The per-token weights of a call, (B,H,c,C), and what the kernels read of them."""

    small: Tensor  # (B, H, c, rows * C), see `bwd_common`
    leave: Tensor
    through_BHc: Tensor
    later: Tensor
    gamma: Tensor
    masks: DocumentMasks | None


class KernelInputs(NamedTuple):
    """Operands in the layouts of the kernels: rows (B, S*R, ...), tokens padded to whole chunks, stand-ins of one
    element for options that are off."""

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    x: Tensor
    cos: Tensor
    sin: Tensor
    q_bias: Tensor
    k_bias: Tensor
    psi: Tensor
    zeta: Tensor
    phi: Tensor
    d: Tensor
    norm_w: Tensor
    small: Tensor


def spec_of(layout: Layout, op: Operands, masks: DocumentMasks | None, *, cached_x: bool = False) -> BwdSpec:
    """The compiled shape that a call needs, with one split; `_replace` the rest."""
    B, _, H, G, R, N, P, _ = layout.dims
    return BwdSpec(
        B, layout.chunks * layout.C, H, G, R, N, P, layout.C, layout.divisor, has_z=op.z is not None,
        has_out=op.mimo_out is not None, has_d=op.d is not None, has_norm=op.norm_weight is not None,
        packed=masks is not None, cached_x=cached_x, norm_eps=layout.norm_eps,
    )  # fmt: skip


def pack_weights(op: Operands, masks: DocumentMasks | None) -> Packed:
    """All exponentials that belong to one token, taken once per call."""
    log, gamma, later = (u.transpose(1, 2) for u in (op.log_decay, op.gamma, op.later))  # B,H,c,C
    end = log[..., -1:]
    carry, leave, through = log.exp(), (end - log).exp(), end.exp()
    if masks is not None:
        carry, leave = carry * masks.carry_cC, leave * masks.leave_cC
        through = through * masks.through_c[:, None]
    entry = leave * later
    entry = torch.cat([entry[..., :-1], entry[..., -1:] + op.shift.transpose(1, 2)[..., None]], dim=-1)
    rows = [log, gamma, later, carry, entry, through.expand_as(log)]
    if masks is not None:  # inside a chunk: the first token that the token may look at names its document
        rows.append(masks.pair_cCC.to(log.dtype).argmax(dim=-1).to(log.dtype).expand_as(log))
    small = torch.stack(rows, dim=3).flatten(3)
    return Packed(small, leave, through[..., 0], later, gamma, masks)


def pad_tokens(u: Tensor, tokens: int) -> Tensor:
    """(B, S, ...) with zeros up to `tokens`."""
    missing = tokens - u.shape[1]
    return u if missing == 0 else nnF.pad(u, [0, 0] * (u.dim() - 2) + [0, missing])


def kernel_inputs(
    spec: BwdSpec, op: Operands, packed: Packed, low: torch.dtype, full: torch.dtype, x_BSRHP: Tensor | None = None
) -> KernelInputs:
    """Everything the two kernels read but the state and the gradients. `low`, `full`: the dtypes of bf16 and fp32."""

    def tokens(u: Tensor) -> Tensor:
        return pad_tokens(u, spec.S).to(low).contiguous()

    def whole(u: Tensor | None, axes: int) -> Tensor:
        return torch.zeros([1] * axes, dtype=full) if u is None else u.to(full).contiguous()

    theta = op.theta.permute(0, 1, 4, 2, 3).flatten(1, 2)  # B,(c C),H,A
    stand_in = op.theta.new_zeros(1, 1, 1, 1).to(low)
    return KernelInputs(
        q=tokens(op.q).flatten(1, 2), k=tokens(op.k).flatten(1, 2), v=tokens(op.v),
        z=stand_in if op.z is None else tokens(op.z),
        x=stand_in if x_BSRHP is None else tokens(x_BSRHP).permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous(),
        cos=theta.cos().to(full).contiguous(), sin=theta.sin().to(full).contiguous(),
        q_bias=whole(op.q_bias, 3), k_bias=whole(op.k_bias, 3), psi=whole(op.mimo_v, 3), zeta=whole(op.mimo_z, 3),
        phi=whole(op.mimo_out, 3), d=whole(op.d, 1), norm_w=whole(op.norm_weight, 2),
        small=packed.small.to(full).contiguous(),
    )  # fmt: skip


def empty(shapes: Shapes, low: torch.dtype, full: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Uninitialised tensors for a table of shapes, in its order."""
    return {
        name: torch.empty(shape, dtype=low if is_low else full, device=device)
        for name, (is_low, shape) in shapes.items()
    }


def _weight_grads(
    spec: BwdSpec, packed: Packed, row: Tensor, late: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log decay, gamma, later (B,c,H,C) and shift (B,c,H).

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
    grads = log, gamma, later + entry * packed.leave
    return (*(u.transpose(1, 2) for u in grads), entry[..., -1].transpose(1, 2))  # type: ignore[return-value]


def _anchored(spec: BwdSpec, turn_BcHAC: Tensor, spin_BHcN: Tensor, masks: DocumentMasks | None) -> Tensor:
    """The angle gradient with its sum over every chunk set to what the states at the chunk's two ends say.

    The gradient of an angle increment is the sum of `turn` from its token on, over thousands of tokens whose parts
    from queries and keys nearly cancel: their bf16 rounding would pile up. But turning all tokens from a chunk on is
    turning the state that enters it the other way, so that sum is known at every chunk's start, from `spin`, without
    any summing. The difference goes to the chunk's first token; in exact arithmetic it is zero. The last chunk has no
    state behind it and keeps its own sum.
    """
    half, A = spec.N // 2, spec.A
    spin = (spin_BHcN[..., half : half + A] - spin_BHcN[..., :A]).transpose(1, 2)  # B,c,H,A
    behind = spin[:, 1:] if masks is None else spin[:, 1:] * masks.through_c[:-1, None, None]
    own = turn_BcHAC[:, :-1]
    own_sum = (own if masks is None else own * masks.carry_cC[:-1, None, None]).sum(dim=-1)
    first = own[..., :1] + (behind - spin[:, :-1] - own_sum)[..., None]
    return torch.cat([torch.cat([first, own[..., 1:]], dim=-1), turn_BcHAC[:, -1:]], dim=1)


def operand_grads(
    spec: BwdSpec, op: Operands, packed: Packed, early: dict[str, Tensor], late: dict[str, Tensor]
) -> Operands:
    """Gradients of the scan's operands, in the kernels' dtypes and the operands' shapes."""
    B, _, H, G, R, N, _, C = spec[:8]
    S = op.v.shape[1]

    def ranked(u: Tensor) -> tuple[Tensor, Tensor]:
        """Of a per-head q or k gradient: that of the operand (B,S,R,G,N) and of the bias (H,R,N)."""
        heads = u.view(B, spec.S, R, G, H // G, N).to(_sum_dtype(u))
        return heads[:, :S].sum(dim=4), heads[:, :S].sum(dim=(0, 1)).reshape(R, H, N).transpose(0, 1)

    d_q, d_q_bias = ranked(early["dq"])
    d_k, d_k_bias = ranked(late["dk"])
    mix, skip = (early[name].sum(dim=(0, 2)) for name in ("mix", "skip"))
    d_norm = mix if op.mimo_out is None else mix * op.mimo_out
    d_phi = mix if op.norm_weight is None else mix * op.norm_weight[:, None]
    d_log, d_gamma, d_later, d_shift = _weight_grads(spec, packed, early["row"], late)
    turn = (early["turn"] + late["turn"]).view(B, spec.chunks, C, H, spec.A).permute(0, 1, 3, 4, 2)
    return Operands(
        q=d_q, k=d_k, v=late["dv"][:, :S], z=None if op.z is None else early["dz"][:, :S], q_bias=d_q_bias,
        k_bias=d_k_bias, mimo_v=late["d_psi"].sum(dim=(0, 2)),
        mimo_z=None if op.mimo_z is None else early["d_zeta"].sum(dim=(0, 2)),
        mimo_out=None if op.mimo_out is None else d_phi,
        d=None if op.d is None else skip.sum(dim=(1, 2)),
        norm_weight=None if op.norm_weight is None else d_norm.sum(dim=1),
        log_decay=d_log, gamma=d_gamma, later=d_later, shift=d_shift,
        theta=_anchored(spec, turn, late["spin"], packed.masks), h_first=late["d_first"][:, :, 0],
    )  # fmt: skip


def _sum_dtype(u: Tensor) -> torch.dtype:
    """bf16 is summed in fp32."""
    return torch.float32 if u.dtype == torch.bfloat16 else u.dtype


def last_key(k_BSRGN: Tensor, k_bias: Tensor, theta: Tensor, layout: Layout) -> Tensor:
    """(B,H,N,R): the last token's key, biased and rotated: the part of the final state that needs no kernel. In plain
    differentiable torch."""
    _, S, _, G, N = k_BSRGN.shape
    heads = k_BSRGN[:, -1].repeat_interleave(layout.dims.H // G, dim=2).to(theta.dtype)  # B,R,H,N
    keys = heads.permute(0, 2, 3, 1) + k_bias.transpose(1, 2)
    angle = theta[:, -1, :, :, (S - 1) % layout.C, None]
    lo, hi = rotary_slices(N, layout.divisor)
    a, b = keys[:, :, lo], keys[:, :, hi]
    turned = {lo.start: a * angle.cos() - b * angle.sin(), hi.start: a * angle.sin() + b * angle.cos()}
    A = N // layout.divisor
    return torch.cat([turned.get(i, keys[:, :, i : i + A]) for i in range(0, N, A)], dim=2)
