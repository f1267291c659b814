"""One way to run a kernel: the tensors choose the precision, builds are recorded, too much shared memory is refused."""

from __future__ import annotations

import pytest
import torch

from libs.flags.errors import UserError
from libs.kernels.mimo.sm90 import launch as module
from libs.kernels.mimo.sm90.dialect import CudaDialect
from libs.kernels.mimo.sm90.inspect import inspect
from libs.kernels.mimo.sm90.launch import (
    compile_cuda,
    compiled,
    launch,
    launch_shared,
    opened,
    precision_of,
)
from libs.kernels.mimo.sm90.spec import ScanSpec
from libs.kernels.mimo.sm90.split import CombineSpec, make_combine, make_states
from libs.kernels.mimo.sm90.tiles import planned


def make_sum(T, spec):
    """Adds two rows; the kernel's sum is exact, what is stored is bf16."""
    (n,) = spec

    @T.prim_func
    def main(a: T.Tensor((n,), T.bf16), b: T.Tensor((n,), T.f32), o: T.Tensor((n,), T.bf16)):
        with T.Kernel(1, threads=128):
            for i in T.Parallel(n):
                o[i] = T.wide(a[i]) + b[i]

    return main


@pytest.mark.parametrize("low", [torch.float64, torch.float32, torch.bfloat16])
def test_the_tensors_choose_the_precision(low: torch.dtype) -> None:
    full = torch.float64 if low == torch.float64 else torch.float32
    a, b, o = torch.randn(16).to(low), torch.randn(16).to(full), torch.empty(16, dtype=low)
    kept = a.clone()
    launch(make_sum, (16,), "plain", [a, b, o])
    assert torch.equal(o, (a.to(full) + b).to(low))
    assert torch.equal(a, kept)
    with pytest.raises(AssertionError, match="stands alone"):
        precision_of([a.double(), a.bfloat16()])


def test_every_build_is_recorded_once() -> None:
    """By kernel and variant; a second call builds nothing."""
    before = len(compiled())
    for n in (24, 24, 40):
        launch(make_sum, (n,), "plain", [torch.ones(n), torch.ones(n), torch.empty(n)])
    fresh = compiled()[before:]
    assert [(b.kernel, b.spec, b.device) for b in fresh] == [("make_sum", (n,), "cpu") for n in (24, 40)]
    assert all(b.mode.startswith("c:float32") and b.seconds > 0 for b in fresh)


def test_one_build_serves_every_batch_and_length() -> None:
    """Sizes that kernels take as they come."""
    runs = []
    for B, splits in ((1, 2), (3, 2)):
        local, through = torch.randn(B, 2, splits, 16, 8), torch.rand(B, 2, splits)
        first, init = torch.randn(B, 2, 16, 8), torch.empty(B, 2, splits, 16, 8)
        launch(make_combine, CombineSpec(B, 2, 16, 8, splits), "plain", [local, through, first, init])
        want = first * through[:, :, 0, None, None] + local[:, :, 0]
        assert torch.allclose(init[:, :, 1], want)
        assert torch.equal(init[:, :, 0], first)
        runs.append(len(compiled()))
    assert runs[0] == runs[1]
    assert compiled()[-1].spec == CombineSpec(0, 2, 16, 8, 2)


def test_what_would_be_copied_is_refused() -> None:
    """A copy made on the way would swallow the outputs."""
    a = torch.ones(16, 2)[:, 0]
    with pytest.raises(AssertionError, match="argument 0 of make_sum is not contiguous"):
        launch(make_sum, (16,), "plain", [a, a, a])


@pytest.mark.slow
def test_shared_memory_is_read_from_the_launch() -> None:
    """Compiled without a GPU: the bytes that looking at the compiler's output gives, static ones included."""
    dialect = CudaDialect("ws")
    spec = planned("states", "ws", ScanSpec(1, 1024, 16, 1, 4, 64, 64, 16, splits=8))
    func = make_states(dialect, opened(dialect, spec)[0])
    assert launch_shared(compile_cuda(func, dialect, "states")) == inspect(func, dialect).shared


def test_a_kernel_without_tiles_asks_for_none_and_one_with_too_many_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dialect = CudaDialect("plain")
    kernel = compile_cuda(make_combine(dialect, CombineSpec(1, 16, 64, 64, 8)), dialect, "combine")
    assert launch_shared(kernel) == 0
    monkeypatch.setattr(module, "launch_shared", lambda kernel: 300_000)
    with pytest.raises(UserError, match="combine needs 300000 bytes of shared memory a block, Hopper has 232448"):
        compile_cuda(make_combine(dialect, CombineSpec(1, 16, 64, 64, 8)), dialect, "combine")
