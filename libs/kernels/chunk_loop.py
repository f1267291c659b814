"""A loop over chunks with static shapes whose backward recomputes each chunk: one body, two ways to drive it.

For operators on XLA, where a Python loop becomes a graph as long as the sequence. "scan" is one while loop of XLA,
"loop" the same in Python, on any device. Not for the chunked scan on CPU and CUDA, which has a backward of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Driver = Literal["scan", "loop"]
# Axes of a global XLA mesh over which a batch's rows are cut (libs.parallel.xla).
ROW_AXES = ("data", "fsdp")
Tensors: TypeAlias = tuple[Tensor, ...]
# (constants, carry, one chunk of every x) -> (next carry, one chunk of every y); pure, in plain torch, and without a
# tensor in its closure: it would live as long as the graph, and on XLA become a result of every program until then.
Body: TypeAlias = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]


def chunk_loop(
    body: Body, constants: Sequence[Tensor], init: Sequence[Tensor], xs: Sequence[Tensor], driver: Driver,
    *, weights: bool = False,
) -> tuple[Tensors, Tensors]:  # fmt: skip
    """`carry, y = body(constants, carry, x)` over the first axis of every x; the last carry, and the ys stacked.

    Saved for backward: the constants, the xs, and the carry that enters each chunk. Differentiable once, in every
    floating-point tensor. The carry keeps its shapes and dtypes.

    On a mesh of XLA devices the first axis of constants and carries and the second of xs and ys are taken for rows of
    the batch, where they divide: each chip runs the loop on its rows, and nothing is exchanged inside. So a weight is a
    constant with a copy for each row or for each of `row_parts`: what chips add to its gradient then meets once, where
    the copies do, and not in every iteration.

    weights: the xs are weights, and the constants what they are; neither has an axis of rows.
    """
    flat: Tensors = _Loop.apply(  # type: ignore[no-untyped-call]
        body, driver, (len(constants), len(init)), not weights, *constants, *init, *xs
    )
    return flat[: len(init)], flat[len(init) :]


def row_parts(driver: Driver) -> int:
    """Into how many parts the mesh of XLA devices cuts the rows of a batch; 1 without one, and driven in Python."""
    if driver == "loop":
        return 1
    # torch_xla is an optional dependency.
    import torch_xla.distributed.spmd as spmd

    mesh = spmd.get_global_mesh()
    return 1 if mesh is None else math.prod(mesh.shape()[name] for name in _row_axes(mesh))


def _row_axes(mesh: Any) -> tuple[str, ...]:
    return tuple(name for name in mesh.axis_names if name in ROW_AXES)


class _Rows(NamedTuple):
    """Which tensors of a loop have an axis of rows."""

    constants: bool
    carry: Sequence[bool]
    xs: Sequence[bool]
    ys: bool


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, body: Body, driver: Driver, counts: tuple[int, int], xs_rows: bool, *tensors: Tensor
    ) -> Tensors:
        constants, init, xs = _split(tensors, *counts)

        def step(constants: Tensors, carry: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
            after, y = body(constants, carry, x)
            return after, (*carry, *y)

        rows = _Rows(xs_rows, [True] * len(init), [xs_rows] * len(xs), True)
        carry, ys = _DRIVERS[driver](step, constants, init, xs, False, rows)
        entering, outputs = ys[: len(init)], ys[len(init) :]
        ctx.body, ctx.driver, ctx.counts, ctx.xs_rows = body, driver, counts, xs_rows
        ctx.save_for_backward(*constants, *entering, *xs)
        return (*carry, *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        constants, entering, xs = _split(ctx.saved_tensors, *ctx.counts)
        n_carry = len(entering)
        d_carry, d_ys = grads[:n_carry], grads[n_carry:]
        needed = ctx.needs_input_grad[4:]
        wants_constant = [need and u.is_floating_point() for need, u in zip(needed, constants, strict=False)]
        wants_x = [need and u.is_floating_point() for need, u in zip(needed[-len(xs) :], xs, strict=True)]
        sums = tuple(torch.zeros_like(u) for u in _chosen(constants, wants_constant))

        def step(constants: Tensors, carry: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
            entering, chunk, d_y = _split(x, n_carry, len(xs))
            totals, d_after = carry[: len(sums)], carry[len(sums) :]
            d_constants, d_entering, d_chunk = _chunk_backward(
                ctx.body, constants, entering, chunk, (*d_after, *d_y), wants_constant, wants_x
            )
            totals = tuple(total + d for total, d in zip(totals, d_constants, strict=True))
            return (*totals, *d_entering), d_chunk

        rows = _Rows(
            ctx.xs_rows,
            [ctx.xs_rows] * len(sums) + [True] * n_carry,
            [True] * n_carry + [ctx.xs_rows] * len(xs) + [True] * len(d_ys),
            ctx.xs_rows,
        )
        carry, d_xs = _DRIVERS[ctx.driver](step, constants, (*sums, *d_carry), (*entering, *xs, *d_ys), True, rows)
        d_constants, d_init = carry[: len(sums)], carry[len(sums) :]
        return (None, None, None, None, *_spread(d_constants, wants_constant), *d_init, *_spread(d_xs, wants_x))


def _chunk_backward(
    body: Body, constants: Tensors, entering: Tensors, chunk: Tensors, d_out: Tensors,
    wants_constant: Sequence[bool], wants_x: Sequence[bool],
) -> tuple[Tensors, Tensors, Tensors]:  # fmt: skip
    """Gradients of one chunk: run the body again and differentiate it."""
    wanted = [*wants_constant, *(True for _ in entering), *wants_x]
    leaves = tuple(
        u.detach().requires_grad_(want) for u, want in zip((*constants, *entering, *chunk), wanted, strict=True)
    )
    parts = _split(leaves, len(constants), len(entering))
    with torch.enable_grad():
        after, y = body(*parts)
        pairs = [(u, d) for u, d in zip((*after, *y), d_out, strict=True) if u.requires_grad]
        inputs = _chosen(leaves, wanted)
        found = torch.autograd.grad([u for u, _ in pairs], inputs, [d for _, d in pairs], allow_unused=True)
    grads = tuple(torch.zeros_like(u) if d is None else d for u, d in zip(inputs, found, strict=True))
    return _split(grads, sum(wants_constant), len(entering))


def _drive_in_python(
    step: Body, constants: Tensors, init: Tensors, xs: Tensors, reverse: bool, rows: _Rows
) -> tuple[Tensors, Tensors]:
    carry, chunks = init, xs[0].shape[0]
    ys: list[Tensors] = []
    for i in reversed(range(chunks)) if reverse else range(chunks):
        carry, y = step(constants, carry, tuple(x[i] for x in xs))
        ys.append(y)
    ordered = reversed(ys) if reverse else iter(ys)
    return carry, tuple(torch.stack(column) for column in zip(*ordered, strict=True))


def _drive_in_xla(
    step: Body, constants: Tensors, init: Tensors, xs: Tensors, reverse: bool, rows: _Rows
) -> tuple[Tensors, Tensors]:
    """One while loop. Constants go through its carry: what a body closes over is traced into it, up to the leaves."""
    # torch_xla is an optional dependency. Its public `scan` would differentiate the body a second time.
    from torch_xla.experimental.scan import _scan_impl_pytree

    n, cut = len(constants), _rows_constraint()

    def body(carry: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
        after, y = step(carry[:n], carry[n:], x)
        return (*(u.clone() for u in carry[:n]), *after), y

    entering = (*cut(constants, 0, [rows.constants] * n), *cut(init, 0, rows.carry))
    carry, ys = _scan_impl_pytree(body, entering, cut(xs, 1, rows.xs), reverse=reverse)
    return carry[n:], cut(ys, 1, [rows.ys] * len(ys))


def _rows_constraint() -> Callable[[Tensors, int, Sequence[bool]], Tensors]:
    """On a mesh, tell XLA that those tensors that have rows are cut along that axis, as the batch is: left to itself it
    cuts what is in a loop as it likes, and moves it in every iteration. Without a mesh nothing is done."""
    import torch_xla.distributed.spmd as spmd

    mesh = spmd.get_global_mesh()
    if mesh is None:
        return lambda tensors, _axis, _has_rows: tensors
    axes, parts = _row_axes(mesh), row_parts("scan")

    def one(u: Tensor, axis: int) -> Tensor:
        if parts == 1 or u.dim() <= axis or u.shape[axis] % parts:
            return u
        # torch_xla's words for a cut hold five dimensions.
        flat = u.reshape(*u.shape[: axis + 1], -1)
        cut: Tensor = spmd.mark_sharding_with_gradients(flat, mesh, (*(None,) * axis, axes, None))
        return cut.view(u.shape)

    def constrain(tensors: Tensors, axis: int, has_rows: Sequence[bool]) -> Tensors:
        return tuple(one(u, axis) if has else u for u, has in zip(tensors, has_rows, strict=True))

    return constrain


_DRIVERS = {"scan": _drive_in_xla, "loop": _drive_in_python}


def _split(tensors: Sequence[Tensor], first: int, second: int) -> tuple[Tensors, Tensors, Tensors]:
    return tuple(tensors[:first]), tuple(tensors[first : first + second]), tuple(tensors[first + second :])


def _chosen(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> Tensors:
    return tuple(u for u, want in zip(tensors, wanted, strict=True) if want)


def _spread(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    rest = iter(tensors)
    return tuple(next(rest) if want else None for want in wanted)
