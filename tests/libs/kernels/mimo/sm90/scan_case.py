"""Operands of the scan proper for a random call, and the oracle's answer to the same call."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from libs.kernels.mimo import MimoState, chunked, mamba3_mimo
from libs.kernels.mimo.chunked_layout import Layout, Operands
from libs.kernels.mimo.sm90.dialect import CpuDialect
from libs.kernels.mimo.sm90.forward import Forward, scan_forward
from tests.support.mimo import Shape, operands, random_state, relative_error

NAMES = ("Q", "K", "V", "ADT", "DT", "Trap", "Q_bias", "K_bias", "MIMO_V", "MIMO_Z", "MIMO_Out", "Angles", "D", "Z")


class Case(NamedTuple):
    """What the kernels get, and the oracle's out and final state (B,H,N,P)."""

    op: Operands
    layout: Layout
    bounds: list[int] | None
    out: Tensor
    h_end: Tensor


def scan_case(shape: Shape, C: int, bounds: list[int] | None = None, seed: int = 0) -> Case:
    """A call in fp64; without documents it starts from a random state."""
    tensors = operands(shape, torch.float64, seed)
    state = random_state(shape, shape.B) if bounds is None else None
    seen: list[tuple[Layout, Operands]] = []

    class Recorder:
        @staticmethod
        def apply(layout: Layout, masks: object, *rest: Tensor) -> tuple[Tensor, ...]:
            seen.append((layout, Operands(*rest)))
            return original.apply(layout, masks, *rest)

    original = chunked._Scan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_Scan", Recorder)
        _call(tensors, shape, C, bounds, state, "chunked", False)
    if bounds is None:
        out, end = _call(tensors, shape, C, None, state, "reference", True)
    else:  # the state at the end belongs to the last document
        out = _call(tensors, shape, C, bounds, None, "reference", False)
        end = _call(tensors, shape, C, bounds, None, "reference", True)[1]
    return Case(seen[0][1], seen[0][0], bounds, out, end.ssm[-shape.B :].transpose(2, 3))


def _call(tensors, shape: Shape, C: int, bounds, state: MimoState | None, backend: str, return_state: bool):
    return mamba3_mimo(
        *(tensors[name] for name in NAMES), C, shape.divisor, torch.float64, return_state=return_state,
        cu_seqlens=None if bounds is None else torch.tensor(bounds, dtype=torch.int32), initial_state=state,
        norm_weight=tensors["norm_weight"], backend=backend,
    )  # fmt: skip


def run_case(case: Case, dialect: CpuDialect, **options) -> Forward:
    """The forward kernels on a case."""
    return scan_forward(case.op, case.layout, case.bounds, dialect, **options)


def errors(case: Case, got: Forward) -> tuple[float, float]:
    """Relative errors of out and of the final state."""
    return relative_error(got.out, case.out), relative_error(got.h_end, case.h_end)
