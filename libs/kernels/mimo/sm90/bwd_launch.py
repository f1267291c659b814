"""The backward of the scan from the two kernels: run on CPU tensors, at any dialect precision.

This is how the sources are checked without a GPU; the launch on CUDA tensors is the business of `autograd`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from libs.kernels.mimo.chunked_layout import Layout, Operands
from libs.kernels.mimo.chunked_terms import DocumentMasks
from libs.kernels.mimo.sm90 import bwd_glue as glue
from libs.kernels.mimo.sm90 import run
from libs.kernels.mimo.sm90.bwd_bwd import bwd_bwd
from libs.kernels.mimo.sm90.bwd_common import BwdSpec, bwd_outputs, fwd_outputs
from libs.kernels.mimo.sm90.bwd_fwd import bwd_fwd
from libs.kernels.mimo.sm90.bwd_split import bwd_combine, bwd_states, states_shapes
from libs.kernels.mimo.sm90.dialect import CpuDialect

Kernel = Callable[[Any, Any], Any]


def scan_backward(
    layout: Layout, masks: DocumentMasks | None, op: Operands, grads: tuple[Tensor, Tensor, Tensor],
    dialect: CpuDialect, *, init_BHsNP: Tensor | None = None, cached_x: bool = False,
    first: Kernel = bwd_fwd, second: Kernel = bwd_bwd,
) -> Operands:  # fmt: skip
    """Gradients of the operands.

    Args:
        grads: those of out, of the final state (B,H,N,P) and of the last key (B,H,N,R).
        init_BHsNP: the state that enters each split; None for an unsplit sequence.
        cached_x: PsiV is made in torch and read by the kernels.
        first, second: the kernel factories, to be replaced by mutants in tests.
    """
    dtype = getattr(torch, dialect.dtype)
    d_out, d_h_end, d_k_last = grads
    init = op.h_first[:, :, None] if init_BHsNP is None else init_BHsNP
    spec = glue.spec_of(layout, op, masks, cached_x=cached_x)._replace(splits=init.shape[2])
    packed = glue.pack_weights(op, masks)
    x = op.v[:, :, None] * op.mimo_v.transpose(0, 1) if cached_x else None
    given = glue.kernel_inputs(spec, op, packed, dtype, dtype, x)
    rows = glue.pad_tokens(d_out, spec.S)
    d_rows = (rows if spec.has_out else rows.flatten(1, 2)).to(dtype).contiguous()
    if dialect.rounds:
        given = given._replace(**{name: run.round_bf16(getattr(given, name)) for name in ("q", "k", "v", "z", "x")})
        d_rows = run.round_bf16(d_rows)
    early = glue.empty(fwd_outputs(spec), dtype, dtype, op.v.device)
    late = glue.empty(bwd_outputs(spec), dtype, dtype, op.v.device)
    run.call(first, spec, dialect, [*given, init.to(dtype).contiguous(), d_rows, *early.values()])
    d_last = _leaving(spec, given, early["dy"], d_h_end.to(dtype).contiguous(), dialect)
    run.call(
        second, spec, dialect,
        [given.q, given.k, given.v, given.x, given.cos, given.sin, given.q_bias, given.k_bias, given.psi, given.d,
         given.small, early["dy"], early["states"], d_last, *late.values()],
    )  # fmt: skip
    return _add_last_key(glue.operand_grads(spec, op, packed, early, late), layout, op, d_k_last)


def _leaving(spec: BwdSpec, given: glue.KernelInputs, dy: Tensor, d_end: Tensor, dialect: CpuDialect) -> Tensor:
    """(B,H,splits,N,P): gradient of the state that leaves each split."""
    if spec.splits == 1:
        return d_end[:, :, None].contiguous()
    local, through = glue.empty(states_shapes(spec)[1], dy.dtype, dy.dtype, dy.device).values()
    run.call(bwd_states, spec, dialect, [given.q, given.cos, given.sin, given.q_bias, given.small, dy, local, through])
    d_last = torch.empty_like(local)
    run.call(bwd_combine, spec, dialect, [local, through, d_end, d_last])
    return d_last


def _add_last_key(grads: Operands, layout: Layout, op: Operands, d_k_last: Tensor) -> Operands:
    with torch.enable_grad():
        leaves = [u.detach().requires_grad_() for u in (op.k, op.k_bias, op.theta)]
        key = glue.last_key(leaves[0], leaves[1], leaves[2], layout)
    d_k, d_bias, d_theta = torch.autograd.grad(key, leaves, d_k_last)
    return grads._replace(k=grads.k + d_k, k_bias=grads.k_bias + d_bias, theta=grads.theta + d_theta)
