"""First backward kernel: walks the chunks in the order of time, recomputes states and outputs, and takes every
gradient that needs the outputs or only looks back: through norm, gate and MIMO_Out to dY, and from there to q.

It leaves dY and the state entering each chunk in memory for `bwd_bwd`. Algebra: README.md, "Backward, derived".
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
    declared,
    fwd_inputs,
    fwd_outputs,
    rotation_macros,
    weight_macros,
    weight_rows,
)
from libs.kernels.mimo.sm90.spec import ScanSpec


def silu_slope(T: Any, x: Any) -> Any:
    """Derivative of x * sigmoid(x)."""
    one = T.number(1.0)
    denominator = one + T.exp(-x)
    sigmoid = one / denominator if T.cpu else T.fast_rcp(denominator)
    return sigmoid * (one + x * (one - sigmoid))


def bwd_fwd(T: Any, spec: ScanSpec) -> Any:
    """The kernel for one shape; grid (H, B, splits). Its outputs, in parameter order from `dy` on:

    dy (B,S*R,H,P) gradient of Y; states (B,H,chunks,N,P) entering each chunk; dq (B,S*R,H,N) per head, before
    rotation and bias; dz (B,S,H,P); turn (B,S,H,A) the queries' part of the angle gradient; row (B,H,S*R) row sums
    of dY * Y without skip: what the running log decay of the *receiving* token gets; and per split (B,H,splits,R,P)
    d_zeta; mix, the sum over tokens of unit * gate * d_out, of which d_phi and d_norm are linear; skip, that of
    dY * X.
    """
    B, _, H, G, R, N, P, C = spec.checked()[:8]
    F, A, splits, threads, stages = spec.F, spec.A, spec.splits, spec.threads, spec.stages
    per, heads_per_group, rows = spec.chunks // splits, H // G, weight_rows(spec)
    has_z, has_out, has_d, has_norm, reads_x = spec.z, spec.out, spec.d, spec.norm, spec.reads_x
    eps = spec.norm_eps
    decay = weight_macros(T, spec)
    rotate, turn_sum, unrotate = rotation_macros(T, spec)
    operand = T.alloc_fragment if threads == 128 and F % 64 == 0 else T.alloc_shared  # wgmma A from registers
    out_rows, out_step = (C, 1) if has_out else (F, R)

    def out_row(i: Any) -> Any:
        """Row of d_out that belongs to row i of Y."""
        return i // R if has_out else i

    def upstream(o_sh: Any, phi_sh: Any, norm_sh: Any, i: Any, p: Any) -> Any:
        """Gradient of the gated, not yet weighted unit: d_out through MIMO_Out and the norm's weight."""
        value = o_sh[out_row(i), p]
        value = value * phi_sh[i % R, p] if has_out else value
        return value * norm_sh[p] if has_norm else value

    @declared(T, fwd_inputs(spec) | fwd_outputs(spec))
    def main(
        q: Any, k: Any, v: Any, z: Any, x: Any, cos: Any, sin: Any, q_bias: Any, k_bias: Any, psi: Any, zeta: Any,
        phi: Any, d: Any, norm_w: Any, small: Any, init: Any, d_out: Any, dy: Any, states: Any, dq: Any, dz: Any,
        turn: Any, row: Any, d_zeta: Any, mix: Any, skip: Any,
    ) -> None:  # fmt: skip
        with T.Kernel(H, B, splits, threads=threads) as (bh, bb, bs):
            q_sh, k_sh = T.alloc_shared((F, N), T.bf16), T.alloc_shared((F, N), T.bf16)
            cos_sh, sin_sh = T.alloc_shared((C, A), T.f32), T.alloc_shared((C, A), T.f32)
            v_sh = T.alloc_shared((C, P), T.bf16)
            z_sh = T.alloc_shared((C, P), T.bf16)
            o_sh = T.alloc_shared((out_rows, P), T.bf16)
            w_sh = T.alloc_shared((rows * C,), T.f32)
            qr_sh, kr_sh = T.alloc_shared((F, N), T.bf16), T.alloc_shared((F, N), T.bf16)
            x_sh, dy_sh = T.alloc_shared((F, P), T.bf16), T.alloc_shared((F, P), T.bf16)
            h_sh = T.alloc_shared((N, P), T.bf16)
            e_sh = T.alloc_shared((C, C), T.f32)
            # Two tiles (F, P) side by side, the gradient of z * zeta and `mix`; later one (F, N), that of q.
            wide_sh = T.alloc_shared((F, max(N, 2 * P)), T.f32)
            qb_sh, kb_sh = T.alloc_shared((R, N), T.f32), T.alloc_shared((R, N), T.f32)
            psi_sh, zeta_sh = T.alloc_shared((R, P), T.f32), T.alloc_shared((R, P), T.f32)
            phi_sh, norm_sh = T.alloc_shared((R, P), T.f32), T.alloc_shared((P,), T.f32)
            h = T.alloc_fragment((N, P), T.f32)
            s = T.alloc_fragment((F, F), T.f32)
            s_b, ds_b = operand((F, F), T.bf16), operand((F, F), T.bf16)
            y, g = T.alloc_fragment((F, P), T.f32), T.alloc_fragment((F, P), T.f32)
            unit, product = T.alloc_fragment((F, P), T.f32), T.alloc_fragment((F, P), T.f32)
            inverse, along = T.alloc_fragment((F,), T.f32), T.alloc_fragment((F,), T.f32)
            row_f = T.alloc_fragment((F,), T.f32)
            dq_f = T.alloc_fragment((F, N), T.f32)
            dz_f = T.alloc_fragment((C, P), T.f32)
            turn_f = T.alloc_fragment((C, A), T.f32)
            zeta_f, mix_f = T.alloc_fragment((R, P), T.f32), T.alloc_fragment((R, P), T.f32)
            skip_f = T.alloc_fragment((R, P), T.f32)

            T.occupancy(spec.min_blocks)
            T.copy(q_bias[bh, 0:R, 0:N], qb_sh)
            T.copy(k_bias[bh, 0:R, 0:N], kb_sh)
            if not reads_x:  # a tile nobody reads would be laid over another one
                T.copy(psi[bh, 0:R, 0:P], psi_sh)
            if has_z:
                T.copy(zeta[bh, 0:R, 0:P], zeta_sh)
            if has_out:
                T.copy(phi[bh, 0:R, 0:P], phi_sh)
            if has_norm:
                T.copy(norm_w[bh, 0:P], norm_sh)
            T.clear(zeta_f)
            T.clear(mix_f)
            T.clear(skip_f)
            T.copy(init[bb, bh, bs, 0:N, 0:P], h)

            for c in T.Pipelined(per, num_stages=T.stages(stages)):
                chunk = bs * per + c
                t0 = chunk * C
                T.load(q[bb, t0 * R : t0 * R + F, bh // heads_per_group, 0:N], q_sh)
                T.load(k[bb, t0 * R : t0 * R + F, bh // heads_per_group, 0:N], k_sh)
                T.load(cos[bb, t0 : t0 + C, bh, 0:A], cos_sh)
                T.load(sin[bb, t0 : t0 + C, bh, 0:A], sin_sh)
                if reads_x:
                    T.load(x[bb, bh, t0 * R : t0 * R + F, 0:P], x_sh)
                else:
                    T.load(v[bb, t0 : t0 + C, bh, 0:P], v_sh)
                if has_z:
                    T.load(z[bb, t0 : t0 + C, bh, 0:P], z_sh)
                T.load(d_out[bb, t0 * out_step : t0 * out_step + out_rows, bh, 0:P], o_sh)
                T.load(small[bb, bh, chunk, 0 : rows * C], w_sh)
                T.copy(h, h_sh)  # inside the loop: before it, 0.1.15 emits wrong code under warp specialization
                T.copy(h_sh, states[bb, bh, chunk, 0:N, 0:P])

                rotate(q_sh, qb_sh, cos_sh, sin_sh, qr_sh)
                rotate(k_sh, kb_sh, cos_sh, sin_sh, kr_sh)
                if not reads_x:
                    for i, p in T.Parallel(F, P):
                        x_sh[i, p] = T.round_bf16(v_sh[i // R, p] * psi_sh[i % R, p])
                decay(w_sh, e_sh)
                for t, u in T.Parallel(C, C):
                    e_sh[t, u] = e_sh[t, u] * T.if_then_else(u == t, w_sh[GAMMA * C + u], w_sh[LATER * C + u])

                # Y without skip: the pairs inside the chunk, on top of what the entering state gives.
                T.gemm(qr_sh, kr_sh, s, transpose_B=True, clear_accum=True)
                for i, j in T.Parallel(F, F):
                    s[i, j] = s[i, j] * e_sh[i // R, j // R]
                T.copy(s, s_b)
                T.gemm(qr_sh, h_sh, y, clear_accum=True)
                for i, p in T.Parallel(F, P):
                    y[i, p] = y[i, p] * w_sh[CARRY * C + i // R]
                T.gemm(s_b, x_sh, y)

                # Backward through MIMO_Out, gate and norm. unit: Y with skip, normalised if the norm is on.
                for i, p in T.Parallel(F, P):
                    unit[i, p] = y[i, p] + d[bh] * x_sh[i, p] if has_d else y[i, p]
                if has_norm:
                    for i, p in T.Parallel(F, P):
                        g[i, p] = unit[i, p] * unit[i, p]
                    T.reduce_sum(g, inverse, dim=1)
                    for i in T.Parallel(F):
                        inverse[i] = T.rsqrt(inverse[i] / T.number(float(P)) + T.number(eps))
                    for i, p in T.Parallel(F, P):
                        unit[i, p] = unit[i, p] * inverse[i]
                if has_z:
                    for i, p in T.Parallel(F, P):
                        wide_sh[i, p] = (
                            unit[i, p]
                            * upstream(o_sh, phi_sh, norm_sh, i, p)
                            * silu_slope(T, z_sh[i // R, p] * zeta_sh[i % R, p])
                        )
                        wide_sh[i, P + p] = (
                            unit[i, p] * o_sh[out_row(i), p] * T.silu(z_sh[i // R, p] * zeta_sh[i % R, p])
                        )
                        g[i, p] = upstream(o_sh, phi_sh, norm_sh, i, p) * T.silu(z_sh[i // R, p] * zeta_sh[i % R, p])
                else:
                    for i, p in T.Parallel(F, P):
                        wide_sh[i, P + p] = unit[i, p] * o_sh[out_row(i), p]
                        g[i, p] = upstream(o_sh, phi_sh, norm_sh, i, p)
                if has_norm:
                    for i, p in T.Parallel(F, P):
                        product[i, p] = g[i, p] * unit[i, p]
                    T.reduce_sum(product, along, dim=1)
                    for i, p in T.Parallel(F, P):
                        g[i, p] = (g[i, p] - unit[i, p] * along[i] / T.number(float(P))) * inverse[i]
                T.copy(g, dy_sh)
                for i, p in T.Parallel(F, P):
                    y[i, p] = y[i, p] * g[i, p]
                T.reduce_sum(y, row_f, dim=1)
                T.copy(row_f, row[bb, bh, t0 * R : t0 * R + F])
                T.copy(dy_sh, dy[bb, t0 * R : t0 * R + F, bh, 0:P])

                # Sums over ranks and over tokens.
                if has_z:
                    T.clear(dz_f)
                    for r in T.unroll(R):
                        for t, p in T.Parallel(C, P):
                            dz_f[t, p] += wide_sh[t * R + r, p] * zeta_sh[r, p]
                    T.copy(dz_f, dz[bb, t0 : t0 + C, bh, 0:P])
                    for t in T.serial(C):
                        for r, p in T.Parallel(R, P):
                            zeta_f[r, p] += wide_sh[t * R + r, p] * z_sh[t, p]
                for t in T.serial(C):
                    for r, p in T.Parallel(R, P):
                        mix_f[r, p] += wide_sh[t * R + r, P + p]
                if has_d:
                    for t in T.serial(C):
                        for r, p in T.Parallel(R, P):
                            skip_f[r, p] += T.wide(dy_sh[t * R + r, p]) * x_sh[t * R + r, p]

                # The queries: what reaches them over the entering state and over the pairs.
                T.gemm(dy_sh, x_sh, s, transpose_B=True, clear_accum=True)
                for i, j in T.Parallel(F, F):
                    s[i, j] = s[i, j] * e_sh[i // R, j // R]
                T.copy(s, ds_b)
                T.gemm(dy_sh, h_sh, dq_f, transpose_B=True, clear_accum=True)
                for i, n in T.Parallel(F, N):
                    dq_f[i, n] = dq_f[i, n] * w_sh[CARRY * C + i // R]
                T.gemm(ds_b, kr_sh, dq_f)
                for i, n in T.Parallel(F, N):
                    wide_sh[i, n] = dq_f[i, n]
                turn_sum(wide_sh, qr_sh, turn_f)
                T.copy(turn_f, turn[bb, t0 : t0 + C, bh, 0:A])
                unrotate(wide_sh, cos_sh, sin_sh, qr_sh)  # qr_sh has no more readers
                T.copy(qr_sh, dq[bb, t0 * R : t0 * R + F, bh, 0:N])

                # The state at the end of the chunk. dy_sh has no more readers: it takes the weighted values.
                for i, p in T.Parallel(F, P):
                    dy_sh[i, p] = T.round_bf16(x_sh[i, p] * w_sh[ENTRY * C + i // R])
                for n, p in T.Parallel(N, P):
                    h[n, p] = h[n, p] * w_sh[THROUGH * C]
                T.gemm(kr_sh, dy_sh, h, transpose_A=True)

            T.copy(zeta_f, d_zeta[bb, bh, bs, 0:R, 0:P])
            T.copy(mix_f, mix[bb, bh, bs, 0:R, 0:P])
            T.copy(skip_f, skip[bb, bh, bs, 0:R, 0:P])

    return main
