"""Causal attention over packed documents as TPU Pallas kernels: forward, and a backward each for queries and for keys.

Flash attention (Dao et al. 2022; backward as in FlashAttention-2): softmax over blocks of keys with a running maximum
and sum in fp32. Scores are held transposed, (keys, queries), so that what there is one of for each query is a row.
Imports jax. Not for torch (operator.py).
"""
# B rows  S tokens  H query heads  G key/value heads  D head width  b tokens of a block  n = S/b blocks
# i block of queries  j block of keys

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from libs.kernels.attention.pallas.tiles import VMEM_BYTES

# Below every score, and finite: a query that has seen no key yet keeps its sum and its output at exactly 0.
NO_SCORE = -1e30
# Rows of `reach`: see `operator.block_reach`.
FIRST, WHOLE, LAST = range(3)
# A point of the grid, and `reach` -> the block there.
Index: TypeAlias = Callable[..., tuple[Any, ...]]


class Problem(NamedTuple):
    """One chip's shape. dtype: "bfloat16" or "float32", of q, k, v and every result but the statistics."""

    B: int
    H: int
    G: int
    S: int
    D: int
    dtype: str
    block: int
    scale: float

    @property
    def n(self) -> int:
        return self.S // self.block


def forward(p: Problem, *, interpret: bool = False, vmem: int = VMEM_BYTES) -> Callable[..., Any]:
    """(reach, starts, q, k, v) -> (out, lse). reach (B,3,n) and starts (B,1,S) int32; q (B,H,S,D); k, v (B,G,S,D);
    out as q; lse (B,H,1,S) fp32, the logarithm of the softmax's denominator."""
    keys, queries, row, starts = _by_query(p)
    return _call(
        p, partial(_forward, p), "fathom_attention_forward", (p.B, p.H, p.n, p.n), 2, products=2,
        inputs=(_starts(p, starts), _tile(p, queries), _tile(p, keys), _tile(p, keys)),
        outputs=(_tile(p, queries), _row(p, row)),
        shapes=(_heads(p, p.H), jax.ShapeDtypeStruct((p.B, p.H, 1, p.S), jnp.float32)),
        scratch=((1, p.block), (1, p.block), (p.D, p.block)), interpret=interpret, vmem=vmem,
    )  # fmt: skip


def backward_queries(p: Problem, *, interpret: bool = False, vmem: int = VMEM_BYTES) -> Callable[..., Any]:
    """(reach, starts, q, k, v, d_out, lse, delta) -> (dq,). delta (B,H,1,S) fp32: sum over D of out * d_out."""
    keys, queries, row, starts = _by_query(p)
    return _call(
        p, partial(_backward_queries, p), "fathom_attention_backward_queries", (p.B, p.H, p.n, p.n), 2, products=3,
        inputs=(
            _starts(p, starts), _tile(p, queries), _tile(p, keys), _tile(p, keys),
            _tile(p, queries), _row(p, row), _row(p, row),
        ),
        outputs=(_tile(p, queries),), shapes=(_heads(p, p.H),), scratch=((p.D, p.block),),
        interpret=interpret, vmem=vmem,
    )  # fmt: skip


def backward_keys(p: Problem, *, interpret: bool = False, vmem: int = VMEM_BYTES) -> Callable[..., Any]:
    """Same operands as `backward_queries` -> (dk, dv), summed over the H / G query heads that read a key head."""
    heads = p.H // p.G

    def block(b: Any, i: Any, j: Any, reach: Any) -> Any:
        return jnp.clip(i, j, reach[b, LAST, j])

    def queries(b: Any, g: Any, j: Any, h: Any, i: Any, reach: Any) -> tuple[Any, ...]:
        return b, g * heads + h, block(b, i, j, reach), 0

    def row(b: Any, g: Any, j: Any, h: Any, i: Any, reach: Any) -> tuple[Any, ...]:
        return b, g * heads + h, 0, block(b, i, j, reach)

    def starts(b: Any, g: Any, j: Any, h: Any, i: Any, reach: Any) -> tuple[Any, ...]:
        return b, 0, block(b, i, j, reach)

    def keys(b: Any, g: Any, j: Any, h: Any, i: Any, reach: Any) -> tuple[Any, ...]:
        return b, g, j, 0

    return _call(
        p, partial(_backward_keys, p), "fathom_attention_backward_keys", (p.B, p.G, p.n, heads, p.n), 3, products=4,
        inputs=(
            _starts(p, starts), _tile(p, queries), _tile(p, keys), _tile(p, keys),
            _tile(p, queries), _row(p, row), _row(p, row),
        ),
        outputs=(_tile(p, keys), _tile(p, keys)), shapes=(_heads(p, p.G), _heads(p, p.G)),
        scratch=((p.block, p.D), (p.block, p.D)), interpret=interpret, vmem=vmem,
    )  # fmt: skip


