"""The operands of the Mamba-3 MIMO scan: their letters, their checks, and the decode state.

Not for arithmetic: every backend receives an already checked `MimoInputs` and trusts it.
"""
# B sequences  S tokens  H heads  G groups of B/C  R MIMO rank  N state  P head width  A rotary angles

from __future__ import annotations

import itertools
import weakref
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

RANKS = (1, 2, 4, 8)
ROTARY_DIVISORS = (2, 4)
TWO_PI = 2 * torch.pi


class Dims(NamedTuple):
    """Sizes of one call, by their letters."""

    B: int
    S: int
    H: int
    G: int
    R: int
    N: int
    P: int
    A: int


class MimoState(NamedTuple):
    """What one layer carries from token to token: four parts that move together.

    Attributes:
        angle: (B, H, A) accumulated rotation, radians in [0, 2*pi], fp32.
        ssm: (B, H, P, N) state after the last token, without that token's shifted term, fp32.
        k: (B, R, H, N) the last token's key, biased and rotated.
        x: (B, H, P) the last token's value.
    """

    angle: Tensor
    ssm: Tensor
    k: Tensor
    x: Tensor

    @classmethod
    def zeros(
        cls, B: int, H: int, P: int, N: int, R: int, A: int, device: torch.device | str, dtype: torch.dtype
    ) -> MimoState:
        """The state before any token; `dtype` is that of `k` and `x` (`angle` and `ssm` are at least fp32)."""
        acc = accumulation_dtype(dtype)
        return cls(
            angle=torch.zeros(B, H, A, device=device, dtype=acc),
            ssm=torch.zeros(B, H, P, N, device=device, dtype=acc),
            k=torch.zeros(B, R, H, N, device=device, dtype=dtype),
            x=torch.zeros(B, H, P, device=device, dtype=dtype),
        )


class MimoInputs(NamedTuple):
    """Operands under their project names; shapes as in `api.mamba3_mimo`. `z`..`norm_weight` may be None."""

    q: Tensor
    k: Tensor
    v: Tensor
    adt: Tensor
    dt: Tensor
    trap: Tensor
    q_bias: Tensor
    k_bias: Tensor
    mimo_v: Tensor
    angles: Tensor
    mimo_z: Tensor | None
    mimo_out: Tensor | None
    d: Tensor | None
    z: Tensor | None
    norm_weight: Tensor | None


# (output, final state): (B, S, H, P), or (B, S, R, H, P) when there is no mimo_out.
MimoResult: TypeAlias = tuple[Tensor, MimoState]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64 (tests, gradcheck); everything else accumulates in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], letters: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {letters} = {shape}, got {tuple(tensor.shape)}")


def check_inputs(inputs: MimoInputs, rotary_dim_divisor: int) -> Dims:
    """Check every operand against q (B,S,R,G,N) and v (B,S,H,P).

    Raises:
        ValueError: a shape that does not fit, naming the operand, its letters and both shapes.
    """
    if inputs.q.dim() != 5 or inputs.v.dim() != 4:
        raise ValueError(
            f"Q must be (B,S,R,G,N) and V (B,S,H,P), got {tuple(inputs.q.shape)} and {tuple(inputs.v.shape)}"
        )
    B, S, R, G, N = inputs.q.shape
    H, P = inputs.v.shape[2:]
    if S == 0:
        raise ValueError("the sequence is empty: S = 0")
    if R not in RANKS:
        raise ValueError(f"MIMO rank R={R} is not one of {RANKS}")
    if H % G:
        raise ValueError(f"H={H} heads cannot be shared evenly by G={G} groups: H % G must be 0")
    if rotary_dim_divisor not in ROTARY_DIVISORS:
        raise ValueError(f"rotary_dim_divisor={rotary_dim_divisor} is not one of {ROTARY_DIVISORS}")
    if N % 4:
        raise ValueError(f"state size N={N} must be divisible by 4 (quarters are rotated)")
    A = N // rotary_dim_divisor
    head_rank = (H, R, P)
    for name, tensor, shape, letters in (
        ("K", inputs.k, (B, S, R, G, N), "(B,S,R,G,N)"),
        ("V", inputs.v, (B, S, H, P), "(B,S,H,P)"),
        ("ADT", inputs.adt, (B, H, S), "(B,H,S)"),
        ("DT", inputs.dt, (B, H, S), "(B,H,S)"),
        ("Trap", inputs.trap, (B, H, S), "(B,H,S)"),
        ("Q_bias", inputs.q_bias, (H, R, N), "(H,R,N)"),
        ("K_bias", inputs.k_bias, (H, R, N), "(H,R,N)"),
        ("MIMO_V", inputs.mimo_v, head_rank, "(H,R,P)"),
        ("Angles", inputs.angles, (B, S, H, A), "(B,S,H,A)"),
        ("MIMO_Z", inputs.mimo_z, head_rank, "(H,R,P)"),
        ("MIMO_Out", inputs.mimo_out, head_rank, "(H,R,P)"),
        ("D", inputs.d, (H,), "(H,)"),
        ("Z", inputs.z, (B, S, H, P), "(B,S,H,P)"),
        ("norm_weight", inputs.norm_weight, (H, P), "(H,P)"),
    ):
        if tensor is not None:
            _expect(name, tensor, shape, letters)
    if (inputs.z is None) != (inputs.mimo_z is None):
        raise ValueError("Z and MIMO_Z go together: give both or neither")
    return Dims(B, S, H, G, R, N, P, A)


