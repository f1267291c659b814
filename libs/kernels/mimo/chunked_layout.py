"""How one call of the chunked scan is cut into tiles, and how tiles are read from and written to its tensors.

Layout and copies only; the arithmetic is in `chunked_tile` and `chunked_grad`, the walk over tiles in `chunked`.
"""
# B sequences  S tokens  H heads  G groups  R rank  N state  P head width  A rotary angles
# c chunks  C tokens of a chunk  h heads of a tile  g groups they use  F = R*C

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnF

from libs.kernels.mimo.chunked_grad import ParamSums, TileGrads
from libs.kernels.mimo.chunked_terms import DocumentMasks
from libs.kernels.mimo.chunked_tile import HeadParams, TileInputs
from libs.kernels.mimo.shapes import Dims, accumulation_dtype

# Elements of the largest (c,h,.,.) buffer of a tile. About a dozen such buffers are alive at once: at 2**18 fp32
# elements (1 MiB) they fit a desktop's last-level cache, and a tile is still large enough to hide torch's overhead.
TILE_ELEMENTS = 2**18


class Layout(NamedTuple):
    """How one call is cut: `chunks` chunks of C tokens; tiles of `tile_chunks` x `tile_heads`."""

    dims: Dims
    C: int
    chunks: int
    tile_chunks: int
    tile_heads: int
    divisor: int
    norm_eps: float


class TileIndex(NamedTuple):
    """One tile: batch row, first and last+1 chunk, head and token."""

    b: int
    c0: int
    c1: int
    h0: int
    h1: int
    t0: int
    t1: int


