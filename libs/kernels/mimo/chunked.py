"""The chunked scan in plain torch: tiles of a few chunks and heads, walked forward and backward.

What a tile computes is in `chunked_tile` and `chunked_grad`; here is the walk, and what is saved for backward: the
inputs, the angles and one state per tile. Runs on every torch device; tuned for CPU.
"""
# B sequences  S tokens  H heads  G groups  R rank  N state  P head width  A rotary angles
# c chunks  C tokens of a chunk  h heads of a tile  F = R*C

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from libs.kernels.mimo.chunked_grad import ParamSums, tile_backward
from libs.kernels.mimo.chunked_layout import GradStore, Layout, Operands, Reader, plan, scatter, walk
from libs.kernels.mimo.chunked_terms import DocumentMasks, Weights, document_masks, scan_weights, wrapped_angles
from libs.kernels.mimo.chunked_tile import (
    Decays,
    Projected,
    Scratch,
    TileInputs,
    decays,
    finish,
    last_products,
    pair_weights,
    project,
    raw_outputs,
    scores,
    state_updates,
    weigh,
)
from libs.kernels.mimo.shapes import Dims, MimoInputs, MimoResult, MimoState, accumulation_dtype


def mimo_chunked(
    inputs: MimoInputs, dims: Dims, chunk_size: int, rotary_dim_divisor: int, norm_eps: float,
    state: MimoState | None, bounds: list[int] | None = None,
) -> MimoResult:  # fmt: skip
    """Chunked form of `reference.mimo_reference`, equal to it for every chunk size; see `api.mamba3_mimo`.

    `bounds` packs documents into B = 1 (no initial state then). Differentiable in all inputs and in the state.
    """
    assert state is None or bounds is None, "packed documents with states are run one by one"
    acc = accumulation_dtype(inputs.v.dtype)
    layout = plan(dims, chunk_size, rotary_dim_divisor, norm_eps)
    masks = None if bounds is None else document_masks(bounds, layout.chunks, layout.C, inputs.v.device)
    weights = scan_weights(inputs.adt.to(acc), inputs.dt.to(acc), inputs.trap.to(acc), layout.chunks, layout.C, masks)
    start_angle, h_first = entry(inputs, dims, state, weights, acc)
    theta, end_angle = wrapped_angles(
        inputs.angles.to(acc), inputs.dt.to(acc), start_angle, layout.chunks, layout.C, masks
    )
    operands = Operands(
        inputs.q, inputs.k, inputs.v, inputs.z, inputs.q_bias, inputs.k_bias, inputs.mimo_v, inputs.mimo_z,
        inputs.mimo_out, inputs.d, inputs.norm_weight, weights.log_decay, weights.gamma, weights.later,
        weights.shift_BcH, theta, h_first,
    )  # fmt: skip
    out, h_end, k_last = _Scan.apply(layout, masks, *operands)  # type: ignore[no-untyped-call]
    final = MimoState(end_angle, h_end.transpose(2, 3), k_last.permute(0, 3, 1, 2), inputs.v[:, -1].to(acc))
    return out, final


