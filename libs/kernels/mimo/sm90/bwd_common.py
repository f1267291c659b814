"""What the backward kernels share: the packed per-token weights, bias and rotation of q and k, tables of arguments.

Not for the walk over chunks (`bwd_fwd`, `bwd_bwd`) and not for torch glue (`bwd_glue`).
"""
# B sequences  S tokens  H heads  G groups  R rank  N state  P head width  A = N / divisor rotary angles
# C tokens of a chunk  F = C*R rows of a chunk, token-major: row i is token i // R, rank i % R
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

from libs.kernels.mimo.sm90.spec import ScanSpec

# Rows of the packed per-token weights (B, H, chunks, rows * C), in this order. One bulk copy brings all of them.
LOG = 0  # running log decay inside the chunk
GAMMA = 1  # weight of a token on its own output
LATER = 2  # weight on later outputs of the chunk
CARRY = 3  # exp(LOG), zero behind a document boundary: how the entering state acts on the token
ENTRY = 4  # weight with which the token enters the state at the chunk's end, shifted term included
THROUGH = 5  # what is left of the entering state at the chunk's end; the same number C times
DOCUMENT = 6  # number of the token's document, as a float; only when documents are packed


def weight_rows(spec: ScanSpec) -> int:
    """Rows of the packed weights."""
    return DOCUMENT + int(spec.packed)


def if_present(present: bool, *shape: int) -> tuple[int, ...]:
    """`shape`, or the shape of a stand-in of one element for an option that is off."""
    return shape if present else (1,) * len(shape)


def weight_macros(T: Any, spec: ScanSpec) -> Any:
    """Macro `decay(small, e_sh)`: exp(LOG_t - LOG_s) for s <= t of one document, else 0, as a (C, C) tile."""
    C, packed = spec.C, spec.packed

    @T.macro
    def decay(small: Any, e_sh: Any) -> None:
        for t, s in T.Parallel(C, C):
            if packed:
                e_sh[t, s] = T.if_then_else(
                    s <= t,
                    T.if_then_else(
                        small[DOCUMENT * C + t] == small[DOCUMENT * C + s],
                        T.exp(small[LOG * C + t] - small[LOG * C + s]),
                        T.zero(),
                    ),
                    T.zero(),
                )
            else:
                e_sh[t, s] = T.if_then_else(s <= t, T.exp(small[LOG * C + t] - small[LOG * C + s]), T.zero())

    return decay


