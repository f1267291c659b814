"""Gradients by the kernels on the CPU, through the custom op, measured against the oracle's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from libs.kernels.mimo import MimoState, mamba3_mimo
from libs.kernels.mimo.sm90.dialect import CpuDialect, CudaDialect
from libs.kernels.mimo.sm90.gates import KernelGates, Mode
from libs.kernels.mimo.sm90.inspect import SHARED_PER_BLOCK, Facts, inspect
from libs.kernels.mimo.sm90.spec import ScanSpec
from tests.libs.kernels.mimo.sm90.scan_case import OFF, call_kernels, cpu_runs
from tests.support.mimo import Shape, operands, random_state, relative_error, require_grad

FP64 = 1e-9  # acceptance figures of CPU execution against the oracle
FP32 = 1e-5
BF16 = 0.012  # the figure for the GPU; emulated bf16 must already be inside

# Gradients that bwd_fwd alone is answerable for; the others need bwd_bwd too.
OF_FIRST_KERNEL = ("Q", "Q_bias", "MIMO_Z", "MIMO_Out", "Z", "D", "norm_weight")


class Question(NamedTuple):
    """A call, and a random linear function of everything it returns, to be differentiated.

    Attributes:
        cu: documents packed into one row.
        with_state: a state comes in and goes out; with documents one for each.
    """

    shape: Shape
    chunk: int
    cu: tuple[int, ...] | None = None
    with_state: bool = False


def gradients(ask: Question, dtype: torch.dtype, rounded: bool, gates: KernelGates | None) -> dict[str, Tensor]:
    """By the kernels, or with `gates` None by the oracle. With `rounded`, what is bf16 on a GPU is rounded to it before
    anything is computed, and handed to the kernels as bf16."""
    shape, chunk, cu, with_state = ask
    bounds = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    rows = shape.B if cu is None else len(cu) - 1
    given = operands(shape, dtype)
    if rounded:
        low = {name: u.bfloat16() for name in ("Q", "K", "V", "Z") if (u := given[name]) is not None}
        given |= low if gates is not None else {name: u.to(dtype) for name, u in low.items()}
    leaves = require_grad(given)
    state = MimoState(*(u.requires_grad_() for u in random_state(shape, rows, dtype))) if with_state else None
    if gates is None:
        out, final = mamba3_mimo(
            **leaves, chunk_size=chunk, rotary_dim_divisor=shape.divisor, dtype=None, return_state=True,
            cu_seqlens=bounds, initial_state=state, backend="reference",
        )  # fmt: skip
    else:
        out, final = call_kernels(leaves, shape, chunk, bounds, state, gates=gates, return_state=with_state)
    outputs = [out, *final] if with_state else [out]
    generator = torch.Generator().manual_seed(11)
    weights = [torch.randn(u.shape, generator=generator, dtype=torch.float64) for u in outputs]
    if rounded:
        weights[0] = weights[0].bfloat16().double()
    torch.autograd.backward(sum((u * w).sum() for u, w in zip(outputs, weights, strict=True)))
    found = {name: u.grad for name, u in leaves.items() if u is not None}
    return found if state is None else found | {f"state.{name}": u.grad for name, u in state._asdict().items()}


def kernel_gradients(
    ask: Question, dialect: CpuDialect, *, splits: int = 1, gates: KernelGates = OFF
) -> dict[str, Tensor]:
    """By the kernels, in the dialect's precision."""
    with cpu_runs(dialect, splits=splits):
        return gradients(ask, getattr(torch, dialect.dtype), dialect.rounds, gates)


def errors(ask: Question, dialect: CpuDialect, *, splits: int = 1, gates: KernelGates = OFF) -> dict[str, float]:
    """Relative error of every gradient against the oracle in fp64, by the operand's name."""
    want = gradients(ask, torch.float64, dialect.rounds, None)
    got = kernel_gradients(ask, dialect, splits=splits, gates=gates)
    assert got.keys() == want.keys()
    return {name: relative_error(got[name], want[name]) for name in want}


def compiled_for_hopper(kernel: Callable[[CudaDialect, ScanSpec], Any], mode: Mode, N: int, stages: int) -> Facts:
    """The facts of a backward kernel at the reference shape, once those that hold for both are checked."""
    dialect = CudaDialect(mode)
    facts = inspect(kernel(dialect, ScanSpec(1, 1024, 16, 1, 4, N, 64, 16, stages=stages)), dialect)
    assert facts.spills == 0, facts
    assert facts.lint == (), facts
    assert facts.shared <= SHARED_PER_BLOCK, facts
    assert (facts.wgmma, facts.mma) == (7, 0), facts
    assert (facts.tma_loads + facts.bulk_copies > 0) == (mode != "plain"), facts
    assert facts.specialized == (mode == "ws"), facts
    return facts


def mutant(factory: Callable[..., Any], old: str, new: str, folder: Path) -> Callable[..., Any]:
    """The kernel factory with one piece of its source replaced. TileLang reads sources from files."""
    source = Path(str(importlib.util.find_spec(factory.__module__).origin)).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    path = folder / f"{factory.__name__}_mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{abs(hash((old, new)))}", path)
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    changed: Callable[..., Any] = getattr(module, factory.__name__)
    return changed