KERNELS = {"forward": forward, "backward_queries": backward_queries, "backward_keys": backward_keys}


def operands(p: Problem, kernel: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of what `kernel` takes."""
    row = jax.ShapeDtypeStruct((p.B, p.H, 1, p.S), jnp.float32)
    reach = jax.ShapeDtypeStruct((p.B, 3, p.n), jnp.int32)
    starts = jax.ShapeDtypeStruct((p.B, 1, p.S), jnp.int32)
    given = (reach, starts, _heads(p, p.H), _heads(p, p.G), _heads(p, p.G))
    return given if kernel == "forward" else (*given, _heads(p, p.H), row, row)


def _forward(
    p: Problem, reach: Any, starts: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, m: Any, total: Any, acc: Any
) -> None:
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @_when(j == 0)
    def _begin() -> None:
        m[...] = jnp.full(m.shape, NO_SCORE, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def add(masked: bool) -> None:
        scores = _scores(p, q, k, starts, i, j, masked)
        before = m[...]
        after = jnp.maximum(before, scores.max(axis=0, keepdims=True))
        weights, shrink = jnp.exp(scores - after), jnp.exp(before - after)
        m[...] = after
        total[...] = total[...] * shrink + weights.sum(axis=0, keepdims=True)
        acc[...] = acc[...] * shrink + _dot(p, v[0, 0], weights.astype(v.dtype), 0, 0)

    _where_seen(reach, b, i, j, add)

    @_when(j == p.n - 1)
    def _end() -> None:
        out[0, 0] = (acc[...] / total[...]).T.astype(out.dtype)
        lse[0, 0] = m[...] + jnp.log(total[...])


def _backward_queries(
    p: Problem, reach: Any, starts: Any, q: Any, k: Any, v: Any, d_out: Any, lse: Any, delta: Any, dq: Any, acc: Any
) -> None:
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @_when(j == 0)
    def _begin() -> None:
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def add(masked: bool) -> None:
        weights = jnp.exp(_scores(p, q, k, starts, i, j, masked) - lse[0, 0])
        d_scores = weights * (_dot(p, v[0, 0], d_out[0, 0], 1, 1) - delta[0, 0])
        acc[...] += _dot(p, k[0, 0], d_scores.astype(k.dtype), 0, 0)

    _where_seen(reach, b, i, j, add)

    @_when(j == p.n - 1)
    def _end() -> None:
        dq[0, 0] = (acc[...] * p.scale).T.astype(dq.dtype)


def _backward_keys(
    p: Problem,
    reach: Any,
    starts: Any,
    q: Any,
    k: Any,
    v: Any,
    d_out: Any,
    lse: Any,
    delta: Any,
    dk: Any,
    dv: Any,
    k_sum: Any,
    v_sum: Any,
) -> None:
    b, j, h, i = (pl.program_id(axis) for axis in (0, 2, 3, 4))

    @_when((h == 0) & (i == 0))
    def _begin() -> None:
        k_sum[...] = jnp.zeros(k_sum.shape, jnp.float32)
        v_sum[...] = jnp.zeros(v_sum.shape, jnp.float32)

    def add(masked: bool) -> None:
        weights = jnp.exp(_scores(p, q, k, starts, i, j, masked) - lse[0, 0])
        v_sum[...] += _dot(p, weights.astype(v.dtype), d_out[0, 0], 1, 0)
        d_scores = weights * (_dot(p, v[0, 0], d_out[0, 0], 1, 1) - delta[0, 0])
        k_sum[...] += _dot(p, d_scores.astype(q.dtype), q[0, 0], 1, 0)

    _where_seen(reach, b, i, j, add)

    @_when((h == p.H // p.G - 1) & (i == p.n - 1))
    def _end() -> None:
        dk[0, 0] = (k_sum[...] * p.scale).astype(dk.dtype)
        dv[0, 0] = v_sum[...].astype(dv.dtype)


def _scores(p: Problem, q: Any, k: Any, starts: Any, i: Any, j: Any, masked: bool) -> Any:
    """(keys, queries) fp32; a key that a query does not see has -inf."""
    scores = _dot(p, k[0, 0], q[0, 0], 1, 1) * p.scale
    if not masked:
        return scores
    key = j * p.block + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    query = i * p.block + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return jnp.where((key <= query) & (key >= starts[0]), scores, -jnp.inf)


def _where_seen(reach: Any, b: Any, i: Any, j: Any, add: Callable[[bool], None]) -> None:
    """Nothing for a block of which no query sees any key, and no mask for one of which every query sees every key."""
    seen = (j >= reach[b, FIRST, i]) & (j <= i)
    whole = (j >= reach[b, WHOLE, i]) & (j < i)
    _when(seen & ~whole)(partial(add, True))
    _when(seen & whole)(partial(add, False))


def _when(condition: Any) -> Callable[[Callable[[], None]], None]:
    run: Callable[[Callable[[], None]], None] = pl.when(condition)
    return run


def _dot(p: Problem, x: Any, y: Any, x_axis: int, y_axis: int) -> Any:
    """Sum over an axis of each, in fp32; fp32 operands are not rounded."""
    precision = lax.Precision.HIGHEST if p.dtype == "float32" else lax.Precision.DEFAULT
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def _by_query(p: Problem) -> tuple[Index, Index, Index, Index]:
    """Blocks of keys, queries, rows and starts for a grid (B, H, i, j): where nothing is seen, what is there stays."""

    def keys(b: Any, h: Any, i: Any, j: Any, reach: Any) -> tuple[Any, ...]:
        return b, h // (p.H // p.G), jnp.clip(j, reach[b, FIRST, i], i), 0

    def queries(b: Any, h: Any, i: Any, j: Any, reach: Any) -> tuple[Any, ...]:
        return b, h, i, 0

    def row(b: Any, h: Any, i: Any, j: Any, reach: Any) -> tuple[Any, ...]:
        return b, h, 0, i

    def starts(b: Any, h: Any, i: Any, j: Any, reach: Any) -> tuple[Any, ...]:
        return b, 0, i

    return keys, queries, row, starts


def _tile(p: Problem, index: Index) -> Any:
    return pl.BlockSpec((1, 1, p.block, p.D), index)


def _row(p: Problem, index: Index) -> Any:
    return pl.BlockSpec((1, 1, 1, p.block), index)


def _starts(p: Problem, index: Index) -> Any:
    return pl.BlockSpec((1, 1, p.block), index)


def _heads(p: Problem, heads: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((p.B, heads, p.S, p.D), jnp.dtype(p.dtype))


def _call(
    p: Problem, body: Callable[..., None], name: str, grid: tuple[int, ...], sums_over: int, *, products: int,
    inputs: Sequence[Any], outputs: Sequence[Any], shapes: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[tuple[int, ...]], interpret: bool, vmem: int,
) -> Callable[..., Any]:  # fmt: skip
    """sums_over: how many last dimensions of the grid add up into scratch. products: matrix products of a block."""
    pairs = p.B * p.H * p.S * p.S // 2  # as if every row were one document
    parallel = len(grid) - sums_over
    made: Callable[..., Any] = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=list(inputs), out_specs=list(outputs),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=list(shapes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * sums_over, vmem_limit_bytes=vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * p.D, transcendentals=pairs,
            bytes_accessed=p.B * p.S * p.D * (2 * p.H + 2 * p.G) * jnp.dtype(p.dtype).itemsize,
        ),
        name=name, interpret=interpret,
    )  # fmt: skip
    return made