def entry(
    inputs: MimoInputs, dims: Dims, state: MimoState | None, weights: Weights, acc: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Start angle (B,H,A) and the state entering the first chunk (B,H,N,P): the given one plus the shifted term
    of the token before, by the same two operations as between chunks."""
    if state is None:
        zeros = MimoState.zeros(dims.B, dims.H, dims.P, dims.N, dims.R, dims.A, inputs.v.device, acc)
        return zeros.angle, zeros.ssm.transpose(2, 3)
    keys_BHNR = state.k.to(acc).permute(0, 2, 3, 1)
    values_BHRP = state.x.to(acc)[:, :, None] * inputs.mimo_v.to(acc)
    product = torch.bmm(keys_BHNR.flatten(0, 1), values_BHRP.flatten(0, 1)).view(dims.B, dims.H, dims.N, dims.P)
    h_first = torch.addcmul(state.ssm.to(acc).transpose(2, 3), weights.first_BH[..., None, None], product)
    return state.angle.to(acc), h_first


def _advance(
    tile: TileInputs, proj: Projected, decay: Decays, shift_ch: Tensor, h_hNP: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """States entering each chunk of the tile (c,h,N,P), and the one entering the next tile (h,N,P)."""
    chunks, _, C = tile.later_chC.shape
    updates = state_updates(tile, decay, proj, scratch)
    last = last_products(proj, chunks, C)
    states = scratch("states", chunks + 1, *h_hNP.shape)
    states[0] = h_hNP
    for i in range(chunks):
        torch.addcmul(updates[i], decay.through_ch[i, :, None, None], states[i], out=states[i + 1])
        states[i + 1].addcmul_(shift_ch[i, :, None, None], last[i])
    return states[:-1], states[-1].clone()


class _Scan(torch.autograd.Function):
    """The scan proper. Returns out in the accumulation dtype, the final state (B,H,N,P) and last key (B,H,N,R)."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, masks: DocumentMasks | None, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        op = Operands(*tensors)
        reader, scratch = Reader(op, layout, masks), Scratch(op.theta)
        dims = layout.dims
        ranks = () if op.mimo_out is not None else (dims.R,)
        out = op.theta.new_empty(dims.B, dims.S, *ranks, dims.H, dims.P)
        h_end = op.theta.new_empty(dims.B, dims.H, dims.N, dims.P)
        k_last = op.theta.new_empty(dims.B, dims.H, dims.N, dims.R)
        entering: list[Tensor] = []
        for b, h0, h1, tiles in walk(layout):
            params = reader.params(h0, h1)
            h_hNP = op.h_first[b, h0:h1]
            for at in tiles:
                entering.append(h_hNP)
                tile = reader.tile(at)
                proj = project(tile, params, layout.divisor, scratch)
                decay = decays(tile)
                h_in, h_hNP = _advance(tile, proj, decay, reader.shift(at), h_hNP, scratch)
                weighed = weigh(scores(proj, scratch), pair_weights(tile, decay), params, scratch)
                y = raw_outputs(proj, weighed, decay, h_in, scratch)
                scatter(out, finish(y, tile, params, scratch), at)
            h_end[b, h0:h1] = h_hNP
            keys = proj.k_xNF.view(at.c1 - at.c0, h1 - h0, dims.N, dims.R, layout.C)
            k_last[b, h0:h1] = keys[-1, ..., (dims.S - 1) % layout.C]
        ctx.layout, ctx.masks = layout, masks
        ctx.save_for_backward(*op, *entering)
        return out, h_end, k_last

    @staticmethod
    def backward(ctx: Any, *d_outputs: Any) -> tuple[Any, ...]:
        layout: Layout = ctx.layout
        saved = ctx.saved_tensors
        op, entering = Operands(*saved[: len(Operands._fields)]), list(saved[len(Operands._fields) :])
        reader, scratch = Reader(op, layout, ctx.masks), Scratch(op.theta)
        grads = GradStore(op, reader)
        d_out, d_h_end, d_k_last = d_outputs
        last_token = (layout.dims.S - 1) % layout.C
        cut = reader.ranked_heads if op.mimo_out is None else reader.heads
        for b, h0, h1, tiles in walk(layout):
            params = reader.params(h0, h1)
            sums = ParamSums.zeros(params, layout.C)
            d_state = d_h_end[b, h0:h1]
            states, entering = entering[: len(tiles)], entering[len(tiles) :]
            for at, h_hNP in zip(reversed(tiles), reversed(states), strict=True):
                tile = reader.tile(at)
                proj = project(tile, params, layout.divisor, scratch)
                decay = decays(tile)
                shift = reader.shift(at)
                h_in, _ = _advance(tile, proj, decay, shift, h_hNP, scratch)
                d_key = d_k_last[b, h0:h1] if at is tiles[-1] else None
                got = tile_backward(
                    cut(d_out, at), d_state, tile, shift, params, layout.divisor, proj, decay, h_in, d_key,
                    last_token, sums, scratch,
                )  # fmt: skip
                grads.add(got, at)
                d_state = got.d_state_hNP
            grads.of.h_first[b, h0:h1] = d_state
            grads.add_params(sums, h0, h1)
        return (None, None, *grads.result())
