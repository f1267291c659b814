"""The first backward kernel by CPU execution of its source: dY, the states, and every gradient it alone makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from libs.kernels.mimo.sm90 import bwd_launch
from libs.kernels.mimo.sm90.bwd_fwd import bwd_fwd
from libs.kernels.mimo.sm90.dialect import CpuDialect
from libs.kernels.mimo.sm90.gates import Mode
from libs.kernels.mimo.sm90.spec import ScanSpec
from tests.libs.kernels.mimo.sm90.bwd_cases import (
    FP64,
    OF_FIRST_KERNEL,
    Question,
    compiled_for_hopper,
    errors,
    kernel_gradients,
    mutant,
)
from tests.support.mimo import Shape

CHUNK = 4
FULL = Shape(B=2, S=11, H=2, R=2, N=8, P=4, norm=True)


def worst(found: dict[str, float]) -> float:
    """Largest error among the gradients that this kernel makes alone."""
    return max(error for name, error in found.items() if name in OF_FIRST_KERNEL)


@pytest.mark.parametrize(
    "shape",
    [
        FULL,
        FULL._replace(norm=False, G=2, divisor=2),
        FULL._replace(B=1, out=False, R=4),
        FULL._replace(B=1, z=False, d=False, R=1),
        pytest.param(FULL._replace(B=1, z=False, out=False, R=8), marks=pytest.mark.slow),
        pytest.param(FULL._replace(z=False, norm=False), marks=pytest.mark.slow),
        pytest.param(FULL._replace(d=False, out=False, z=False, norm=False), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_that_need_only_this_kernel_equal_the_oracle(shape: Shape) -> None:
    found = errors(Question(shape, CHUNK, with_state=True), CpuDialect("float64"))
    assert worst(found) <= FP64, found


def test_reversed_parallel_loops_and_poisoned_tiles_change_no_bit() -> None:
    ask = Question(FULL, CHUNK, with_state=True)
    plain = kernel_gradients(ask, CpuDialect("float64"))
    other = kernel_gradients(ask, CpuDialect("float64", order="reverse", poison=True))
    for name, grad in plain.items():
        assert torch.equal(grad, other[name]), name


@pytest.mark.parametrize(
    ("mode", "N"),
    [
        ("ws", 64),
        pytest.param("ws", 128, marks=pytest.mark.slow),
        pytest.param("tma", 64, marks=pytest.mark.slow),
        pytest.param("tma", 128, marks=pytest.mark.slow),
        pytest.param("plain", 64, marks=pytest.mark.slow),
    ],
)
def test_compiles_for_hopper_without_spills(mode: Mode, N: int) -> None:
    compiled_for_hopper(bwd_fwd, mode, N, stages=int(mode != "plain"))


MUTANTS = {
    "query gradient over the state not decayed": (
        "dq_f[i, n] = dq_f[i, n] * w_sh[CARRY * C + i // R]", "dq_f[i, n] = dq_f[i, n]",
    ),
    "diagonal with the weight of later outputs": (
        "w_sh[GAMMA * C + u], w_sh[LATER * C + u]", "w_sh[LATER * C + u], w_sh[LATER * C + u]",
    ),
    "state enters the next chunk undecayed": ("h[n, p] = h[n, p] * w_sh[THROUGH * C]", "h[n, p] = h[n, p]"),
    "norm taken for a constant": ("g[i, p] - unit[i, p] * along[i] / T.number(float(P))", "g[i, p]"),
    "skip weight left out of the output": ("y[i, p] + d[bh] * x_sh[i, p] if has_d else y[i, p]", "y[i, p]"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bwd_launch, "bwd_fwd", mutant(bwd_fwd, *MUTANTS[name], tmp_path))
    found = errors(Question(FULL, CHUNK, with_state=True), CpuDialect("float64"))
    assert worst(found) > 1e-4, found


def test_a_spec_that_does_not_divide_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        bwd_fwd(CpuDialect(), ScanSpec(1, 30, 2, 1, 2, 8, 4, 8))
