"""The table of shapes: inside the budgets, refusing the rest, and (slow) what the compiler says today."""

from __future__ import annotations

from dataclasses import replace

import pytest

from libs.flags.errors import UserError
from libs.kernels.mimo.sm90.dialect import CudaDialect
from libs.kernels.mimo.sm90.fwd import make_forward
from libs.kernels.mimo.sm90.gates import MODES, KernelGates
from libs.kernels.mimo.sm90.inspect import SHARED_PER_BLOCK, inspect
from libs.kernels.mimo.sm90.spec import ScanSpec
from libs.kernels.mimo.sm90.split import make_states
from libs.kernels.mimo.sm90.tiles import SHAPES, TABLE, TileShape, planned, require_shared, tiles

ACCEPTED = [
    (16, 64, 4, 8), (32, 64, 4, 16), (64, 64, 4, 16), (128, 64, 4, 16), (256, 64, 4, 8), (64, 128, 4, 16),
    (128, 32, 4, 16), (128, 128, 4, 8), (128, 64, 8, 8), (128, 64, 2, 32), (128, 64, 1, 64),
]  # fmt: skip
ENTRIES = [(kernel, mode, shape) for (kernel, mode), rows in TABLE.items() for shape in rows]


def test_all_acceptance_shapes_are_there() -> None:
    """For both kernels, specialized."""
    assert set(SHAPES) == set(ACCEPTED)
    assert set(TABLE["states", "ws"]) == set(ACCEPTED)


@pytest.mark.parametrize("kernel", ["fwd", "states"])
@pytest.mark.parametrize("N", [64, 128])
def test_two_blocks_at_the_reference_shapes(kernel: str, N: int) -> None:
    """The aim: twice the occupancy of one block."""
    assert tiles(kernel, "ws", TileShape(N, 64, 4, 16)).blocks >= 2


def test_every_entry_fits() -> None:
    """Shared memory a block, and at least one block."""
    for kernel, mode, shape in ENTRIES:
        entry = TABLE[kernel, mode][shape]
        assert entry.shared <= SHARED_PER_BLOCK
        assert entry.blocks >= max(1, entry.min_blocks)


def test_an_unknown_shape_is_refused_with_the_nearest() -> None:
    """The message can be acted on."""
    with pytest.raises(UserError, match=r"N=96, P=64, R=4, C=16; nearest: N=(64|128), P=64, R=4, C=16; N=(64|128)"):
        tiles("fwd", "ws", TileShape(96, 64, 4, 16))


def test_too_much_shared_memory_is_refused() -> None:
    """One byte more than there is."""
    require_shared("fwd", SHARED_PER_BLOCK)
    with pytest.raises(UserError, match="232449 bytes"):
        require_shared("fwd", SHARED_PER_BLOCK + 1)


def test_planning_keeps_the_tile_of_a_psiv_that_is_read() -> None:
    """A tile that TMA fills must not be written."""
    spec = ScanSpec(1, 64, 4, 1, 4, 128, 64, 16)
    assert planned("fwd", "ws", spec).share_x
    assert not planned("fwd", "ws", spec._replace(psiv="read")).share_x
    assert replace(KernelGates(), tma="all").mode("bwd") in MODES


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "mode", "shape"), ENTRIES)
def test_the_table_is_what_the_compiler_says(kernel: str, mode: str, shape: TileShape) -> None:
    """Compiled for sm_90a: no spills, no wrong-code pattern, and the figures of the table."""
    entry = TABLE[kernel, mode][shape]
    base = ScanSpec(1, 8192, 16, 1, shape.R, shape.N, shape.P, shape.C)
    spec = planned(kernel, mode, base._replace(splits=8 if kernel == "states" else 1))
    dialect = CudaDialect(mode)
    facts = inspect((make_forward if kernel == "fwd" else make_states)(dialect, spec), dialect)
    assert (facts.spills, facts.lint) == (0, ())
    assert (facts.shared, facts.blocks) == (entry.shared, entry.blocks)
    assert abs(facts.needed - entry.needed) <= 8, "another ptxas may differ a little"
