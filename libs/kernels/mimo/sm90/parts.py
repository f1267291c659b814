"""Macros that several scan kernels share: a chunk's weights, rotated queries and keys, values of every rank.

Each function takes the dialect and the variant and returns a macro on tiles. No loads from global memory here.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# C tokens of a chunk  R rank  F = C*R rows, token-major  N state  P head width  A rotary angles

from __future__ import annotations

from typing import Any

from libs.kernels.mimo.sm90.spec import ScanSpec


def token_weights(T: Any, spec: ScanSpec) -> Any:
    """carry (C): decay from the chunk's start, 0 in a later document; its last entry is what the state passes through
    the chunk with. enter (C): weight of a token on the state at the end, 0 if its document ends before."""
    C = spec.C

    @T.macro
    def weights(log_sh, later_sh, doc_sh, before_sh, carry_sh, enter_sh):
        for t in T.Parallel(C):
            if spec.packed:
                carry_sh[t] = T.if_then_else(doc_sh[t] == before_sh[t], T.exp(log_sh[t]), T.zero())
                enter_sh[t] = T.if_then_else(
                    doc_sh[t] == doc_sh[C - 1], T.exp(log_sh[C - 1] - log_sh[t]) * later_sh[t], T.zero()
                )
            else:
                carry_sh[t] = T.exp(log_sh[t])
                enter_sh[t] = T.exp(log_sh[C - 1] - log_sh[t]) * later_sh[t]

    return weights


def pair_weights(T: Any, spec: ScanSpec) -> Any:
    """pair (C,C): weight of token s on the output of token t. Once per pair of tokens, not R*R times."""
    C = spec.C

    @T.macro
    def pairs(log_sh, gamma_sh, later_sh, doc_sh, pair_sh):
        for t, s in T.Parallel(C, C):
            earlier = T.And(s < t, doc_sh[s] == doc_sh[t]) if spec.packed else s < t
            pair_sh[t, s] = T.if_then_else(
                earlier,
                T.exp(log_sh[t] - log_sh[s]) * later_sh[s],
                T.if_then_else(s == t, gamma_sh[t], T.zero()),
            )

    return pairs


def _angles(T: Any, spec: ScanSpec) -> Any:
    C, A = spec.C, spec.A

    @T.macro
    def angles(theta_sh, cos_sh, sin_sh):
        for t, a in T.Parallel(C, A):
            # Not `cos, sin`: names become C variables and would hide the functions
            cosine, sine = T.cos_sin(theta_sh[t, a])
            cos_sh[t, a] = cosine
            sin_sh[t, a] = sine

    return angles


def _rotate(T: Any, spec: ScanSpec) -> Any:
    """Bias and rotate one tile into another: pairs (a, second + a), and with divisor 4 the quarters between."""
    R, A, F, second = spec.R, spec.A, spec.F, spec.second

    @T.macro
    def rotate(raw, bias_sh, cos_sh, sin_sh, done):
        for i, a in T.Parallel(F, A):
            first = T.wide(raw[i, a]) + bias_sh[i % R, a]
            other = T.wide(raw[i, second + a]) + bias_sh[i % R, second + a]
            done[i, a] = T.round_bf16(first * cos_sh[i // R, a] - other * sin_sh[i // R, a])
            done[i, second + a] = T.round_bf16(first * sin_sh[i // R, a] + other * cos_sh[i // R, a])
        if spec.divisor == 4:
            for i, a in T.Parallel(F, A):
                done[i, A + a] = T.round_bf16(T.wide(raw[i, A + a]) + bias_sh[i % R, A + a])
                done[i, 3 * A + a] = T.round_bf16(T.wide(raw[i, 3 * A + a]) + bias_sh[i % R, 3 * A + a])

    return rotate


def project_pair(T: Any, spec: ScanSpec) -> Any:
    """Biased and rotated queries and keys."""
    angles, rotate = _angles(T, spec), _rotate(T, spec)

    @T.macro
    def project(q_raw, k_raw, theta_sh, q_bias_sh, k_bias_sh, cos_sh, sin_sh, q_sh, k_sh):
        angles(theta_sh, cos_sh, sin_sh)
        rotate(q_raw, q_bias_sh, cos_sh, sin_sh, q_sh)
        rotate(k_raw, k_bias_sh, cos_sh, sin_sh, k_sh)

    return project


def project_keys(T: Any, spec: ScanSpec) -> Any:
    """Biased and rotated keys alone."""
    angles, rotate = _angles(T, spec), _rotate(T, spec)

    @T.macro
    def project(k_raw, theta_sh, k_bias_sh, cos_sh, sin_sh, k_sh):
        angles(theta_sh, cos_sh, sin_sh)
        rotate(k_raw, k_bias_sh, cos_sh, sin_sh, k_sh)

    return project


def spread_values(T: Any, spec: ScanSpec) -> Any:
    """PsiV, (F,P)."""
    R, P, F = spec.R, spec.P, spec.F

    @T.macro
    def spread(v_sh, psi_sh, x_sh):
        for i, p in T.Parallel(F, P):
            x_sh[i, p] = T.round_bf16(T.wide(v_sh[i // R, p]) * psi_sh[i % R, p])

    return spread


def entering_values(T: Any, spec: ScanSpec) -> Any:
    """PsiV weighted for the state. Weighting x (P wide) instead of k (N wide) is the cheaper side; from v again, so
    that it is rounded once."""
    R, P, F = spec.R, spec.P, spec.F

    @T.macro
    def entering(v_sh, psi_sh, x_sh, enter_sh, xu_sh):
        for i, p in T.Parallel(F, P):
            if spec.psiv == "read":
                xu_sh[i, p] = T.round_bf16(T.wide(x_sh[i, p]) * enter_sh[i // R])
            else:
                xu_sh[i, p] = T.round_bf16(T.wide(v_sh[i // R, p]) * psi_sh[i % R, p] * enter_sh[i // R])

    return entering