def rotation_macros(T: Any, spec: ScanSpec) -> tuple[Any, Any, Any]:
    """Macros for the rotated pairs (channel a and a + N/2, for both divisors):

    `rotate(raw, bias, cos, sin, out)`: bias, then rotation, into a bf16 tile (F, N).
    `turn(grad, rotated, total)`: gradient of the angle (C, A), summed over ranks.
    `unrotate(grad, cos, sin, out)`: gradient before the rotation, into a bf16 tile (F, N).
    """
    F, A, R, C, N = spec.F, spec.A, spec.R, spec.C, spec.N
    half, quarters = N // 2, spec.divisor == 4

    @T.macro
    def rotate(raw: Any, bias: Any, cos: Any, sin: Any, out: Any) -> None:
        for i, a in T.Parallel(F, A):
            out[i, a] = T.round_bf16(
                (raw[i, a] + bias[i % R, a]) * cos[i // R, a]
                - (raw[i, a + half] + bias[i % R, a + half]) * sin[i // R, a]
            )
            out[i, a + half] = T.round_bf16(
                (raw[i, a] + bias[i % R, a]) * sin[i // R, a]
                + (raw[i, a + half] + bias[i % R, a + half]) * cos[i // R, a]
            )
        if quarters:
            for i, a in T.Parallel(F, A):
                out[i, a + A] = T.round_bf16(raw[i, a + A] + bias[i % R, a + A])
                out[i, a + half + A] = T.round_bf16(raw[i, a + half + A] + bias[i % R, a + half + A])

    @T.macro
    def turn(grad: Any, rotated: Any, total: Any) -> None:
        T.clear(total)
        for r in T.unroll(R):
            for t, a in T.Parallel(C, A):
                total[t, a] += (
                    grad[t * R + r, a + half] * rotated[t * R + r, a]
                    - grad[t * R + r, a] * rotated[t * R + r, a + half]
                )

    @T.macro
    def unrotate(grad: Any, cos: Any, sin: Any, out: Any) -> None:
        for i, a in T.Parallel(F, A):
            out[i, a] = T.round_bf16(grad[i, a] * cos[i // R, a] + grad[i, a + half] * sin[i // R, a])
            out[i, a + half] = T.round_bf16(grad[i, a + half] * cos[i // R, a] - grad[i, a] * sin[i // R, a])
        if quarters:
            for i, a in T.Parallel(F, A):
                out[i, a + A] = T.round_bf16(grad[i, a + A])
                out[i, a + half + A] = T.round_bf16(grad[i, a + half + A])

    return rotate, turn, unrotate


Shapes = dict[str, tuple[bool, tuple[int, ...]]]  # tensor name -> (stored as bf16, shape), in parameter order


def fwd_inputs(spec: ScanSpec) -> Shapes:
    """What `bwd_fwd` reads."""
    B, S, H, G, R, N, P, C = spec[:8]
    heads, ranked, head_rank = (B, S, H, P), (B, S * R, H, P), (H, R, P)
    return {
        "q": (True, (B, S * R, G, N)), "k": (True, (B, S * R, G, N)), "v": (True, heads),
        "z": (True, if_present(spec.z, *heads)), "x": (True, if_present(spec.reads_x, B, H, S * R, P)),
        "cos": (False, (B, S, H, spec.A)), "sin": (False, (B, S, H, spec.A)),
        "q_bias": (False, (H, R, N)), "k_bias": (False, (H, R, N)), "psi": (False, head_rank),
        "zeta": (False, if_present(spec.z, *head_rank)),
        "phi": (False, if_present(spec.out, *head_rank)),
        "d": (False, if_present(spec.d, H)), "norm_w": (False, if_present(spec.norm, H, P)),
        "small": (False, (B, H, S // C, weight_rows(spec) * C)), "init": (False, (B, H, spec.splits, N, P)),
        "d_out": (True, heads if spec.out else ranked),
    }  # fmt: skip


def fwd_outputs(spec: ScanSpec) -> Shapes:
    """What `bwd_fwd` writes."""
    B, S, H, _, R, N, P, C = spec[:8]
    partial = (B, H, spec.splits, R, P)
    return {
        "dy": (True, (B, S * R, H, P)), "states": (True, (B, H, S // C, N, P)), "dq": (True, (B, S * R, H, N)),
        "dz": (True, if_present(spec.z, B, S, H, P)), "turn": (False, (B, S, H, spec.A)),
        "row": (False, (B, H, S * R)), "d_zeta": (False, partial), "mix": (False, partial), "skip": (False, partial),
    }  # fmt: skip


def bwd_inputs(spec: ScanSpec) -> Shapes:
    """What `bwd_bwd` reads."""
    fwd, made = fwd_inputs(spec), fwd_outputs(spec)
    names = ("q", "k", "v", "x", "cos", "sin", "q_bias", "k_bias", "psi", "d", "small")
    return {name: fwd[name] for name in names} | {
        "dy": made["dy"], "states": made["states"], "d_last": fwd["init"],
    }  # fmt: skip


def bwd_outputs(spec: ScanSpec) -> Shapes:
    """What `bwd_bwd` writes."""
    B, S, H, _, R, N, P, C = spec[:8]
    return {
        "dk": (True, (B, S * R, H, N)), "dv": (True, (B, S, H, P)), "turn": (False, (B, S, H, spec.A)),
        "d_later": (False, (B, H, S * R)), "d_gamma": (False, (B, H, S * R)), "d_entry": (False, (B, H, S * R)),
        "d_through": (False, (B, H, S // C, N)), "spin": (False, (B, H, S // C, N)),
        "d_psi": (False, (B, H, spec.splits, R, P)),
        "d_first": (False, (B, H, spec.splits, N, P)),
    }  # fmt: skip


def declared(T: Any, shapes: Shapes) -> Any:
    """`T.prim_func` with its parameters' types from a table: written as annotations, TileLang evaluates them with
    only those names of the factory that the body uses too."""

    def decorate(main: Any) -> Any:
        main.__annotations__ = {
            name: T.Tensor(shape, T.bf16 if low else T.f32) for name, (low, shape) in shapes.items()
        }
        return T.prim_func(main)

    return decorate
