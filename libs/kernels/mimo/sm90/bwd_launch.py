"""The backward pass of a whole call: the two kernels, and for a split sequence the two passes between them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from libs.kernels.mimo.sm90 import bwd_glue as glue
from libs.kernels.mimo.sm90.bwd_bwd import bwd_bwd
from libs.kernels.mimo.sm90.bwd_common import bwd_inputs, bwd_outputs, fwd_inputs, fwd_outputs
from libs.kernels.mimo.sm90.bwd_fwd import bwd_fwd
from libs.kernels.mimo.sm90.bwd_split import bwd_combine, bwd_states, states_shapes
from libs.kernels.mimo.sm90.gates import Mode
from libs.kernels.mimo.sm90.launch import launch
from libs.kernels.mimo.sm90.spec import Arguments, KernelOperands, ScanSpec, shared_arguments


class BwdSpecs(NamedTuple):
    """Variants of the kernels of one call; `bwd_states` only matters to a split sequence."""

    bwd_fwd: ScanSpec
    bwd_states: ScanSpec
    bwd_bwd: ScanSpec


def scan_backward(
    op: KernelOperands, doc_S: Tensor | None, specs: BwdSpecs, mode: Mode, init_BHsNP: Tensor, d_out: Tensor,
    d_end_BHNP: Tensor, x_BHLP: Tensor | None = None,
) -> KernelOperands:  # fmt: skip
    """Gradients of the operands.

    Args:
        doc_S: document of each token (int32), when documents are packed.
        init_BHsNP: the state that enters each split, from the forward.
        d_out: gradient of out, in its shape and dtype; d_end_BHNP: that of the final state.
        x_BHLP: (B,H,S*R,P) PsiV, for the kernels whose spec says to read it.
    """
    spec = specs.bwd_fwd
    low, full, device = op.v.dtype, op.psi.dtype, op.v.device
    packed = glue.pack_weights(op, doc_S, spec.C)
    given = shared_arguments(op) | {"cos": op.theta.cos(), "sin": op.theta.sin(), "small": packed.small}
    given |= {"init": init_BHsNP, "d_out": d_out if spec.out else d_out.flatten(1, 2)}
    early = glue.empty(fwd_outputs(spec), low, full, device)
    late = glue.empty(bwd_outputs(spec), low, full, device)
    for made, make, inputs, own in (
        (early, bwd_fwd, fwd_inputs, specs.bwd_fwd),
        (late, bwd_bwd, bwd_inputs, specs.bwd_bwd),
    ):
        assert not own.reads_x or x_BHLP is not None, "a kernel that reads PsiV needs it"
        given["x"] = x_BHLP if own.reads_x and x_BHLP is not None else op.v.new_zeros(1, 1, 1, 1)
        launch(make, own, mode, [*(given[name] for name in inputs(own)), *made.values()])
        if made is early:
            given |= {"dy": early["dy"], "states": early["states"]}
            given["d_last"] = _leaving(specs.bwd_states, given, d_end_BHNP, mode)
    return glue.operand_grads(spec, op, packed, early, late)


def _leaving(spec: ScanSpec, given: Arguments, d_end_BHNP: Tensor, mode: Mode) -> Tensor:
    """(B,H,splits,N,P): gradient of the state that leaves each split."""
    if spec.splits == 1:
        return d_end_BHNP[:, :, None]
    inputs, outputs = states_shapes(spec)
    local, through = glue.empty(outputs, given["dy"].dtype, d_end_BHNP.dtype, d_end_BHNP.device).values()
    launch(bwd_states, spec, mode, [*(given[name] for name in inputs), local, through])
    d_last = local.new_empty(local.shape)
    launch(bwd_combine, spec, "plain", [local, through, d_end_BHNP, d_last])
    return d_last
