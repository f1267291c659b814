"""The forward scan kernel: one thread block per head, sequence and split walks its chunks with the state in registers.

Algebra: README.md of `libs.kernels.mimo`. The passes that feed a split its first state: `split.py`.
"""
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"
# B sequences  S tokens  H heads  G groups  R rank  N state  P head width  A rotary angles
# C tokens of a chunk  F = C*R rows, token-major  bb, bh, bs block indices: sequence, head, split

# No `from __future__ import annotations`: as strings, parameter types would see only names that the body uses too.

from typing import Any

from libs.kernels.mimo.sm90.parts import entering_values, pair_weights, project_pair, spread_values, token_weights
from libs.kernels.mimo.sm90.spec import ScanSpec

PAD = 4  # fp32 words between rows: rows that one warp writes start in different banks, and stay 16-byte aligned


def make_forward(T: Any, spec: ScanSpec) -> Any:
    """`out` and the last state from the arguments of `ScanArguments`, `init` (B,H,splits,N,P): the state that
    enters each split, and `x_BHLP` (B,H,S*R,P) PsiV, read or written as `spec.psiv` says.

    Writes out (B,S,H,P), or (B,S*R,H,P) without MIMO_Out, and last (B,H,N,P) from the last split.
    """
    B, S, H, G, R, N, P, C, A, F = *spec[:8], spec.A, spec.F
    hpg, per, splits = H // G, spec.per_split, spec.splits
    inverse_P, eps = 1.0 / P, spec.norm_eps
    weights, pairs = token_weights(T, spec), pair_weights(T, spec)
    project, spread, entering = project_pair(T, spec), spread_values(T, spec), entering_values(T, spec)
    assert not (spec.share_x and spec.psiv == "read"), "a tile that TMA fills must not be written"
    zs, zw = ((B, S, H, P), (H, R, P)) if spec.z else ((1, 1, 1, 1), (1, 1, 1))
    os_, ow = ((B, S, H, P), (H, R, P)) if spec.out else ((B, S * R, H, P), (1, 1, 1))
    xs = (1, 1, 1, 1) if spec.psiv == "compute" else (B, H, S * R, P)
    ds, ns = (H,) if spec.d else (1,), (H, P) if spec.norm else (1, 1)
    docs = (S,) if spec.packed else (1,)

    @T.macro
    def normalise(y):
        square = T.alloc_fragment((F, P), T.f32)
        rms = T.alloc_fragment((F,), T.f32)
        for i, p in T.Parallel(F, P):
            square[i, p] = y[i, p] * y[i, p]
        T.reduce_sum(square, rms, dim=1)
        for i in T.Parallel(F):
            rms[i] = T.rsqrt(rms[i] * T.number(inverse_P) + T.number(eps))
        for i, p in T.Parallel(F, P):
            y[i, p] = y[i, p] * rms[i]

    @T.macro
    def finish(y_sh, z_sh, zeta_sh, phi_sh, norm_sh, out, bb, bh, c0):
        if spec.out:
            o = T.alloc_fragment((C, P), T.f32)
            for t, p in T.Parallel(C, P):
                o[t, p] = T.zero()
            for r in T.unroll(R):
                for t, p in T.Parallel(C, P):
                    if spec.z:
                        gate = T.silu(T.wide(z_sh[t, p]) * zeta_sh[r, p])
                        o[t, p] += T.wide(y_sh[t * R + r, p]) * phi_sh[r, p] * gate
                    else:
                        o[t, p] += T.wide(y_sh[t * R + r, p]) * phi_sh[r, p]
            for t, p in T.Parallel(C, P):
                if spec.norm:
                    out[bb, c0 + t, bh, p] = o[t, p] * norm_sh[p]
                else:
                    out[bb, c0 + t, bh, p] = o[t, p]
        else:
            for i, p in T.Parallel(F, P):
                gate = T.silu(T.wide(z_sh[i // R, p]) * zeta_sh[i % R, p]) if spec.z else T.number(1.0)
                scale = norm_sh[p] if spec.norm else T.number(1.0)
                out[bb, c0 * R + i, bh, p] = T.wide(y_sh[i, p]) * gate * scale

    @T.prim_func
    def main(
        q: T.Tensor((B, S * R, G, N), T.bf16), k: T.Tensor((B, S * R, G, N), T.bf16),
        v: T.Tensor((B, S, H, P), T.bf16), z: T.Tensor(zs, T.bf16),
        psi: T.Tensor((H, R, P), T.f32), zeta: T.Tensor(zw, T.f32), phi: T.Tensor(ow, T.f32),
        q_bias: T.Tensor((H, R, N), T.f32), k_bias: T.Tensor((H, R, N), T.f32),
        d: T.Tensor(ds, T.f32), norm: T.Tensor(ns, T.f32),
        log_decay: T.Tensor((B, H, S), T.f32), gamma: T.Tensor((B, H, S), T.f32), later: T.Tensor((B, H, S), T.f32),
        theta: T.Tensor((B, S, H, A), T.f32), doc: T.Tensor(docs, T.i32), before: T.Tensor(docs, T.i32),
        init: T.Tensor((B, H, splits, N, P), T.f32), x: T.Tensor(xs, T.bf16),
        out: T.Tensor(os_, T.bf16), last: T.Tensor((B, H, N, P), T.f32),
    ):  # fmt: skip
        with T.Kernel(H, B, splits, threads=128) as (bh, bb, bs):
            # Filled by the loop's loads
            q_raw = T.alloc_shared((F, N), T.bf16)
            k_raw = T.alloc_shared((F, N), T.bf16)
            v_sh = T.alloc_shared((C, P), T.bf16)
            z_sh = T.alloc_shared((C, P), T.bf16)
            theta_sh = T.alloc_shared((C, A), T.f32)
            log_sh = T.alloc_shared((C,), T.f32)
            gamma_sh = T.alloc_shared((C,), T.f32)
            later_sh = T.alloc_shared((C,), T.f32)
            doc_sh = T.alloc_shared((C,), T.i32)
            before_sh = T.alloc_shared((C,), T.i32)
            # Made from them
            q_sh = T.alloc_shared((F, N), T.bf16)
            k_sh = T.alloc_shared((F, N), T.bf16)
            x_sh = T.alloc_shared((F, P), T.bf16)
            xu_sh = x_sh if spec.share_x else T.alloc_shared((F, P), T.bf16)
            h_sh = T.alloc_shared((N, P), T.bf16)
            y_sh = x_sh if spec.share_x else T.alloc_shared((F, P + PAD), T.f32)
            cos_sh = T.alloc_shared((C, A), T.f32)
            sin_sh = T.alloc_shared((C, A), T.f32)
            pair_sh = T.alloc_shared((C, C), T.f32)
            carry_sh = T.alloc_shared((C,), T.f32)
            enter_sh = T.alloc_shared((C,), T.f32)
            # Parameters of the head
            psi_sh = T.alloc_shared((R, P), T.f32)
            zeta_sh = T.alloc_shared((R, P), T.f32)
            phi_sh = T.alloc_shared((R, P), T.f32)
            q_bias_sh = T.alloc_shared((R, N), T.f32)
            k_bias_sh = T.alloc_shared((R, N), T.f32)
            norm_sh = T.alloc_shared((P,), T.f32)
            # Registers
            h = T.alloc_fragment((N, P), T.f32)
            s = T.alloc_fragment((F, F), T.f32)
            # An operand from registers, except where wgmma's 64 rows are not there and the layouts do not meet
            s_low = (T.alloc_fragment if F >= 64 else T.alloc_shared)((F, F), T.bf16)
            y = T.alloc_fragment((F, P), T.f32)

            T.occupancy(spec.min_blocks)
            if spec.psiv != "read":  # a tile nobody reads would be laid over another one
                T.copy(psi[bh, 0:R, 0:P], psi_sh)
            T.copy(q_bias[bh, 0:R, 0:N], q_bias_sh)
            T.copy(k_bias[bh, 0:R, 0:N], k_bias_sh)
            if spec.z:
                T.copy(zeta[bh, 0:R, 0:P], zeta_sh)
            if spec.out:
                T.copy(phi[bh, 0:R, 0:P], phi_sh)
            if spec.norm:
                T.copy(norm[bh, 0:P], norm_sh)
            T.copy(init[bb, bh, bs, 0:N, 0:P], h)

            for c in T.Pipelined(per, num_stages=T.stages(spec.stages)):
                c0 = (bs * per + c) * C
                T.load(q[bb, c0 * R : c0 * R + F, bh // hpg, 0:N], q_raw)
                T.load(k[bb, c0 * R : c0 * R + F, bh // hpg, 0:N], k_raw)
                if spec.psiv == "read":
                    T.load(x[bb, bh, c0 * R : c0 * R + F, 0:P], x_sh)
                else:
                    T.load(v[bb, c0 : c0 + C, bh, 0:P], v_sh)
                if spec.z:
                    T.load(z[bb, c0 : c0 + C, bh, 0:P], z_sh)
                T.load(theta[bb, c0 : c0 + C, bh, 0:A], theta_sh)
                T.load(log_decay[bb, bh, c0 : c0 + C], log_sh)
                T.load(gamma[bb, bh, c0 : c0 + C], gamma_sh)
                T.load(later[bb, bh, c0 : c0 + C], later_sh)
                if spec.packed:
                    T.load(doc[c0 : c0 + C], doc_sh)
                    T.load(before[c0 : c0 + C], before_sh)
                T.copy(h, h_sh)
                weights(log_sh, later_sh, doc_sh, before_sh, carry_sh, enter_sh)
                pairs(log_sh, gamma_sh, later_sh, doc_sh, pair_sh)
                project(q_raw, k_raw, theta_sh, q_bias_sh, k_bias_sh, cos_sh, sin_sh, q_sh, k_sh)
                if spec.psiv != "read":
                    spread(v_sh, psi_sh, x_sh)
                if spec.psiv == "write":
                    for i, p in T.Parallel(F, P):
                        x[bb, bh, c0 * R + i, p] = x_sh[i, p]
                # Inside the chunk: earlier tokens with their whole weight, the same token with gamma only
                T.gemm(q_sh, k_sh, s, transpose_B=True, clear_accum=True)
                for i, j in T.Parallel(F, F):
                    s[i, j] = s[i, j] * pair_sh[i // R, j // R]
                T.copy(s, s_low)
                # From before the chunk, and the skip weight
                T.gemm(q_sh, h_sh, y, clear_accum=True)
                for i, p in T.Parallel(F, P):
                    if spec.d:
                        y[i, p] = y[i, p] * carry_sh[i // R] + d[bh] * T.wide(x_sh[i, p])
                    else:
                        y[i, p] = y[i, p] * carry_sh[i // R]
                T.gemm(s_low, x_sh, y)
                # The state at the end of the chunk; the last token's carry is the decay of the whole chunk
                for n, p in T.Parallel(N, P):
                    h[n, p] = h[n, p] * carry_sh[C - 1]
                entering(v_sh, psi_sh, x_sh, enter_sh, xu_sh)
                T.gemm(k_sh, xu_sh, h, transpose_A=True)
                if spec.norm:
                    normalise(y)
                if spec.share_x:
                    T.copy(y, y_sh)
                else:
                    for i, p in T.Parallel(F, P):
                        y_sh[i, p] = y[i, p]
                finish(y_sh, z_sh, zeta_sh, phi_sh, norm_sh, out, bb, bh, c0)
            if splits == 1:
                T.copy(h, last[bb, bh, 0:N, 0:P])
            else:
                if bs == splits - 1:
                    T.copy(h, last[bb, bh, 0:N, 0:P])

    return main
