"""Second backward kernel: the reverse sweep over the chunks. It carries the gradient of the state backwards and takes
everything that looks ahead: keys, values, their weights, and the state that the group of chunks was entered with.

It reads dY and the chunks' entering states from `bwd_fwd`. Algebra: README.md, "Backward, derived"; all score tiles
are transposed here (row = key), so that every sum over later tokens is a sum along a row.
"""
# B sequences  S tokens  H heads  G groups  R rank  N state  P head width  A rotary angles
# C tokens of a chunk  F = C*R rows of a chunk, token-major
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

from libs.kernels.mimo.sm90.bwd_common import (
    CARRY,
    ENTRY,
    GAMMA,
    LATER,
    THROUGH,
    bwd_inputs,
    bwd_outputs,
    declared,
    rotation_macros,
    weight_macros,
    weight_rows,
)
from libs.kernels.mimo.sm90.spec import ScanSpec


def bwd_bwd(T: Any, spec: ScanSpec) -> Any:
    """The kernel for one shape; grid (H, B, splits). Its outputs, in parameter order from `dk` on:

    dk (B,S*R,H,N) per head, before rotation and bias; dv (B,S,H,P); turn (B,S,H,A) the keys' part of the angle
    gradient; d_later, d_gamma, d_entry (B,H,S*R): per key row, the sums of dW exp(s_t - s_s) over later tokens and
    over its own, and the gradient of the weight with which it enters the state; d_through (B,H,chunks,N) summed over
    P; spin (B,H,chunks,N), per row n of the entering state the sum over P of its gradient times the row that n is
    rotated with; d_psi (B,H,splits,R,P) per split; d_first (B,H,splits,N,P) gradient of the state entering the split.

    `d_last` (B,H,splits,N,P) is the gradient of the state that leaves each split.
    """
    B, _, H, G, R, N, P, C = spec.checked()[:8]
    F, A, splits, threads, stages = spec.F, spec.A, spec.splits, spec.threads, spec.stages
    per, heads_per_group, rows = spec.chunks // splits, H // G, weight_rows(spec)
    has_d, reads_x = spec.d, spec.reads_x
    decay = weight_macros(T, spec)
    rotate, turn_sum, unrotate = rotation_macros(T, spec)
    operand = T.alloc_fragment if threads == 128 and F % 64 == 0 else T.alloc_shared  # wgmma A from registers

    @declared(T, bwd_inputs(spec) | bwd_outputs(spec))
    def main(
        q: Any, k: Any, v: Any, x: Any, cos: Any, sin: Any, q_bias: Any, k_bias: Any, psi: Any, d: Any, small: Any,
        dy: Any, states: Any, d_last: Any, dk: Any, dv: Any, turn: Any, d_later: Any, d_gamma: Any, d_entry: Any,
        d_through: Any, spin: Any, d_psi: Any, d_first: Any,
    ) -> None:  # fmt: skip
        with T.Kernel(H, B, splits, threads=threads) as (bh, bb, bs):
            q_sh, k_sh = T.alloc_shared((F, N), T.bf16), T.alloc_shared((F, N), T.bf16)
            cos_sh, sin_sh = T.alloc_shared((C, A), T.f32), T.alloc_shared((C, A), T.f32)
            v_sh = T.alloc_shared((C, P), T.bf16)
            dy_sh = T.alloc_shared((F, P), T.bf16)
            h_sh, g_sh = T.alloc_shared((N, P), T.bf16), T.alloc_shared((N, P), T.bf16)
            w_sh = T.alloc_shared((rows * C,), T.f32)
            qr_sh, kr_sh = T.alloc_shared((F, N), T.bf16), T.alloc_shared((F, N), T.bf16)
            x_sh = T.alloc_shared((F, P), T.bf16)
            # Decayed dY takes the place of x, unless x is the target of a load.
            dys_sh = T.alloc_shared((F, P), T.bf16) if reads_x else x_sh
            e_sh = T.alloc_shared((C, C), T.f32)
            wide_sh = T.alloc_shared((F, max(N, P)), T.f32)  # gradient of x, then that of the rotated key
            qb_sh, kb_sh = T.alloc_shared((R, N), T.f32), T.alloc_shared((R, N), T.f32)
            psi_sh = T.alloc_shared((R, P), T.f32)
            g = T.alloc_fragment((N, P), T.f32)
            gh = T.alloc_fragment((N, P), T.f32)
            st, da = T.alloc_fragment((F, F), T.f32), T.alloc_fragment((F, F), T.f32)
            pair = T.alloc_fragment((F, F), T.f32)
            a_b, ds_b = operand((F, F), T.bf16), operand((F, F), T.bf16)
            dx_f, xdx = T.alloc_fragment((F, P), T.f32), T.alloc_fragment((F, P), T.f32)
            dk_f = T.alloc_fragment((F, N), T.f32)
            later_f, gamma_f = T.alloc_fragment((F,), T.f32), T.alloc_fragment((F,), T.f32)
            entry_f, through_f = T.alloc_fragment((F,), T.f32), T.alloc_fragment((N,), T.f32)
            dv_f = T.alloc_fragment((C, P), T.f32)
            turn_f = T.alloc_fragment((C, A), T.f32)
            psi_f = T.alloc_fragment((R, P), T.f32)

            T.occupancy(spec.min_blocks)
            T.copy(q_bias[bh, 0:R, 0:N], qb_sh)
            T.copy(k_bias[bh, 0:R, 0:N], kb_sh)
            T.copy(psi[bh, 0:R, 0:P], psi_sh)
            T.clear(psi_f)
            T.copy(d_last[bb, bh, bs, 0:N, 0:P], g)

            for step in T.Pipelined(per, num_stages=T.stages(stages)):
                chunk = bs * per + (per - 1 - step)
                t0 = chunk * C
                T.load(q[bb, t0 * R : t0 * R + F, bh // heads_per_group, 0:N], q_sh)
                T.load(k[bb, t0 * R : t0 * R + F, bh // heads_per_group, 0:N], k_sh)
                T.load(cos[bb, t0 : t0 + C, bh, 0:A], cos_sh)
                T.load(sin[bb, t0 : t0 + C, bh, 0:A], sin_sh)
                T.load(v[bb, t0 : t0 + C, bh, 0:P], v_sh)
                if reads_x:
                    T.load(x[bb, bh, t0 * R : t0 * R + F, 0:P], x_sh)
                T.load(dy[bb, t0 * R : t0 * R + F, bh, 0:P], dy_sh)
                T.load(states[bb, bh, chunk, 0:N, 0:P], h_sh)
                T.load(small[bb, bh, chunk, 0 : rows * C], w_sh)
                T.copy(g, g_sh)

                rotate(q_sh, qb_sh, cos_sh, sin_sh, qr_sh)
                rotate(k_sh, kb_sh, cos_sh, sin_sh, kr_sh)
                if not reads_x:
                    for i, p in T.Parallel(F, P):
                        x_sh[i, p] = T.round_bf16(v_sh[i // R, p] * psi_sh[i % R, p])
                decay(w_sh, e_sh)

                # The decay across the chunk.
                for n, p in T.Parallel(N, P):
                    gh[n, p] = g[n, p] * h_sh[n, p]
                T.reduce_sum(gh, through_f, dim=1)
                T.copy(through_f, d_through[bb, bh, chunk, 0:N])

                # Pairs inside the chunk, row j = key, column i = query.
                T.gemm(kr_sh, qr_sh, st, transpose_B=True, clear_accum=True)
                T.gemm(x_sh, dy_sh, da, transpose_B=True, clear_accum=True)
                for j, i in T.Parallel(F, F):
                    pair[j, i] = T.if_then_else(j // R == i // R, st[j, i] * da[j, i], T.zero())
                T.reduce_sum(pair, gamma_f, dim=1)
                T.copy(gamma_f, d_gamma[bb, bh, t0 * R : t0 * R + F])
                for j, i in T.Parallel(F, F):
                    pair[j, i] = T.if_then_else(j // R == i // R, T.zero(), st[j, i] * da[j, i] * e_sh[i // R, j // R])
                T.reduce_sum(pair, later_f, dim=1)
                T.copy(later_f, d_later[bb, bh, t0 * R : t0 * R + F])
                for j, i in T.Parallel(F, F):
                    da[j, i] = da[j, i] * (
                        e_sh[i // R, j // R]
                        * T.if_then_else(j // R == i // R, w_sh[GAMMA * C + j // R], w_sh[LATER * C + j // R])
                    )
                    st[j, i] = st[j, i] * (
                        e_sh[i // R, j // R]
                        * T.if_then_else(j // R == i // R, w_sh[GAMMA * C + j // R], w_sh[LATER * C + j // R])
                    )
                T.copy(da, ds_b)
                T.copy(st, a_b)

                # Values over the state at the chunk's end, and the weights with which keys enter it.
                T.gemm(kr_sh, g_sh, dx_f, clear_accum=True)
                for i, p in T.Parallel(F, P):
                    xdx[i, p] = dx_f[i, p] * x_sh[i, p]
                    dx_f[i, p] = dx_f[i, p] * w_sh[ENTRY * C + i // R]
                T.reduce_sum(xdx, entry_f, dim=1)
                T.copy(entry_f, d_entry[bb, bh, t0 * R : t0 * R + F])
                T.gemm(a_b, dy_sh, dx_f)
                if has_d:
                    for i, p in T.Parallel(F, P):
                        dx_f[i, p] += d[bh] * dy_sh[i, p]
                for i, p in T.Parallel(F, P):
                    wide_sh[i, p] = dx_f[i, p]
                T.clear(dv_f)
                for r in T.unroll(R):
                    for t, p in T.Parallel(C, P):
                        dv_f[t, p] += wide_sh[t * R + r, p] * psi_sh[r, p]
                T.copy(dv_f, dv[bb, t0 : t0 + C, bh, 0:P])
                for t in T.serial(C):
                    for r, p in T.Parallel(R, P):
                        psi_f[r, p] += wide_sh[t * R + r, p] * v_sh[t, p]

                # Keys.
                T.gemm(x_sh, g_sh, dk_f, transpose_B=True, clear_accum=True)
                for i, n in T.Parallel(F, N):
                    dk_f[i, n] = dk_f[i, n] * w_sh[ENTRY * C + i // R]
                T.gemm(ds_b, qr_sh, dk_f)
                for i, n in T.Parallel(F, N):
                    wide_sh[i, n] = dk_f[i, n]
                turn_sum(wide_sh, kr_sh, turn_f)
                T.copy(turn_f, turn[bb, t0 : t0 + C, bh, 0:A])
                unrotate(wide_sh, cos_sh, sin_sh, kr_sh)  # kr_sh has no more readers
                T.copy(kr_sh, dk[bb, t0 * R : t0 * R + F, bh, 0:N])

                # The state entering this chunk.
                for i, p in T.Parallel(F, P):
                    dys_sh[i, p] = T.round_bf16(dy_sh[i, p] * w_sh[CARRY * C + i // R])
                for n, p in T.Parallel(N, P):
                    g[n, p] = g[n, p] * w_sh[THROUGH * C]
                T.gemm(qr_sh, dys_sh, g, transpose_A=True)
                for n, p in T.Parallel(N, P):
                    gh[n, p] = g[n, p] * h_sh[(n + N // 2) % N, p]
                T.reduce_sum(gh, through_f, dim=1)
                T.copy(through_f, spin[bb, bh, chunk, 0:N])

            T.copy(psi_f, d_psi[bb, bh, bs, 0:R, 0:P])
            T.copy(g, d_first[bb, bh, bs, 0:N, 0:P])

    return main
