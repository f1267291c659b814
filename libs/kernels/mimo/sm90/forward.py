"""The forward pass of a whole call on the kernels: one kernel, or the three of a split sequence."""
# B sequences  S tokens, whole chunks  H heads  R rank  N state  P head width

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from libs.kernels.mimo.sm90.fwd import make_forward
from libs.kernels.mimo.sm90.gates import Mode
from libs.kernels.mimo.sm90.launch import launch
from libs.kernels.mimo.sm90.spec import Arguments, KernelOperands, ScanSpec, documents_before, shared_arguments
from libs.kernels.mimo.sm90.split import CombineSpec, make_combine, make_states

READ = (
    "q", "k", "v", "z", "psi", "zeta", "phi", "q_bias", "k_bias", "d", "norm_w", "log_decay", "gamma", "later",
    "theta", "doc", "before",
)  # fmt: skip
READ_BY_STATES = ("k", "v", "psi", "k_bias", "log_decay", "later", "theta", "doc", "before")


class Forward(NamedTuple):
    """Attributes:
    out: (B,S,H,P), or (B,S,R,H,P) without MIMO_Out.
    h_end: (B,H,N,P).
    init_BHsNP: the state that entered each split.
    """

    out: Tensor
    h_end: Tensor
    init_BHsNP: Tensor


def scan_forward(
    op: KernelOperands, doc_S: Tensor | None, spec: ScanSpec, mode: Mode, x_BHLP: Tensor | None = None,
    states_spec: ScanSpec | None = None,
) -> Forward:  # fmt: skip
    """Forward of one call.

    Args:
        doc_S: document of each token (int32), when documents are packed.
        x_BHLP: (B,H,S*R,P) PsiV, read or written as `spec.psiv` says; None when it is computed.
        states_spec: the variant of the state pass of a split sequence; None takes `spec`.
    """
    assert spec.chunks % spec.splits == 0, f"{spec.chunks} chunks do not divide into {spec.splits} splits"
    given = shared_arguments(op) | _weights(op, doc_S, spec.C)
    if spec.splits == 1:
        init = op.first[:, :, None]
    else:
        init = _entering_states(given, spec if states_spec is None else states_spec, op.first, mode)
    B, S, H, R, P = spec.B, spec.S, spec.H, spec.R, spec.P
    out = op.v.new_empty((B, S, H, P) if spec.out else (B, S * R, H, P))
    last = torch.empty_like(op.first)
    assert (x_BHLP is None) == (spec.psiv == "compute"), f"PsiV to {spec.psiv}: {x_BHLP}"
    x = op.v.new_zeros(1, 1, 1, 1) if x_BHLP is None else x_BHLP
    launch(make_forward, spec, mode, [*(given[name] for name in READ), init, x, out, last])
    return Forward(out if spec.out else out.view(B, S, R, H, P), last, init)


def _weights(op: KernelOperands, doc_S: Tensor | None, C: int) -> Arguments:
    none = torch.zeros(1, dtype=torch.int32, device=op.v.device)
    return {
        "log_decay": op.log_decay, "gamma": op.gamma, "later": op.later, "theta": op.theta,
        "doc": none if doc_S is None else doc_S, "before": none if doc_S is None else documents_before(doc_S, C),
    }  # fmt: skip


def _entering_states(given: Arguments, spec: ScanSpec, first_BHNP: Tensor, mode: Mode) -> Tensor:
    """(B,H,splits,N,P): the state that enters each split, from the state pass and the combining pass."""
    B, H, N, P = first_BHNP.shape
    local = first_BHNP.new_empty(B, H, spec.splits, N, P)
    through = first_BHNP.new_empty(B, H, spec.splits)
    launch(make_states, spec._replace(psiv="compute"), mode, [*(given[n] for n in READ_BY_STATES), local, through])
    init = torch.empty_like(local)
    launch(make_combine, CombineSpec(B, H, N, P, spec.splits), "plain", [local, through, first_BHNP, init])
    return init
