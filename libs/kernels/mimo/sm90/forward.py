"""The forward pass of a whole call: arguments, output buffers, one kernel or the three of a split sequence.

Runs on the CPU through TileLang's "c" target, in any precision of the dialect.
"""
# B sequences  S tokens, whole chunks  H heads  R rank  N state  P head width

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from libs.kernels.mimo.chunked_layout import Layout, Operands
from libs.kernels.mimo.sm90 import run
from libs.kernels.mimo.sm90.dialect import CpuDialect
from libs.kernels.mimo.sm90.fwd import make_forward
from libs.kernels.mimo.sm90.spec import ScanArguments, ScanSpec, scan_arguments, scan_spec
from libs.kernels.mimo.sm90.split import CombineSpec, make_combine, make_states


class Forward(NamedTuple):
    """Attributes:
    out: (B,S,H,P), or (B,S,R,H,P) without MIMO_Out, without the padding.
    h_end: (B,H,N,P).
    init_BHsNP: the state that entered each split.
    x_BHLP: PsiV if the variant wrote it.
    """

    out: Tensor
    h_end: Tensor
    init_BHsNP: Tensor
    x_BHLP: Tensor | None


def scan_forward(
    op: Operands, layout: Layout, bounds: list[int] | None, dialect: CpuDialect, *, splits: int = 1,
    psiv: str = "compute", x_BHLP: Tensor | None = None, share_x: bool = False, flags: Sequence[str] = run.QUICK,
) -> Forward:  # fmt: skip
    """Forward of one call on the CPU. `splits` must divide the number of chunks; `psiv` "read" needs `x_BHLP`."""
    acc: torch.dtype = getattr(torch, dialect.dtype)
    spec = scan_spec(op, layout, bounds is not None)._replace(splits=splits, psiv=psiv, share_x=share_x)
    args = scan_arguments(op, layout, bounds, acc, acc)
    if dialect.rounds:
        args = args._replace(**{name: run.round_bf16(getattr(args, name)) for name in args._fields[:4]})
    first = op.h_first.to(acc).contiguous()
    init = first[:, :, None] if splits == 1 else split_states(args, spec, first, dialect)
    return _outputs(args, spec, init.contiguous(), layout.dims.S, x_BHLP, dialect, flags)


def split_states(args: ScanArguments, spec: ScanSpec, first_BHNP: Tensor, dialect: CpuDialect) -> Tensor:
    """(B,H,splits,N,P): the state that enters each split, from the state pass and the combining pass."""
    B, H, N, P = first_BHNP.shape
    local = first_BHNP.new_empty(B, H, spec.splits, N, P)
    total = first_BHNP.new_empty(B, H, spec.splits)
    run.call(make_states, spec, dialect, [
        args.k_BLGN, args.v_BSHP, args.psi_HRP, args.k_bias_HRN, args.log_decay_BHS, args.later_BHS, args.theta_BSHA,
        args.doc_S, args.before_S, local, total,
    ])  # fmt: skip
    init = torch.empty_like(local)
    run.call(make_combine, CombineSpec(B, H, N, P, spec.splits), dialect, [local, total, first_BHNP, init])
    return init


def _outputs(
    args: ScanArguments, spec: ScanSpec, init: Tensor, tokens: int, x_BHLP: Tensor | None, dialect: CpuDialect,
    flags: Sequence[str],
) -> Forward:  # fmt: skip
    B, S, H, R, P = spec.B, spec.S, spec.H, spec.R, spec.P
    out = init.new_empty((B, S, H, P) if spec.out else (B, S * R, H, P))
    last = init.new_empty(B, H, spec.N, P)
    if spec.psiv == "compute":
        x = init.new_zeros(1, 1, 1, 1)
    elif spec.psiv == "read":
        assert x_BHLP is not None, "reading PsiV needs it"
        x = x_BHLP
    else:
        x = init.new_empty(B, H, S * R, P)
    run.call(make_forward, spec, dialect, [*args, init, x, out, last], flags)
    shaped = out if spec.out else out.view(B, S, R, H, P)
    return Forward(shaped[:, :tokens], last, init, x if spec.psiv == "write" else None)
