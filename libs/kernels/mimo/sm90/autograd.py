"""The scan as torch sees it: a custom op with fake kernels and its own backward, and the entry `mimo_sm90`.

Weights, angles and padding are ordinary torch outside the op, so that autograd and `torch.compile` do them; the op is
what the kernels do, on whole chunks. On CPU tensors the very kernels run through the "c" target, for checking.
"""
# B sequences  S tokens  H heads  G groups  R rank  N state  P head width  A rotary angles  L = S*R
# C tokens of a chunk

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnF

from libs.kernels.mimo.chunked import entry
from libs.kernels.mimo.chunked_terms import document_ids, document_masks, scan_weights, wrapped_angles
from libs.kernels.mimo.reference import rotate
from libs.kernels.mimo.shapes import Dims, MimoInputs, MimoResult, MimoState, accumulation_dtype
from libs.kernels.mimo.sm90 import psiv
from libs.kernels.mimo.sm90.bwd_launch import BwdSpecs, scan_backward
from libs.kernels.mimo.sm90.forward import scan_forward
from libs.kernels.mimo.sm90.gates import KernelGates, Mode, Psiv, Split
from libs.kernels.mimo.sm90.inspect import MULTIPROCESSORS
from libs.kernels.mimo.sm90.spec import KernelOperands, scan_spec
from libs.kernels.mimo.sm90.tiles import planned


class How(NamedTuple):
    """Everything about a call of the op that is not a tensor, as the op's plain arguments."""

    C: int
    divisor: int
    norm_eps: float
    splits: int
    fwd_mode: Mode
    bwd_mode: Mode
    psiv: Psiv


_OPERANDS = ", ".join(
    f"Tensor{'?' if name in ('z', 'zeta', 'phi', 'd', 'norm_w') else ''} {name}" for name in KernelOperands._fields
)
_HOW = "int C, int divisor, float norm_eps, int splits, str fwd_mode, str bwd_mode, str psiv"
_N = len(KernelOperands._fields)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    op, doc, how = KernelOperands(*arguments[:_N]), arguments[_N], How(*arguments[_N + 1 :])
    reuse = psiv.REUSE[how.psiv]
    generation = 0
    x: Tensor | None = None
    if reuse.forward == "read":
        x = psiv.materialise(op.v, op.psi)
    elif reuse.forward == "write":
        B, S, H, P = op.v.shape
        x, generation = psiv.POOL.lease(op.psi, (B, H, S * op.q.shape[2], P), op.v.dtype)
    base = scan_spec(op, *how[:3], packed=doc is not None, splits=how.splits)._replace(psiv=reuse.forward)
    spec, states = base, base
    if op.v.is_cuda:
        spec, states = planned("fwd", how.fwd_mode, base), planned("states", how.fwd_mode, base)
    done = scan_forward(op, doc, spec, how.fwd_mode, x, states)
    return (
        done.out, done.h_end, done.init_BHsNP if how.splits > 1 else op.v.new_empty(0),
        op.v.new_empty(0) if x is None else x, torch.tensor(generation),
    )  # fmt: skip


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    op, how = KernelOperands(*arguments[:_N]), How(*arguments[_N + 1 :])
    B, S, H, P = op.v.shape
    R = op.q.shape[2]
    none = op.v.new_empty(0)
    return (
        op.v.new_empty((B, S, H, P) if op.phi is not None else (B, S, R, H, P)), torch.empty_like(op.first),
        op.first.new_empty(B, H, how.splits, *op.first.shape[2:]) if how.splits > 1 else none,
        none if psiv.REUSE[how.psiv].forward == "compute" else op.v.new_empty(B, H, S * R, P),
        torch.empty((), dtype=torch.int64),
    )  # fmt: skip


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    op, how = KernelOperands(*arguments[:_N]), How(*arguments[_N + 6 :])
    doc, init, x, generation, d_out, d_end = arguments[_N : _N + 6]
    reuse = psiv.REUSE[how.psiv]
    if reuse.forward == "write":
        psiv.POOL.require(op.psi, int(generation))
    base = scan_spec(op, *how[:3], packed=doc is not None, splits=how.splits)
    reading = base._replace(psiv="read")
    specs = BwdSpecs(reading if reuse.bwd_fwd else base, base, reading if reuse.bwd_bwd else base)
    if op.v.is_cuda:
        mode = how.bwd_mode
        specs = BwdSpecs(
            planned("bwd_fwd", mode, specs.bwd_fwd), planned("bwd_states", mode, specs.bwd_states),
            planned("bwd_bwd", mode, specs.bwd_bwd),
        )  # fmt: skip
    entering = init if how.splits > 1 else op.first[:, :, None]
    grads = scan_backward(op, doc, specs, how.bwd_mode, entering, d_out, d_end, x if x.numel() else None)
    return tuple(
        op.v.new_empty(0) if u is None or grad is None else grad.to(u.dtype).contiguous()
        for u, grad in zip(op, grads, strict=True)
    )


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    op = KernelOperands(*arguments[:_N])
    return tuple(op.v.new_empty(0) if u is None else torch.empty_like(u) for u in op)


