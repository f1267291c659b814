"""Build a kernel for CPU tensors and call it; a cache of built kernels.

A kernel factory is `make(T, spec) -> prim_func`, with a hashable `spec`. Facts about the CUDA side: `inspect.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import tilelang
import torch
from torch import Tensor

from libs.kernels.mimo.sm90.dialect import CpuDialect, Dialect

Factory = Callable[[Any, Any], Any]

# TileLang itself passes no -O. Vector casts are off: they are wrong for half and hide bounds errors.
FAST = ("-O3", "-march=native", "-fno-strict-aliasing", "-w")
QUICK = ("-O1", "-fno-strict-aliasing", "-w")
CPU_PASS_CONFIGS = {"tirx.disable_vectorize": True}


class KernelKey(NamedTuple):
    """What makes a built kernel reusable. `target` names dialect, precision and pass configs (that is, the gates)."""

    version: str
    factory: str
    spec: Hashable
    target: str
    flags: tuple[str, ...]


class Built(NamedTuple):
    """One entry of the cache; `seconds` is what tracing, lowering and the host compiler took."""

    call: Callable[..., Any]
    seconds: float


class KernelCache:
    """Built kernels of this process. `builds` counts misses: after warm-up it must not grow."""

    def __init__(self) -> None:
        self._built: dict[KernelKey, Built] = {}
        self.builds = 0

    def get(self, make: Factory, spec: Hashable, dialect: Dialect, flags: Sequence[str] = QUICK) -> Built:
        """The kernel of `make(dialect, spec)`, built on the first request."""
        key = KernelKey(tilelang.__version__, f"{make.__module__}.{make.__qualname__}", spec, dialect.key, tuple(flags))
        if key not in self._built:
            start = time.perf_counter()
            call = compile_cpu(make(dialect, spec), dialect, flags)
            self._built[key] = Built(call, time.perf_counter() - start)
            self.builds += 1
        return self._built[key]


CACHE = KernelCache()


def compile_cpu(func: Any, dialect: Dialect, flags: Sequence[str] = QUICK) -> Callable[..., Any]:
    """A callable on CPU tensors for a traced kernel. TileLang keeps it on disk too, by the kernel's own text."""
    assert isinstance(dialect, CpuDialect), "the CUDA side is compiled by inspect, and run where there is a GPU"
    with dialect.target:
        kernel: Callable[..., Any] = tilelang.compile(
            func, target="c", target_host="c", execution_backend="cython", compile_flags=list(flags),
            pass_configs=CPU_PASS_CONFIGS,
        )  # fmt: skip
    return kernel


def call(
    make: Factory, spec: Hashable, dialect: CpuDialect, tensors: Sequence[Tensor], flags: Sequence[str] = QUICK
) -> None:
    """Run a kernel on `tensors`, inputs and outputs in the order of its parameters; outputs are written in place.

    Floats must already have the dialect's dtype and be contiguous: a copy made here would swallow the outputs.
    """
    want = getattr(torch, dialect.dtype)
    for i, u in enumerate(tensors):
        assert u.is_contiguous(), f"argument {i} of {make.__name__} is not contiguous"
        assert u.dtype == want or not u.is_floating_point(), f"argument {i} of {make.__name__}: {u.dtype}, not {want}"
    CACHE.get(make, spec, dialect, flags).call(*tensors)


def round_bf16(u: Tensor) -> Tensor:
    """`u` rounded to bfloat16 and widened again: what a bf16 operand looks like to the "bf16" precision."""
    return u.to(torch.bfloat16).to(torch.float32)
