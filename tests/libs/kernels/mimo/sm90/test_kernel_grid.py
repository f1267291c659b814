"""Every kernel at every shape of the table: compiled for sm_90a in every mode, and run on the CPU against the oracle.

Half an hour where nothing is in the cache, so it has a marker of its own: `make test-kernels`.
"""

from __future__ import annotations

from typing import Any

import pytest

from libs.kernels.mimo.sm90.dialect import CpuDialect
from libs.kernels.mimo.sm90.gates import Mode
from libs.kernels.mimo.sm90.inspect import SHARED_PER_BLOCK, mismatches
from libs.kernels.mimo.sm90.psiv import STAGES
from libs.kernels.mimo.sm90.tiles import SHAPES, Kernel, TileShape
from tests.libs.kernels.mimo.sm90.bwd_cases import FP64, Question, errors
from tests.libs.kernels.mimo.sm90.grid_cases import ENTRIES, assert_as_tabled, compiled, needs_nvcc
from tests.libs.kernels.mimo.sm90.scan_case import errors as forward_errors
from tests.libs.kernels.mimo.sm90.scan_case import run_case, scan_case
from tests.support.mimo import Shape

pytestmark = [pytest.mark.kernels, pytest.mark.timeout(1800)]
OPTIONS: list[dict[str, Any]] = [{"packed": True}, {"norm": True}, {"divisor": 2}, {"G": 16}]
SHAPE_IDS = ["x".join(map(str, shape)) for shape in SHAPES]


@needs_nvcc
@pytest.mark.parametrize(("kernel", "mode", "shape"), ENTRIES)
def test_the_table_is_what_the_compilers_say(kernel: Kernel, mode: Mode, shape: TileShape) -> None:
    assert_as_tabled(kernel, mode, shape)


@needs_nvcc
@pytest.mark.parametrize("psiv", STAGES)
@pytest.mark.parametrize("N", [64, 128])
@pytest.mark.parametrize("kernel", ["fwd", "bwd_fwd", "bwd_bwd"])
def test_reading_and_writing_psiv_spills_nothing(kernel: Kernel, N: int, psiv: str) -> None:
    found = compiled(kernel, "ws", TileShape(N, 64, 4, 16), psiv)
    assert (found.spills, found.lint, mismatches("ws", found)) == (0, (), ())
    assert found.shared <= SHARED_PER_BLOCK


@needs_nvcc
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["ws", "tma"])
@pytest.mark.parametrize("kernel", ["fwd", "states", "bwd_fwd", "bwd_states", "bwd_bwd"])
def test_options_change_nothing_that_matters(kernel: Kernel, mode: Mode, options: dict[str, Any]) -> None:
    """At the reference shape, with the resources of the table."""
    found = compiled(kernel, mode, TileShape(64, 64, 4, 16), **options)
    assert (found.spills, found.lint, mismatches(mode, found)) == (0, (), ())
    assert found.shared <= SHARED_PER_BLOCK
    assert found.blocks >= 2


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_the_forward_at_every_shape(shape: TileShape) -> None:
    """Ragged, in fp64, and in emulated bf16 inside the figure for a GPU."""
    case = scan_case(_small(shape), shape.C)
    assert max(forward_errors(case, run_case(case, CpuDialect("float64", poison=True)))) < 1e-12
    assert max(forward_errors(case, run_case(case, CpuDialect("bf16")))) < 1e-2


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_every_gradient_at_every_shape(shape: TileShape) -> None:
    found = errors(Question(_small(shape), shape.C, with_state=True), CpuDialect("float64"))
    assert len(found) >= 14
    assert max(found.values()) <= FP64, found


def _small(shape: TileShape) -> Shape:
    """Two heads of one group, two and a half chunks."""
    return Shape(S=2 * shape.C + shape.C // 2, H=2, R=shape.R, N=shape.N, P=shape.P)