_scan_op = torch.library.custom_op(
    "fathom::mimo_scan", _forward, mutates_args=(),
    schema=f"({_OPERANDS}, Tensor? doc, {_HOW}) -> ({', '.join(['Tensor'] * 5)})",
)  # fmt: skip
_scan_backward_op = torch.library.custom_op(
    "fathom::mimo_scan_backward", _backward, mutates_args=(),
    schema=f"({_OPERANDS}, Tensor? doc, Tensor init, Tensor x, Tensor generation, Tensor d_out, Tensor d_end, {_HOW})"
    f" -> ({', '.join(['Tensor'] * _N)})",
)  # fmt: skip
_scan_op.register_fake(_forward_fake)
_scan_backward_op.register_fake(_backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, h_end, init, x, generation = output
    ctx.how = inputs[_N + 1 :]
    ctx.mark_non_differentiable(init, x, generation)
    ctx.set_materialize_grads(False)
    ctx.shapes = out.shape, h_end.shape
    ctx.save_for_backward(*inputs[: _N + 1], init, x, generation)


def _differentiate(ctx: Any, d_out: Tensor | None, d_end: Tensor | None, *_: None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: under activation checkpointing every read would run the forward again
    op = KernelOperands(*saved[:_N])
    d_out = op.v.new_zeros(ctx.shapes[0]) if d_out is None else d_out.to(op.v.dtype).contiguous()
    d_end = op.first.new_zeros(ctx.shapes[1]) if d_end is None else d_end.contiguous()
    grads = _scan_backward_op(*saved, d_out, d_end, *ctx.how)
    given = (None if u is None else grad for u, grad in zip(op, grads, strict=True))
    return (*given, *[None] * (1 + len(ctx.how)))


_scan_op.register_autograd(_differentiate, setup_context=_setup_context)


class Plan(NamedTuple):
    """How a call is cut: `chunks` of them, in whole splits."""

    how: How
    chunks: int


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _installed() -> tuple[Mode, Mode, Split, Psiv]:
    """The process's gates, in plain values: read while tracing, not traced."""
    return _plain(KernelGates.from_installed())


def _plain(gates: KernelGates) -> tuple[Mode, Mode, Split, Psiv]:
    return gates.mode("fwd"), gates.mode("bwd"), gates.split_scan, gates.psiv


def plan_splits(split_scan: Split, batch_heads: int, processors: int) -> int:
    """How many parts of a sequence run side by side: the smallest count that gives every multiprocessor a block.

    "auto" splits when B*H blocks leave some without one, "on" always. The length does not matter, so that every length
    runs the same kernels: the sequence is padded to whole chunks in every part.
    """
    if split_scan == "off" or (split_scan == "auto" and batch_heads >= processors):
        return 1
    return max(2, -(-processors // batch_heads))


def _plan(
    dims: Dims, chunk_size: int, divisor: int, norm_eps: float, gates: KernelGates | None, device: torch.device
) -> Plan:
    fwd_mode, bwd_mode, split_scan, stage = _installed() if gates is None else _plain(gates)
    if psiv.REUSE[stage].forward == "write" and not torch.is_grad_enabled():
        stage = "off"  # nobody would read it
    chunks = -(-dims.S // chunk_size)
    splits = plan_splits(split_scan, dims.B * dims.H, processors(device))
    return Plan(How(chunk_size, divisor, norm_eps, splits, fwd_mode, bwd_mode, stage), -(-chunks // splits) * splits)


def mimo_sm90(
    inputs: MimoInputs, dims: Dims, chunk_size: int, divisor: int, norm_eps: float, state: MimoState | None,
    bounds: list[int] | Tensor | None, *, gates: KernelGates | None = None, return_state: bool = False,
) -> MimoResult:  # fmt: skip
    """The scan on the Hopper kernels, equal to `reference.mimo_reference`; operands as in `api.mamba3_mimo`.

    Args:
        state: one row per sequence. bounds: documents packed into B = 1, checked by the caller.
        gates: how kernels are built and run; None takes what the process has installed.
        return_state: with `bounds`, a state per document is wanted; without it the state is the last document's.

    Returns:
        The output in the dtype of v, and the state after the last token. Differentiable in all inputs and in `state`.

    Raises:
        UserError: a shape that the kernels are not built for (CUDA).
    """
    if bounds is not None and (return_state or state is not None):
        return _by_document(inputs, dims, chunk_size, divisor, norm_eps, state, bounds, gates)
    plan = _plan(dims, chunk_size, divisor, norm_eps, gates, inputs.v.device)
    op, end_angle = _operands(inputs, dims, plan, state, bounds)
    tokens = plan.chunks * chunk_size
    doc = None if bounds is None else document_ids(bounds, tokens, inputs.v.device).to(torch.int32)
    out, h_end = _scan_op(*op, doc, *plan.how)[:2]
    key = _last_key(inputs.k[:, -1], inputs, dims, end_angle, divisor)
    final = MimoState(end_angle, h_end.transpose(2, 3), key, inputs.v[:, -1].to(end_angle.dtype))
    return out[:, : dims.S], final


def _operands(
    inputs: MimoInputs, dims: Dims, plan: Plan, state: MimoState | None, bounds: list[int] | Tensor | None
) -> tuple[KernelOperands, Tensor]:
    """What the op takes, in differentiable torch, and the angle after the last token (B,H,A)."""
    acc, low, C, chunks = accumulation_dtype(inputs.v.dtype), inputs.v.dtype, plan.how.C, plan.chunks
    masks = None if bounds is None else document_masks(bounds, chunks, C, inputs.v.device)
    weights = scan_weights(inputs.adt.to(acc), inputs.dt.to(acc), inputs.trap.to(acc), chunks, C, masks)
    start_angle, first = entry(inputs, dims, state, weights, acc)
    theta, end_angle = wrapped_angles(inputs.angles.to(acc), inputs.dt.to(acc), start_angle, chunks, C, masks)

    def tokens(u: Tensor) -> Tensor:
        return nnF.pad(u.to(low), [0, 0] * (u.dim() - 2) + [0, chunks * C - dims.S]).contiguous()

    def full(u: Tensor) -> Tensor:
        return u.to(acc).contiguous()

    def by_head(u_BcHC: Tensor) -> Tensor:
        return u_BcHC.transpose(1, 2).flatten(2).contiguous()

    op = KernelOperands(
        q=tokens(inputs.q), k=tokens(inputs.k), v=tokens(inputs.v), z=None if inputs.z is None else tokens(inputs.z),
        q_bias=full(inputs.q_bias), k_bias=full(inputs.k_bias), psi=full(inputs.mimo_v),
        zeta=None if inputs.mimo_z is None else full(inputs.mimo_z),
        phi=None if inputs.mimo_out is None else full(inputs.mimo_out), d=None if inputs.d is None else full(inputs.d),
        norm_w=None if inputs.norm_weight is None else full(inputs.norm_weight),
        log_decay=by_head(weights.log_decay), gamma=by_head(weights.gamma),
        later=by_head(weights.later + nnF.pad(weights.shift_BcH[..., None], (C - 1, 0))),
        theta=theta.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous(), first=first.contiguous(),
    )  # fmt: skip
    return op, end_angle


def _last_key(k_BRGN: Tensor, inputs: MimoInputs, dims: Dims, angle_BHA: Tensor, divisor: int) -> Tensor:
    """(B,R,H,N): the last token's key, biased and rotated."""
    key = k_BRGN.to(angle_BHA.dtype).repeat_interleave(dims.H // dims.G, dim=2)
    return rotate(key + inputs.k_bias.to(angle_BHA.dtype).transpose(0, 1), angle_BHA, divisor)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; the CPU stands for an H100 or H200."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _by_document(
    inputs: MimoInputs, dims: Dims, chunk_size: int, divisor: int, norm_eps: float, state: MimoState | None,
    bounds: list[int] | Tensor, gates: KernelGates | None,
) -> MimoResult:  # fmt: skip
    """Packed documents as rows of a batch, so that every one has a state before and after it. Behind a shorter
    document dt is 0: nothing there turns, decays or enters a state. Not for `torch.compile`: lengths are read."""
    edges = torch.as_tensor(bounds, device=inputs.v.device)
    lengths = edges.diff()
    rows, longest = len(lengths), int(lengths.max())
    place_nS = torch.arange(longest, device=edges.device)
    behind_nS = place_nS >= lengths[:, None]
    token_nS = (edges[:-1, None] + place_nS).clamp_max(dims.S - 1)

    def tokens(u_1S: Tensor) -> Tensor:
        return u_1S[0][token_nS]

    def scalars(u_1HS: Tensor, masked: bool) -> Tensor:
        found = u_1HS[0][:, token_nS].transpose(0, 1)
        return found.masked_fill(behind_nS[:, None], 0.0) if masked else found

    batch = inputs._replace(
        q=tokens(inputs.q), k=tokens(inputs.k), v=tokens(inputs.v), angles=tokens(inputs.angles),
        z=None if inputs.z is None else tokens(inputs.z), adt=scalars(inputs.adt, True), dt=scalars(inputs.dt, True),
        trap=scalars(inputs.trap, False),
    )  # fmt: skip
    out, final = mimo_sm90(
        batch, dims._replace(B=rows, S=longest), chunk_size, divisor, norm_eps, state, None, gates=gates
    )
    last_n = edges[1:] - 1
    key = _last_key(inputs.k[0, last_n], inputs, dims, final.angle, divisor)
    return out[~behind_nS][None], final._replace(k=key, x=inputs.v[0, last_n].to(key.dtype))
