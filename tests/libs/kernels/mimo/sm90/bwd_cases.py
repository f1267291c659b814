"""Runs the backward kernels on the CPU inside the ordinary call, and measures their gradients against the oracle."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from libs.kernels.mimo import MimoState, chunked, mamba3_mimo
from libs.kernels.mimo.chunked_layout import Operands
from libs.kernels.mimo.sm90 import bwd_glue, bwd_launch, run
from libs.kernels.mimo.sm90.bwd_common import fwd_outputs
from libs.kernels.mimo.sm90.bwd_fwd import bwd_fwd
from libs.kernels.mimo.sm90.dialect import CpuDialect
from tests.support.mimo import Shape, operands, random_state, relative_error, require_grad

FP64 = 1e-9  # acceptance figures of CPU execution against the oracle
FP32 = 1e-5
BF16 = 0.012  # the figure for the GPU; emulated bf16 must already be inside

# Gradients that bwd_fwd alone is answerable for; the others need bwd_bwd too.
OF_FIRST_KERNEL = ("Q", "Q_bias", "MIMO_Z", "MIMO_Out", "Z", "D", "norm_weight")


def chunk_states(layout: Any, masks: Any, op: Operands, dialect: CpuDialect) -> Tensor:
    """(B,H,chunks,N,P) from an unsplit run of the first kernel."""
    dtype = getattr(torch, dialect.dtype)
    spec = bwd_glue.spec_of(layout, op, masks)
    given = bwd_glue.kernel_inputs(spec, op, bwd_glue.pack_weights(op, masks), dtype, dtype)
    made = bwd_glue.empty(fwd_outputs(spec), dtype, dtype, op.v.device)
    shape = (spec.B, spec.S, spec.H, spec.P) if spec.has_out else (spec.B, spec.S * spec.R, spec.H, spec.P)
    init = op.h_first.to(dtype)[:, :, None].contiguous()
    run.call(bwd_fwd, spec, dialect, [*given, init, torch.zeros(shape, dtype=dtype), *made.values()])
    return made["states"]


def kernel_scan(dialect: CpuDialect, splits: int, options: dict[str, Any]) -> type:
    """The scan with torch's forward and the kernels' backward."""

    class KernelScan(chunked._Scan):
        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            op = Operands(*ctx.saved_tensors[: len(Operands._fields)])
            init = None
            if splits > 1:
                states = chunk_states(ctx.layout, ctx.masks, op, dialect)
                init = states[:, :, :: states.shape[2] // splits]
            got = bwd_launch.scan_backward(ctx.layout, ctx.masks, op, grads, dialect, init_BHsNP=init, **options)
            return (None, None, *(None if g is None else g.to(u.dtype) for g, u in zip(got, op, strict=True)))

    return KernelScan


def gradients(
    shape: Shape, chunk: int, backend: str, cu: tuple[int, ...] | None, with_state: bool, dtype: torch.dtype,
    rounded: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Of a random linear function of everything the call returns; with `rounded`, what is bf16 on a GPU is rounded
    to it before anything is computed."""
    bounds = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    given = operands(shape, dtype)
    if rounded:
        given |= {name: u.bfloat16().to(dtype) for name in ("Q", "K", "V", "Z") if (u := given[name]) is not None}
    leaves = require_grad(given)
    state = MimoState(*(u.requires_grad_() for u in random_state(shape, shape.B, dtype))) if with_state else None
    result = mamba3_mimo(
        **leaves, chunk_size=chunk, rotary_dim_divisor=shape.divisor, dtype=None, return_state=with_state,
        cu_seqlens=bounds, initial_state=state, backend=backend,
    )  # fmt: skip
    outputs = [result[0], *result[1]] if with_state else [result]
    generator = torch.Generator().manual_seed(11)
    weights = [torch.randn(u.shape, generator=generator, dtype=torch.float64) for u in outputs]
    if rounded:
        weights[0] = weights[0].bfloat16().double()
    torch.autograd.backward(sum((u * w).sum() for u, w in zip(outputs, weights, strict=True)))
    found = {name: u.grad for name, u in leaves.items() if u is not None}
    return found if state is None else found | {f"state.{name}": u.grad for name, u in state._asdict().items()}


def kernel_gradients(
    shape: Shape, chunk: int, dialect: CpuDialect, *, cu: tuple[int, ...] | None = None, with_state: bool = False,
    splits: int = 1, **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Of the same function, by the kernels."""
    original = chunked._Scan
    chunked._Scan = kernel_scan(dialect, splits, options)
    try:
        dtype = getattr(torch, dialect.dtype)
        return gradients(shape, chunk, "chunked", cu, with_state, dtype, dialect.rounds)
    finally:
        chunked._Scan = original


def errors(
    shape: Shape, chunk: int, dialect: CpuDialect, *, cu: tuple[int, ...] | None = None, with_state: bool = False,
    splits: int = 1, **options: Any,
) -> dict[str, float]:  # fmt: skip
    """Relative error of every gradient against the oracle in fp64, by the operand's name."""
    want = gradients(shape, chunk, "reference", cu, with_state, torch.float64, dialect.rounds)
    got = kernel_gradients(shape, chunk, dialect, cu=cu, with_state=with_state, splits=splits, **options)
    assert got.keys() == want.keys()
    return {name: relative_error(got[name], want[name]) for name in want}


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
