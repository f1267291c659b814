"""A split sequence, backward: the state gradient each split makes on its own, and the one that leaves each split.

The mirror image of `split`. `bwd_fwd` with `splits` > 1 comes before (it makes dY), `bwd_bwd` after; the grid of all
but the combining pass is (H, B, splits).
"""
# B sequences  S tokens  H heads  G groups  R rank  N state  P head width  A rotary angles
# C tokens of a chunk  F = C*R rows of a chunk, token-major
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

from libs.kernels.mimo.sm90.bwd_common import CARRY, THROUGH, Shapes, declared, fwd_inputs, rotation_macros, weight_rows
from libs.kernels.mimo.sm90.spec import ScanSpec

COMBINED_ROWS = 16  # of N, per thread block of the combining pass


def states_shapes(spec: ScanSpec) -> tuple[Shapes, Shapes]:
    """What `bwd_states` reads and writes."""
    fwd = fwd_inputs(spec)
    given = {name: fwd[name] for name in ("q", "cos", "sin", "q_bias", "small")}
    given["dy"] = (True, (spec.B, spec.S * spec.R, spec.H, spec.P))
    return given, {"local": fwd["init"], "through": (False, (spec.B, spec.H, spec.splits))}


def combine_shapes(spec: ScanSpec) -> tuple[Shapes, Shapes]:
    """What `bwd_combine` reads and writes."""
    given = states_shapes(spec)[1] | {"d_end": (False, (spec.B, spec.H, spec.N, spec.P))}
    return given, {"d_last": given["local"]}


def bwd_states(T: Any, spec: ScanSpec) -> Any:
    """Pass 1: local (B,H,splits,N,P), gradient of the state that enters a split when none comes from behind, and
    through (B,H,splits), the factor with which one from behind passes (0 where a document starts inside)."""
    _, _, H, G, R, N, P, C = spec.checked()[:8]
    F, A, splits, rows = spec.F, spec.A, spec.splits, weight_rows(spec)
    per, heads_per_group = spec.chunks // splits, H // G
    rotate = rotation_macros(T, spec)[0]
    given, made = states_shapes(spec)

    @declared(T, given | made)
    def main(
        q: Any, cos: Any, sin: Any, q_bias: Any, small: Any, dy: Any, local: Any, through: Any,
    ) -> None:  # fmt: skip
        with T.Kernel(H, spec.B, splits, threads=spec.threads) as (bh, bb, bs):
            q_sh, qr_sh = T.alloc_shared((F, N), T.bf16), T.alloc_shared((F, N), T.bf16)
            cos_sh, sin_sh = T.alloc_shared((C, A), T.f32), T.alloc_shared((C, A), T.f32)
            dy_sh, dys_sh = T.alloc_shared((F, P), T.bf16), T.alloc_shared((F, P), T.bf16)
            w_sh = T.alloc_shared((rows * C,), T.f32)
            qb_sh = T.alloc_shared((R, N), T.f32)
            g = T.alloc_fragment((N, P), T.f32)
            passed = T.alloc_fragment((1,), T.f32)
            T.occupancy(spec.min_blocks)
            T.copy(q_bias[bh, 0:R, 0:N], qb_sh)
            T.clear(g)
            T.fill(passed, T.number(1.0))
            for step in T.Pipelined(per, num_stages=T.stages(spec.stages)):
                chunk = bs * per + (per - 1 - step)
                t0 = chunk * C
                T.load(q[bb, t0 * R : t0 * R + F, bh // heads_per_group, 0:N], q_sh)
                T.load(cos[bb, t0 : t0 + C, bh, 0:A], cos_sh)
                T.load(sin[bb, t0 : t0 + C, bh, 0:A], sin_sh)
                T.load(dy[bb, t0 * R : t0 * R + F, bh, 0:P], dy_sh)
                T.load(small[bb, bh, chunk, 0 : rows * C], w_sh)
                rotate(q_sh, qb_sh, cos_sh, sin_sh, qr_sh)
                for i, p in T.Parallel(F, P):
                    dys_sh[i, p] = T.round_bf16(dy_sh[i, p] * w_sh[CARRY * C + i // R])
                for n, p in T.Parallel(N, P):
                    g[n, p] = g[n, p] * w_sh[THROUGH * C]
                T.gemm(qr_sh, dys_sh, g, transpose_A=True)
                for i in T.Parallel(1):
                    passed[i] = passed[i] * w_sh[THROUGH * C]
            T.copy(g, local[bb, bh, bs, 0:N, 0:P])
            T.copy(passed, through[bb, bh, bs : bs + 1])

    return main


def bwd_combine(T: Any, spec: ScanSpec) -> Any:
    """Pass 2: d_last (B,H,splits,N,P), the gradient of the state that leaves each split, from the last to the first."""
    _, _, H, _, _, N, P, _ = spec[:8]
    splits, rows = spec.splits, min(N, COMBINED_ROWS)
    assert N % rows == 0, f"N = {N} is not a multiple of {rows}"
    given, made = combine_shapes(spec)

    @declared(T, given | made)
    def main(local: Any, through: Any, d_end: Any, d_last: Any) -> None:
        with T.Kernel(H, spec.B, N // rows, threads=128) as (bh, bb, bn):
            g = T.alloc_fragment((rows, P), T.f32)
            T.copy(d_end[bb, bh, bn * rows : bn * rows + rows, 0:P], g)
            for step in T.serial(splits):
                s = splits - 1 - step
                T.copy(g, d_last[bb, bh, s, bn * rows : bn * rows + rows, 0:P])
                for n, p in T.Parallel(rows, P):
                    g[n, p] = g[n, p] * through[bb, bh, s] + local[bb, bh, s, bn * rows + n, p]

    return main