def plan(dims: Dims, chunk_size: int, divisor: int, norm_eps: float) -> Layout:
    """Cut a call into tiles whose working set fits the cache."""
    C = chunk_size  # also for a shorter sequence: bits must not depend on how a sequence is fed in
    chunks = -(-dims.S // C)
    F = dims.R * C
    largest = max(F * F, F * dims.N, F * dims.P, dims.N * dims.P)
    matrices = max(1, TILE_ELEMENTS // largest)
    heads = min(dims.H, matrices)
    return Layout(dims, C, chunks, max(1, matrices // heads), heads, divisor, norm_eps)


def walk(layout: Layout) -> Iterator[tuple[int, int, int, list[TileIndex]]]:
    """Every (b, h0, h1) with its tiles in the order of time."""
    for b in range(layout.dims.B):
        for h0 in range(0, layout.dims.H, layout.tile_heads):
            h1 = min(h0 + layout.tile_heads, layout.dims.H)
            tiles = []
            for c0 in range(0, layout.chunks, layout.tile_chunks):
                c1 = min(c0 + layout.tile_chunks, layout.chunks)
                tiles.append(TileIndex(b, c0, c1, h0, h1, c0 * layout.C, min(c1 * layout.C, layout.dims.S)))
            yield b, h0, h1, tiles


class Operands(NamedTuple):
    """The differentiable tensors of the scan proper, in the order in which the autograd Function takes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor | None
    q_bias: Tensor
    k_bias: Tensor
    mimo_v: Tensor
    mimo_z: Tensor | None
    mimo_out: Tensor | None
    d: Tensor | None
    norm_weight: Tensor | None
    log_decay: Tensor
    gamma: Tensor
    later: Tensor
    shift: Tensor
    theta: Tensor
    h_first: Tensor  # (B,H,N,P): the state entering the first chunk


class Reader:
    """Cuts the operands of one call into the layouts of tiles, in the accumulation dtype."""

    def __init__(self, operands: Operands, layout: Layout, masks: DocumentMasks | None) -> None:
        self.op, self.layout, self.masks = operands, layout, masks
        self.acc = accumulation_dtype(operands.v.dtype)
        device = operands.v.device
        C = layout.C
        self.lower = torch.ones(1, C, C, dtype=torch.bool, device=device).tril()
        per_group = layout.dims.H // layout.dims.G
        self.group_of_head = torch.arange(layout.dims.H, device=device) // per_group
        self.cos, self.sin = operands.theta.cos(), operands.theta.sin()

    def tokens(self, u_BSx: Tensor, at: TileIndex) -> Tensor:
        """(tokens, ...) of a tile from a (B,S,...) tensor, padded with zeros to whole chunks."""
        part = u_BSx[at.b, at.t0 : at.t1].to(self.acc)
        missing = (at.c1 - at.c0) * self.layout.C - (at.t1 - at.t0)
        return part if missing == 0 else nnF.pad(part, [0, 0] * (part.dim() - 1) + [0, missing])

    def heads(self, u_BSHP: Tensor, at: TileIndex) -> Tensor:
        """(c,h,C,P) of a tile from a (B,S,H,P) tensor."""
        part = self.tokens(u_BSHP[:, :, at.h0 : at.h1], at)
        return part.view(at.c1 - at.c0, self.layout.C, *part.shape[1:]).transpose(1, 2)

    def ranked_heads(self, u_BSRHP: Tensor, at: TileIndex) -> Tensor:
        """(c,h,R,C,P) of a tile from a (B,S,R,H,P) tensor."""
        part = self.tokens(u_BSRHP[:, :, :, at.h0 : at.h1], at)
        return part.view(at.c1 - at.c0, self.layout.C, *part.shape[1:]).permute(0, 3, 2, 1, 4)

    def params(self, h0: int, h1: int) -> HeadParams:
        """Parameters of heads h0..h1, spread over the tokens of a chunk where that makes inner loops long."""
        op, acc = self.op, self.acc
        bias = torch.stack([op.q_bias[h0:h1], op.k_bias[h0:h1]]).to(acc).transpose(2, 3)  # 2,h,N,R

        def ranked(u: Tensor | None) -> Tensor | None:
            return None if u is None else u[h0:h1, :, None].to(acc)

        psi = ranked(op.mimo_v)
        assert psi is not None
        return HeadParams(
            qk_bias_2hNRC=bias[..., None].expand(*bias.shape, self.layout.C).contiguous(),
            psi_hR1P=psi,
            zeta_hR1P=ranked(op.mimo_z),
            phi_hR1P=ranked(op.mimo_out),
            d_h=None if op.d is None else op.d[h0:h1].to(acc),
            norm_h11P=None if op.norm_weight is None else op.norm_weight[h0:h1, None, None].to(acc),
            norm_eps=self.layout.norm_eps,
        )

    def tile(self, at: TileIndex) -> TileInputs:
        """Everything that the tile `at` reads."""
        C, c = self.layout.C, at.c1 - at.c0
        chunks, heads = slice(at.c0, at.c1), slice(at.h0, at.h1)
        g0, g1 = self.groups(at)
        qk = torch.stack([self.tokens(u[:, :, :, g0:g1], at) for u in (self.op.q, self.op.k)])  # 2,(c C),R,g,N
        qk = qk.view(2, c, C, *qk.shape[2:]).permute(0, 1, 4, 5, 3, 2).contiguous()  # 2,c,g,N,R,C
        masks = self.masks
        return TileInputs(
            qk_2cgNRC=qk,
            v_chCP=self.heads(self.op.v, at),
            z_chCP=None if self.op.z is None else self.heads(self.op.z, at),
            cos_chAC=self.cos[at.b, chunks, heads],
            sin_chAC=self.sin[at.b, chunks, heads],
            log_decay_chC=self.op.log_decay[at.b, chunks, heads],
            gamma_chC=self.op.gamma[at.b, chunks, heads],
            later_chC=self.op.later[at.b, chunks, heads],
            pair_cCC=self.lower if masks is None else masks.pair_cCC[chunks],
            carry_cC=None if masks is None else masks.carry_cC[chunks],
            leave_cC=None if masks is None else masks.leave_cC[chunks],
            through_c=None if masks is None else masks.through_c[chunks],
            heads_to_groups=None if g1 - g0 == 1 else self.group_of_head[heads] - g0,
        )

    def shift(self, at: TileIndex) -> Tensor:
        """(c,h) shifted term of each chunk's last token."""
        return self.op.shift[at.b, at.c0 : at.c1, at.h0 : at.h1]

    def groups(self, at: TileIndex) -> tuple[int, int]:
        """First and last+1 group that the tile's heads use."""
        per_group = self.layout.dims.H // self.layout.dims.G
        return at.h0 // per_group, (at.h1 - 1) // per_group + 1


class GradStore:
    """Gradients of one call's operands, added up tile by tile in the accumulation dtype."""

    ADDED_TO = ("q", "k", "q_bias", "k_bias", "mimo_v", "mimo_z", "mimo_out", "d", "norm_weight")

    def __init__(self, op: Operands, reader: Reader) -> None:
        self.op, self.reader = op, reader

        def fresh(name: str, u: Tensor | None) -> Tensor | None:
            if u is None:
                return None
            # Tiles partition these; the others are added to by several tiles.
            make = torch.zeros if name in self.ADDED_TO else torch.empty
            return make(u.shape, dtype=reader.acc, device=u.device)

        self.of = Operands(*(fresh(name, u) for name, u in zip(Operands._fields, op, strict=True)))  # type: ignore[arg-type]

    def add(self, got: TileGrads, at: TileIndex) -> None:
        """Take in the gradients of one tile's own inputs."""
        of, heads, chunks = self.of, slice(at.h0, at.h1), slice(at.c0, at.c1)
        g0, g1 = self.reader.groups(at)
        tokens = at.t1 - at.t0
        for target, part in zip((of.q, of.k), got.d_qk_2cgNRC, strict=True):
            rows = part.permute(0, 4, 3, 1, 2).flatten(0, 1)[:tokens]  # (c C),R,g,N
            target[at.b, at.t0 : at.t1, :, g0:g1].add_(rows)
        scatter(of.v, got.d_v_chCP, at)
        if of.z is not None and got.d_z_chCP is not None:
            scatter(of.z, got.d_z_chCP, at)
        of.log_decay[at.b, chunks, heads] = got.d_log_decay_chC
        of.gamma[at.b, chunks, heads] = got.d_gamma_chC
        of.later[at.b, chunks, heads] = got.d_later_chC
        of.shift[at.b, chunks, heads] = got.d_shift_ch
        of.theta[at.b, chunks, heads] = got.d_theta_chAC

    def add_params(self, sums: ParamSums, h0: int, h1: int) -> None:
        """Take in the parameter gradients of one walk over the heads h0..h1."""
        of = self.of
        bias = sums.qk_bias_2hNRC.sum(dim=-1).transpose(2, 3)  # 2,h,R,N
        of.q_bias[h0:h1] += bias[0]
        of.k_bias[h0:h1] += bias[1]
        for target, total in (
            (of.mimo_v, sums.psi_hRCP),
            (of.mimo_z, sums.zeta_hRCP),
            (of.mimo_out, sums.phi_hRCP),
        ):
            if target is not None and total is not None:
                target[h0:h1] += total.sum(dim=2)
        if of.norm_weight is not None and sums.norm_hRCP is not None:
            of.norm_weight[h0:h1] += sums.norm_hRCP.sum(dim=(1, 2))
        if of.d is not None and sums.d_h is not None:
            of.d[h0:h1] += sums.d_h

    def result(self) -> tuple[Tensor | None, ...]:
        """Gradients in the order and dtypes of the operands."""
        return tuple(
            None if grad is None or u is None else grad.to(u.dtype) for grad, u in zip(self.of, self.op, strict=True)
        )


def scatter(target: Tensor, part: Tensor, at: TileIndex) -> None:
    """Write a tile (c,h,C,P) or (c,h,R,C,P) into its place of (B,S,H,P) or (B,S,R,H,P), dropping the padding."""
    rows = part.permute((0, 2, 1, 3) if part.dim() == 4 else (0, 3, 2, 1, 4))  # c,C,(R),h,P
    place = target[at.b, at.t0 : at.t1, ..., at.h0 : at.h1, :]
    if place.shape[0] == rows.shape[0] * rows.shape[1]:
        place.view(rows.shape).copy_(rows)
    else:
        place.copy_(rows.flatten(0, 1)[: place.shape[0]])
