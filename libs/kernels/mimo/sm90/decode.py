"""`mimo_step_sm90`: one decode step on torch tensors by the kernel of `step`, with all states in slots.

Runs where its tensors are: on a Hopper GPU, or on the CPU for checking. Which sequence has which slot is the engine's
business; nothing here waits for the GPU, so a step can be captured in a CUDA graph.
"""
# B sequences of this step  L slots  H heads  G groups  R rank  N state  P head width  A rotary angles

from __future__ import annotations

import torch
from torch import Tensor

from libs.flags.errors import UserError
from libs.kernels.mimo.shapes import Dims, MimoInputs, MimoState, accumulation_dtype, check_inputs, check_state
from libs.kernels.mimo.sm90.launch import launch
from libs.kernels.mimo.sm90.step import StepSpec, make_step


def mimo_step_sm90(
    state: MimoState, slots: Tensor, q: Tensor, k: Tensor, v: Tensor, adt: Tensor, dt: Tensor, trap: Tensor,
    q_bias: Tensor, k_bias: Tensor, mimo_v: Tensor, mimo_z: Tensor | None, mimo_out: Tensor | None, angles: Tensor,
    d: Tensor | None, z: Tensor | None, *, rotary_dim_divisor: int, norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Advance the recurrence of `api.mamba3_mimo` by one token for the sequences in `slots`, in place.

    Args:
        state: four parts of L slots, contiguous: angle and ssm in fp32 (fp64 with fp64 operands), k and x in v's dtype.
            The slots named are overwritten, every bit of the others stays.
        slots: (B,) int32, distinct, below L. Negative: a padding row, which has output 0 and touches no state.
        q, k: (B,R,G,N) after their norm, before bias. v, z: (B,H,P), any P. adt, dt, trap: (B,H). angles: (B,H,A).
            The rest as in `step.mamba3_mimo_step`.
        dtype: of the result; that of v by default.

    Returns:
        (B,H,P), or (B,R,H,P) when `mimo_out` is None.

    Raises:
        ValueError: shapes that do not fit.
        UserError: a dtype, layout or N that the kernel has not; an operand that wants a gradient; and, only where
            looking costs nothing, on the CPU, slots that repeat or are out of range. On a GPU a slot out of range
            reads zeros and writes nothing, and a slot named twice has an undefined state.
    """
    token = MimoInputs(
        q=q.unsqueeze(1), k=k.unsqueeze(1), v=v.unsqueeze(1), adt=adt.unsqueeze(2), dt=dt.unsqueeze(2),
        trap=trap.unsqueeze(2), q_bias=q_bias, k_bias=k_bias, mimo_v=mimo_v, angles=angles.unsqueeze(1),
        mimo_z=mimo_z, mimo_out=mimo_out, d=d, z=None if z is None else z.unsqueeze(1), norm_weight=norm_weight,
    )  # fmt: skip
    dims = check_inputs(token, rotary_dim_divisor)
    check_state(state, state.angle.shape[0], dims)
    _check(state, slots, token, dims)
    low, acc = v.dtype, accumulation_dtype(v.dtype)
    spec = StepSpec(
        dims.H, dims.G, dims.R, dims.N, dims.P, rotary_dim_divisor, z=z is not None, out=mimo_out is not None,
        d=d is not None, norm=norm_weight is not None, norm_eps=norm_eps,
    )  # fmt: skip

    def given(u: Tensor | None, axes: int, wanted: torch.dtype) -> Tensor:
        return v.new_zeros([1] * axes, dtype=wanted) if u is None else u.to(wanted).contiguous()

    B, R, H, P = dims.B, dims.R, dims.H, dims.P
    out = v.new_empty((B, H, P) if spec.out else (B, R, H, P))
    launch(make_step, spec, "plain", [
        slots, given(q, 4, low), given(k, 4, low), given(v, 3, low), given(z, 3, low), given(adt, 2, acc),
        given(dt, 2, acc), given(trap, 2, acc), given(angles, 3, acc), given(q_bias, 3, acc), given(k_bias, 3, acc),
        given(mimo_v, 3, acc), given(mimo_z, 3, acc), given(mimo_out, 3, acc), given(d, 1, acc),
        given(norm_weight, 2, acc), *state, out,
    ])  # fmt: skip
    return out if dtype is None else out.to(dtype)


def _check(state: MimoState, slots: Tensor, token: MimoInputs, dims: Dims) -> None:
    """What shapes do not tell."""
    v, device = token.v, token.v.device
    if torch.is_grad_enabled() and any(u is not None and u.requires_grad for u in (*token, *state)):
        raise UserError("a decode step has no backward, and an operand requires a gradient; call it under no_grad")
    if device.type == "cuda" and v.dtype != torch.bfloat16:
        raise UserError(f"the Hopper decode kernel takes bfloat16, V is {v.dtype}; convert it, or use mamba3_mimo_step")
    if dims.N & (dims.N - 1):
        raise UserError(f"the Hopper decode kernel needs a state size that is a power of two, got N={dims.N}")
    acc = accumulation_dtype(v.dtype)
    for (name, part), wanted in zip(state._asdict().items(), (acc, acc, v.dtype, v.dtype), strict=True):
        if part.dtype != wanted or part.device != device or not part.is_contiguous():
            raise UserError(
                f"state.{name} must be contiguous {wanted} on {device} to be moved on in place, got {part.dtype} on "
                f"{part.device}{'' if part.is_contiguous() else ', not contiguous'}"
            )
    if slots.dtype != torch.int32 or tuple(slots.shape) != (dims.B,) or slots.device != device:
        raise UserError(
            f"slots must be (B,) = ({dims.B},) torch.int32 on {device}, got {tuple(slots.shape)} {slots.dtype} on "
            f"{slots.device}"
        )
    if device.type == "cpu":
        used = [slot for slot in slots.tolist() if slot >= 0]
        if len(set(used)) != len(used) or max(used, default=0) >= len(state.angle):
            raise UserError(f"slots must be distinct and below {len(state.angle)}, got {slots.tolist()}")
