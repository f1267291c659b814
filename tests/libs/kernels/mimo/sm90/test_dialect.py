"""The dialect: the same source, right in every precision and order, and the traps of the CPU target closed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from libs.kernels.mimo.sm90 import launch
from libs.kernels.mimo.sm90.dialect import CpuDialect, CudaDialect, Order, Precision
from libs.kernels.mimo.sm90.gates import KernelGates, pass_configs
from tests.libs.kernels.mimo.sm90.scan_case import cpu_runs


def call(make: Any, spec: Any, dialect: CpuDialect, tensors: list[torch.Tensor]) -> None:
    """Run a kernel in this very dialect."""
    with cpu_runs(dialect):
        launch.launch(make, spec, "plain", tensors)


def make_elementwise(T: Any, shape: tuple[int, int]) -> Any:
    """o = exp(a) + silu(a) cos(a) sin(a), by way of a low tile."""
    M, N = shape

    @T.prim_func
    def main(a: T.Tensor((M, N), T.f32), o: T.Tensor((M, N), T.f32)):
        with T.Kernel(1, threads=128) as _:
            low = T.alloc_shared((M, N), T.bf16)
            for i, j in T.Parallel(M, N):
                low[i, j] = T.round_bf16(a[i, j])
            for i, j in T.Parallel(M, N):
                cosine, sine = T.cos_sin(T.wide(low[i, j]))
                o[i, j] = T.exp(T.wide(low[i, j])) + T.silu(T.wide(low[i, j])) * cosine * sine

    return main


def make_racy(T: Any, n: int) -> Any:
    """Each iteration reads what the one before wrote."""

    @T.prim_func
    def main(a: T.Tensor((n + 1,), T.f32)):
        with T.Kernel(1, threads=128) as _:
            for i in T.Parallel(n):
                a[i + 1] = a[i] + T.number(1.0)

    return main


def make_unwritten(T: Any, n: int) -> Any:
    """Half of a tile is never written."""

    @T.prim_func
    def main(o: T.Tensor((n,), T.f32)):
        with T.Kernel(1, threads=128) as _:
            tile = T.alloc_shared((n,), T.f32)
            for i in T.Parallel(n // 2):
                tile[i] = T.number(1.0)
            for i in T.Parallel(n):
                o[i] = tile[i]

    return main


@pytest.mark.parametrize(("precision", "bound"), [("float64", 1e-15), ("float32", 1e-6), ("bf16", 1e-6)])
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_one_source_in_every_precision(precision: Precision, order: Order, bound: float) -> None:
    """exp, silu, cos and sin are exact to the precision; "bf16" rounds exactly as torch does."""
    dialect = CpuDialect(precision, order, poison=True)
    a = 6 * torch.rand(8, 16, dtype=getattr(torch, dialect.dtype))
    o = torch.empty_like(a)
    call(make_elementwise, (8, 16), dialect, [a, o])
    low = a.bfloat16().float() if precision == "bf16" else a
    want = low.exp() + torch.nn.functional.silu(low) * low.cos() * low.sin()
    assert torch.allclose(o, want, rtol=bound, atol=bound)
    if precision == "bf16":
        assert not torch.allclose(o, a.exp() + torch.nn.functional.silu(a) * a.cos() * a.sin(), rtol=1e-5)


def test_reversed_order_shows_a_race() -> None:
    """A chain between iterations gives another result last to first."""
    results = []
    for order in ("forward", "reverse"):
        a = torch.zeros(9, dtype=torch.float64)
        call(make_racy, 8, CpuDialect("float64", order), [a])
        results.append(a)
    assert not torch.equal(*results)


def test_poison_shows_a_read_before_the_write() -> None:
    """What was never written is NaN."""
    o = torch.zeros(8, dtype=torch.float64)
    call(make_unwritten, 8, CpuDialect("float64", poison=True), [o])
    assert o.isnan().tolist() == [False] * 4 + [True] * 4


def test_a_constant_the_generator_would_cut_is_refused() -> None:
    """TileLang's C generator prints seven digits."""
    with pytest.raises(AssertionError, match="cut"):
        CpuDialect("float64").number(3.141592653589793)


def test_tiles_of_three_dimensions_are_refused() -> None:
    """They would be neither gemm operands nor 2-D TMA boxes."""
    with pytest.raises(AssertionError, match="two dimensions"):
        CpuDialect().alloc_shared((4, 4, 4), "float64")


def test_wrong_dtype_and_strides_are_refused() -> None:
    """A silent copy would lose the outputs."""
    a = torch.zeros(8, 16, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"argument 0 of make_elementwise is torch\.float64 among float32"):
        call(make_elementwise, (8, 16), CpuDialect("float32"), [a, a])
    with pytest.raises(AssertionError, match="contiguous"):
        call(make_elementwise, (16, 8), CpuDialect("float64"), [a.t(), a.t()])


def test_the_cache_builds_a_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same source, spec and dialect: one build; another dialect: another."""
    monkeypatch.setattr(launch, "_built", {})
    before = len(launch.compiled())
    for order, want in (("forward", 1), ("forward", 1), ("reverse", 2)):
        call(make_racy, 8, CpuDialect("float64", order), [torch.zeros(9, dtype=torch.float64)])
        assert len(launch.compiled()) - before == want


def test_gates_become_modes_and_pass_configs() -> None:
    """Each side gets what was asked for it; specialization without TMA is nonsense."""
    assert KernelGates().mode("fwd") == "plain"
    gates = KernelGates(tma="all", warp_specialization="fwd")
    assert (gates.mode("fwd"), gates.mode("bwd")) == ("ws", "tma")
    assert KernelGates(tma="fwd").mode("bwd") == "plain"
    with pytest.raises(AssertionError, match="needs tma"):
        KernelGates(tma="fwd", warp_specialization="all")
    assert pass_configs("plain")["tl.disable_warp_specialized"], "disable_tma_lower alone leaves TMA on"
    assert len({CudaDialect(mode).key for mode in ("plain", "tma", "ws")}) == 3
    assert all("tl.enable_aggressive_shared_memory_merge" not in pass_configs(m) for m in ("plain", "tma", "ws"))
