"""A split sequence, forward: what each split does to a zero state (pass 1), and the states that enter them (pass 2).

Pass 3 is the forward kernel itself with `splits` > 1. The grid of passes 1 and 3 is (H, B, splits).
"""
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"
# B sequences  S tokens  H heads  G groups  R rank  N state  P head width  A rotary angles  C tokens of a chunk
# F = C*R rows, token-major  bb, bh, bs block indices: sequence, head, split

# No `from __future__ import annotations`: as strings, parameter types would see only names that the body uses too.

from typing import Any, NamedTuple

from libs.kernels.mimo.sm90.parts import entering_values, project_keys, token_weights
from libs.kernels.mimo.sm90.spec import ScanSpec


class CombineSpec(NamedTuple):
    """The combining pass: it knows nothing of tokens."""

    B: int
    H: int
    N: int
    P: int
    splits: int


def make_states(T: Any, spec: ScanSpec) -> Any:
    """Pass 1: local (B,H,splits,N,P), the state each split ends in when it starts from zero, and through
    (B,H,splits), the factor with which a state passes through it (0 where a document starts inside)."""
    B, S, H, G, R, N, P, C, A, F = *spec[:8], spec.A, spec.F
    spec = spec._replace(psiv="compute")  # v is an R-th of PsiV: reading it is never worth while here
    hpg, per, splits = H // G, spec.per_split, spec.splits
    weights, project, entering = token_weights(T, spec), project_keys(T, spec), entering_values(T, spec)
    docs = (S,) if spec.packed else (1,)

    @T.prim_func
    def main(
        k: T.Tensor((B, S * R, G, N), T.bf16), v: T.Tensor((B, S, H, P), T.bf16), psi: T.Tensor((H, R, P), T.f32),
        k_bias: T.Tensor((H, R, N), T.f32), log_decay: T.Tensor((B, H, S), T.f32), later: T.Tensor((B, H, S), T.f32),
        theta: T.Tensor((B, S, H, A), T.f32), doc: T.Tensor(docs, T.i32), before: T.Tensor(docs, T.i32),
        local: T.Tensor((B, H, splits, N, P), T.f32), through: T.Tensor((B, H, splits), T.f32),
    ):  # fmt: skip
        with T.Kernel(H, B, splits, threads=128) as (bh, bb, bs):
            k_raw = T.alloc_shared((F, N), T.bf16)
            v_sh = T.alloc_shared((C, P), T.bf16)
            theta_sh = T.alloc_shared((C, A), T.f32)
            log_sh = T.alloc_shared((C,), T.f32)
            later_sh = T.alloc_shared((C,), T.f32)
            doc_sh = T.alloc_shared((C,), T.i32)
            before_sh = T.alloc_shared((C,), T.i32)
            k_sh = T.alloc_shared((F, N), T.bf16)
            xu_sh = T.alloc_shared((F, P), T.bf16)
            cos_sh = T.alloc_shared((C, A), T.f32)
            sin_sh = T.alloc_shared((C, A), T.f32)
            carry_sh = T.alloc_shared((C,), T.f32)
            enter_sh = T.alloc_shared((C,), T.f32)
            psi_sh = T.alloc_shared((R, P), T.f32)
            k_bias_sh = T.alloc_shared((R, N), T.f32)
            h = T.alloc_fragment((N, P), T.f32)
            passed = T.alloc_fragment((1,), T.f32)

            T.occupancy(spec.min_blocks)
            T.copy(psi[bh, 0:R, 0:P], psi_sh)
            T.copy(k_bias[bh, 0:R, 0:N], k_bias_sh)
            T.clear(h)
            T.fill(passed, T.number(1.0))
            for c in T.Pipelined(per, num_stages=T.stages(spec.stages)):
                c0 = (bs * per + c) * C
                T.load(k[bb, c0 * R : c0 * R + F, bh // hpg, 0:N], k_raw)
                T.load(v[bb, c0 : c0 + C, bh, 0:P], v_sh)
                T.load(theta[bb, c0 : c0 + C, bh, 0:A], theta_sh)
                T.load(log_decay[bb, bh, c0 : c0 + C], log_sh)
                T.load(later[bb, bh, c0 : c0 + C], later_sh)
                if spec.packed:
                    T.load(doc[c0 : c0 + C], doc_sh)
                    T.load(before[c0 : c0 + C], before_sh)
                weights(log_sh, later_sh, doc_sh, before_sh, carry_sh, enter_sh)
                project(k_raw, theta_sh, k_bias_sh, cos_sh, sin_sh, k_sh)
                entering(v_sh, psi_sh, None, enter_sh, xu_sh)
                for n, p in T.Parallel(N, P):
                    h[n, p] = h[n, p] * carry_sh[C - 1]
                T.gemm(k_sh, xu_sh, h, transpose_A=True)
                for i in T.Parallel(1):
                    passed[i] = passed[i] * carry_sh[C - 1]
            T.copy(h, local[bb, bh, bs, 0:N, 0:P])
            T.copy(passed, through[bb, bh, bs : bs + 1])

    return main


def make_combine(T: Any, spec: CombineSpec) -> Any:
    """Pass 2: init (B,H,splits,N,P), the state that enters each split, from the first one and pass 1."""
    B, H, N, P, splits = spec
    rows = min(N, 16)
    assert N % rows == 0, f"N = {N} is not a multiple of {rows}"

    @T.prim_func
    def main(
        local: T.Tensor((B, H, splits, N, P), T.f32), through: T.Tensor((B, H, splits), T.f32),
        first: T.Tensor((B, H, N, P), T.f32), init: T.Tensor((B, H, splits, N, P), T.f32),
    ):  # fmt: skip
        with T.Kernel(H, B, N // rows, threads=128) as (bh, bb, bn):
            h = T.alloc_fragment((rows, P), T.f32)
            T.copy(first[bb, bh, bn * rows : bn * rows + rows, 0:P], h)
            for s in T.serial(splits):
                T.copy(h, init[bb, bh, s, bn * rows : bn * rows + rows, 0:P])
                for n, p in T.Parallel(rows, P):
                    h[n, p] = h[n, p] * through[bb, bh, s] + local[bb, bh, s, bn * rows + n, p]

    return main