def check_state(state: MimoState, rows: int, dims: Dims) -> None:
    """Check an initial state of `rows` sequences. Raises ValueError naming the part that does not fit."""
    _expect("initial_state.angle", state.angle, (rows, dims.H, dims.A), "(B,H,A)")
    _expect("initial_state.ssm", state.ssm, (rows, dims.H, dims.P, dims.N), "(B,H,P,N)")
    _expect("initial_state.k", state.k, (rows, dims.R, dims.H, dims.N), "(B,R,H,N)")
    _expect("initial_state.x", state.x, (rows, dims.H, dims.P), "(B,H,P)")


def check_boundaries(cu_seqlens: Tensor, dims: Dims) -> list[int]:
    """Document boundaries as Python integers: 0 = b_0 < b_1 < ... < b_n = S.

    Raises:
        ValueError: B is not 1, or the boundaries do not run from 0 to S strictly upwards.
    """
    _check_packing(cu_seqlens, dims)
    return _rising(cu_seqlens, dims.S)


def checked_boundaries(cu_seqlens: Tensor, dims: Dims) -> Tensor:
    """The same check for who can work with the tensor. Its values are read once, however many layers are given it, for
    reading them waits for the GPU; `torch.compile` sees one opaque step.

    Raises:
        ValueError: as `check_boundaries`.
    """
    _check_packing(cu_seqlens, dims)
    if torch.compiler.is_compiling():
        return torch.ops.fathom.checked_boundaries(cu_seqlens, dims.S)  # type: ignore[no-any-return]
    seen = (cu_seqlens._version, dims.S)
    last = _LAST_CHECKED.get("last")
    if last is None or last[0]() is not cu_seqlens or last[1] != seen:
        _rising(cu_seqlens, dims.S)
        _LAST_CHECKED["last"] = (weakref.ref(cu_seqlens), seen)
    return cu_seqlens


_LAST_CHECKED: dict[str, tuple[weakref.ref[Tensor], tuple[int, int]]] = {}


@torch.library.custom_op("fathom::checked_boundaries", mutates_args=())
def _checked_op(cu_seqlens: Tensor, tokens: int) -> Tensor:
    _rising(cu_seqlens, tokens)
    return cu_seqlens.clone()


@_checked_op.register_fake
def _(cu_seqlens: Tensor, tokens: int) -> Tensor:
    return torch.empty_like(cu_seqlens)


def _check_packing(cu_seqlens: Tensor, dims: Dims) -> None:
    if dims.B != 1:
        raise ValueError(f"cu_seqlens packs documents into one row: B must be 1, got B={dims.B}")
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be a 1-D integer tensor, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")


def _rising(cu_seqlens: Tensor, tokens: int) -> list[int]:
    bounds = [int(b) for b in cu_seqlens.tolist()]
    increasing = all(a < b for a, b in itertools.pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or not increasing:
        raise ValueError(
            f"cu_seqlens must rise strictly from 0 to S={tokens}, got {bounds[:8]}{'...' if len(bounds) > 8 else ''}"
        )
    return bounds
