"""The Pallas kernels as a torch operator on XLA devices: each is one custom call, forward and backward.

Imports jax and torch_xla. The kernels' code is made on the host for a TPU whether there is one or not, so a program
that holds it lowers and compiles anywhere and runs on a TPU only.
"""
# B rows  S tokens  H query heads  G key/value heads  D head width  n blocks

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import torch
import torch_xla
import torch_xla.distributed.spmd as spmd
from jax import export
from jax._src.interpreters import mlir as jax_mlir
from jaxlib.mlir import ir
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch_xla.experimental.custom_kernel import _shard_map

from libs.kernels.attention.pallas.kernels import KERNELS, Problem, operands
from libs.kernels.attention.pallas.tiles import choose_block
from libs.kernels.chunk_loop import ROW_AXES

HEAD_AXIS = "tensor"
TARGET = "tpu_custom_call"
Cut = tuple[str, ...] | None


def attention_pallas(q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, ids_BS: Tensor | None, scale: float) -> Tensor:
    """Same result as `api.attention`, causal, with as many keys as queries; ids_BS rise along a row.

    Raises:
        ValueError: a shape outside the tile table.
    """
    B, S, _, D = q_BSHD.shape
    block = choose_block(S, D, dtype_name(q_BSHD))
    starts = document_starts(torch.zeros(B, S, dtype=torch.int32, device=q_BSHD.device) if ids_BS is None else ids_BS)
    reach = block_reach(starts, block)
    q, k, v = (u.transpose(1, 2) for u in (q_BSHD, k_BSGD, v_BSGD))
    out: Tensor = _Attention.apply(q, k, v, starts[:, None], reach, block, scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


def document_starts(ids_BS: Tensor) -> Tensor:
    """(B,S) int32: the position of the first token of each token's document; a running maximum, by doubling."""
    S = ids_BS.shape[1]
    position = torch.arange(S, dtype=torch.int32, device=ids_BS.device)
    first = torch.cat([torch.zeros_like(ids_BS[:, :1], dtype=torch.bool), ids_BS[:, 1:] != ids_BS[:, :-1]], dim=1)
    starts = torch.where(first, position, 0)
    step = 1
    while step < S:
        earlier = torch.cat([torch.zeros_like(starts[:, :step]), starts[:, :-step]], dim=1)
        starts, step = torch.maximum(starts, earlier), 2 * step
    return starts


def block_reach(starts_BS: Tensor, block: int) -> Tensor:
    """(B,3,n) int32. For each block of queries: the first block of keys that one of them sees, and the first that all
    of them see whole but for causality; for each block of keys: the last block of queries that sees one of them."""
    n = starts_BS.shape[1] // block
    starts_Bnb = starts_BS.view(-1, n, block)
    first = starts_Bnb[:, :, 0] // block
    whole = (starts_Bnb[:, :, -1] + block - 1) // block
    blocks = torch.arange(n, dtype=first.dtype, device=first.device)
    last = (first[:, None, :] <= blocks[:, None]).to(torch.int32).sum(2, dtype=torch.int32) - 1
    return torch.stack([first, whole, last], dim=1)


def dtype_name(tensor: Tensor) -> str:
    """As jax writes it."""
    return str(tensor.dtype).removeprefix("torch.")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, reach: Tensor, block: int, scale: float
    ) -> Tensor:
        out, lse = _on_mesh("forward", (reach, starts, q, k, v), block, scale)
        ctx.save_for_backward(q, k, v, starts, reach, out, lse)
        ctx.block, ctx.scale = block, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, starts, reach, out, lse = ctx.saved_tensors
        delta = (out.float() * d_out.float()).sum(-1)[:, :, None]
        given = (reach, starts, q, k, v, d_out.to(q.dtype), lse, delta)
        (dq,) = _on_mesh("backward_queries", given, ctx.block, ctx.scale)
        dk, dv = _on_mesh("backward_keys", given, ctx.block, ctx.scale)
        return dq, dk, dv, None, None, None, None


def _on_mesh(kernel: str, given: Sequence[Tensor], block: int, scale: float) -> tuple[Tensor, ...]:
    """On a mesh each chip is given its rows and heads by hand: XLA's partitioner cannot look into a custom call."""

    def local(*given: Tensor) -> tuple[Tensor, ...]:
        (B, H, S, D), G = given[2].shape, given[3].shape[1]
        return tpu_call(kernel, Problem(B, H, G, S, D, dtype_name(given[2]), block, scale), given)

    mesh = spmd.get_global_mesh()
    if mesh is None:
        return local(*given)
    sizes = mesh.shape()
    rows: Cut = tuple(name for name in mesh.axis_names if name in ROW_AXES)
    if given[2].shape[0] % math.prod(sizes[name] for name in rows or ()):
        rows = None
    heads: Cut = (HEAD_AXIS,) if HEAD_AXIS in sizes and given[3].shape[1] % sizes[HEAD_AXIS] == 0 else None
    by_head = (rows, heads, None, None)
    cuts = [(rows, None, None), (rows, None, None), *(by_head for _ in given[2:])]
    results = 1 if kernel == "backward_queries" else 2
    return tuple(_shard_map(local, mesh, cuts, [by_head] * results)(*given))


def tpu_call(kernel: str, problem: Problem, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One kernel as a custom call of XLA."""
    config, shapes = payload(kernel, problem)
    made = torch_xla._XLAC._xla_tpu_custom_call(
        list(given), config, [list(shape) for shape, _ in shapes], [getattr(torch, dtype) for _, dtype in shapes]
    )
    return tuple(made)


@lru_cache(maxsize=64)
def payload(kernel: str, problem: Problem) -> tuple[str, tuple[tuple[tuple[int, ...], str], ...]]:
    """The kernel compiled to Mosaic, as text for XLA, and (shape, dtype) of its results.

    By jax's export, which writes an older version of Mosaic: the one that the pinned libtpu reads.
    """
    exported = export.export(jax.jit(KERNELS[kernel](problem)), platforms=("tpu",))(*operands(problem, kernel))
    with jax_mlir.make_ir_context(), ir.Location.unknown():
        calls = list(_custom_calls(ir.Module.parse(exported.mlir_module()).operation))
        assert [len(call.operands) for call in calls] == [len(exported.in_avals)], "one call, of all operands as given"
        config = ir.StringAttr(calls[0].attributes["backend_config"]).value
    return config, tuple((aval.shape, str(aval.dtype)) for aval in exported.out_avals)


def _custom_calls(operation: Any) -> list[Any]:
    found = []
    for region in operation.regions:
        for block in region:
            for inner in block:
                named = inner.operation
                if named.name == "stablehlo.custom_call" and TARGET in str(named.attributes["call_target_name"]):
                    found.append(named)
                found.extend(_custom_calls(named))
    return found
