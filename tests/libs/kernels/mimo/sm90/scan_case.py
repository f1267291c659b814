"""Operands of the kernels for a random call, the oracle's answer to the same call, and CPU runs of the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from libs.kernels.mimo import MimoInputs, MimoState, mamba3_mimo
from libs.kernels.mimo.shapes import MimoResult, check_inputs
from libs.kernels.mimo.sm90 import autograd, launch
from libs.kernels.mimo.sm90.dialect import CpuDialect
from libs.kernels.mimo.sm90.forward import Forward, scan_forward
from libs.kernels.mimo.sm90.gates import KernelGates
from libs.kernels.mimo.sm90.spec import KernelOperands, scan_spec
from tests.support.mimo import Shape, operands, random_state, relative_error

NAMES = {
    "q": "Q", "k": "K", "v": "V", "adt": "ADT", "dt": "DT", "trap": "Trap", "q_bias": "Q_bias", "k_bias": "K_bias",
    "mimo_v": "MIMO_V", "angles": "Angles", "mimo_z": "MIMO_Z", "mimo_out": "MIMO_Out", "d": "D", "z": "Z",
    "norm_weight": "norm_weight",
}  # fmt: skip
OFF = KernelGates()
LOW = ("q", "k", "v", "z")  # bf16 on a GPU


class Case(NamedTuple):
    """What the kernels get, and the oracle's out and final state (B,H,N,P)."""

    op: KernelOperands
    doc: Tensor | None
    how: autograd.How
    out: Tensor
    h_end: Tensor


class _Recorded(Exception):
    pass


@contextmanager
def cpu_runs(dialect: CpuDialect, flags: Sequence[str] = launch.CPU_FLAGS, splits: int | None = None) -> Iterator[None]:
    """Kernels on CPU tensors are built in this dialect, and sequences split this often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "cpu_dialect", lambda precision: dialect)
        patch.setattr(launch, "CPU_FLAGS", tuple(flags))
        if splits is not None:
            patch.setattr(autograd, "plan_splits", lambda *_: splits)
        yield


def call_kernels(
    tensors, shape: Shape, C: int, bounds=None, state: MimoState | None = None, *,
    gates: KernelGates = OFF, return_state: bool = False,
) -> MimoResult:  # fmt: skip
    """`mimo_sm90` on operands by their public names."""
    inputs = MimoInputs(**{ours: tensors[public] for ours, public in NAMES.items()})
    dims = check_inputs(inputs, shape.divisor)
    return autograd.mimo_sm90(
        inputs, dims, C, shape.divisor, 1e-5, state, bounds, gates=gates, return_state=return_state
    )  # fmt: skip


def scan_case(shape: Shape, C: int, bounds: list[int] | None = None, seed: int = 0) -> Case:
    """A call in fp64; without documents it starts from a random state."""
    tensors = operands(shape, torch.float64, seed)
    state = random_state(shape, shape.B) if bounds is None else None
    seen: list[tuple] = []

    def record(*arguments) -> None:
        seen.append(arguments)
        raise _Recorded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "_scan_op", record)
        with pytest.raises(_Recorded):
            call_kernels(tensors, shape, C, bounds, state)
    count = len(KernelOperands._fields)
    op, doc, how = KernelOperands(*seen[0][:count]), seen[0][count], autograd.How(*seen[0][count + 1 :])
    cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    out, end = mamba3_mimo(
        **tensors, chunk_size=C, rotary_dim_divisor=shape.divisor, dtype=torch.float64, return_state=True,
        cu_seqlens=cu, initial_state=state, backend="reference",
    )  # fmt: skip
    # The state at the end belongs to the last document
    return Case(op, doc, how, out, end.ssm[-shape.B :].transpose(2, 3))


def run_case(
    case: Case, dialect: CpuDialect, *, splits: int = 1, psiv: str = "compute", x_BHLP: Tensor | None = None,
    share_x: bool = False, flags: Sequence[str] = launch.CPU_FLAGS,
) -> Forward:  # fmt: skip
    """The forward kernels on a case, without the padding."""
    low = torch.bfloat16 if dialect.rounds else getattr(torch, dialect.dtype)
    acc = getattr(torch, dialect.dtype)
    op = KernelOperands(*(None if u is None else u.to(low if n in LOW else acc) for n, u in case.op._asdict().items()))
    spec = scan_spec(op, *case.how[:3], packed=case.doc is not None, splits=splits)
    with cpu_runs(dialect, flags):
        got = scan_forward(op, case.doc, spec._replace(psiv=psiv, share_x=share_x), "plain", x_BHLP)
    return got._replace(out=got.out[:, : case.out.shape[1]])


def errors(case: Case, got: Forward) -> tuple[float, float]:
    """Relative errors of out and of the final state."""
    return relative_error(got.out, case.out), relative_error(got.h_end, case.h_end)
