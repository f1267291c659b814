"""The table of shapes: inside the budgets, refusing the rest, and what the compilers say today of a part of it.

All of it is compiled in `test_kernel_grid`.
"""

from __future__ import annotations

from typing import get_args

import pytest

from libs.flags.errors import UserError
from libs.kernels.mimo.sm90.gates import MODES, Mode
from libs.kernels.mimo.sm90.inspect import SHARED_PER_BLOCK
from libs.kernels.mimo.sm90.spec import ScanSpec
from libs.kernels.mimo.sm90.tiles import SHAPES, TABLE, Kernel, TileShape, planned, require_shared, tiles
from tests.libs.kernels.mimo.sm90.grid_cases import ENTRIES, assert_as_tabled, needs_nvcc

ACCEPTED = [
    (16, 64, 4, 8), (32, 64, 4, 16), (64, 64, 4, 16), (128, 64, 4, 16), (256, 64, 4, 8), (64, 128, 4, 16),
    (128, 32, 4, 16), (128, 128, 4, 8), (128, 64, 8, 8), (128, 64, 2, 32), (128, 64, 1, 64),
]  # fmt: skip
REFERENCE, SMALL = TileShape(64, 64, 4, 16), TileShape(16, 64, 4, 8)


def test_every_kernel_and_mode_has_the_acceptance_shapes() -> None:
    assert set(SHAPES) == set(ACCEPTED)
    assert {key for key, rows in TABLE.items() if set(rows) == set(ACCEPTED)} == {
        (kernel, mode) for kernel in get_args(Kernel) for mode in MODES
    }


@pytest.mark.parametrize("kernel", ["fwd", "states", "bwd_states"])
@pytest.mark.parametrize("N", [64, 128])
@pytest.mark.parametrize("mode", MODES)
def test_two_resident_blocks_for_the_forward_and_the_state_passes(kernel: Kernel, N: int, mode: Mode) -> None:
    assert tiles(kernel, mode, TileShape(N, 64, 4, 16)).blocks >= 2


@pytest.mark.parametrize("kernel", ["bwd_fwd", "bwd_bwd"])
@pytest.mark.parametrize("mode", MODES)
def test_two_resident_blocks_for_the_backward_at_the_reference_shape(kernel: Kernel, mode: Mode) -> None:
    assert tiles(kernel, mode, REFERENCE).blocks >= 2


@pytest.mark.parametrize(("kernel", "mode", "shape"), ENTRIES)
def test_every_entry_fits_and_none_specialized_spills(kernel: Kernel, mode: Mode, shape: TileShape) -> None:
    entry = TABLE[kernel, mode][shape]
    assert entry.shared <= SHARED_PER_BLOCK
    assert entry.blocks >= max(1, entry.min_blocks)
    assert entry.spills <= (0 if mode == "ws" else 64)
    assert entry.threads == 128 or entry.min_blocks == 0, "the split of registers is worked out for two warp groups"


def test_an_unknown_shape_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"N=96, P=64, R=4, C=16; nearest: N=(64|128), P=64, R=4, C=16; N=(64|128)"):
        tiles("fwd", "ws", TileShape(96, 64, 4, 16))
    with pytest.raises(UserError, match=r"\(bwd_bwd, plain\) for N=64, P=64, R=4, C=32"):
        planned("bwd_bwd", "plain", ScanSpec(1, 64, 4, 1, 4, 64, 64, 32))


def test_too_much_shared_memory_is_refused() -> None:
    """One byte more than there is."""
    require_shared("fwd", SHARED_PER_BLOCK)
    with pytest.raises(UserError, match="232449 bytes"):
        require_shared("fwd", SHARED_PER_BLOCK + 1)


def test_planning_changes_resources_and_nothing_else() -> None:
    """And keeps the tile of a PsiV that is read: a tile that TMA fills must not be written."""
    spec = ScanSpec(1, 64, 4, 1, 4, 128, 64, 16)
    assert planned("fwd", "ws", spec).share_x
    read = spec._replace(psiv="read")
    assert not planned("fwd", "ws", read).share_x
    assert planned("fwd", "ws", read)._replace(stages=read.stages, min_blocks=0) == read
    back = ScanSpec(1, 64, 4, 1, 4, 64, 128, 16, psiv="read", stages=1)
    wide = planned("bwd_bwd", "ws", back)
    assert wide.threads == 256
    assert wide._replace(threads=128) == back


def test_options_cost_the_forward_no_resident_block() -> None:
    """At the reference shape their tiles do not fit beside those of two blocks, unless x is shared."""
    spec = ScanSpec(1, 64, 4, 1, 4, 64, 64, 16)
    assert not planned("fwd", "ws", spec).share_x
    assert planned("fwd", "ws", spec._replace(packed=True)).share_x
    assert planned("fwd", "ws", spec._replace(norm=True)).share_x
    assert planned("fwd", "ws", spec._replace(divisor=2)).share_x
    assert not planned("fwd", "tma", spec._replace(packed=True, norm=True, divisor=2)).share_x


@needs_nvcc
@pytest.mark.parametrize(
    ("kernel", "mode", "shape"),
    [*((kernel, "ws", REFERENCE) for kernel in ("fwd", "states", "bwd_fwd", "bwd_bwd")),
     ("fwd", "plain", SMALL), ("bwd_fwd", "tma", SMALL), ("bwd_bwd", "plain", SMALL)],
)  # fmt: skip
def test_the_table_is_what_the_compilers_say(kernel: Kernel, mode: Mode, shape: TileShape) -> None:
    facts = assert_as_tabled(kernel, mode, shape)
    if shape == REFERENCE:
        assert facts.wgmma >= {"fwd": 4, "states": 1, "bwd_fwd": 7, "bwd_bwd": 7}[kernel]
        assert facts.mma == 0
        assert facts.grid == (16, 0, 8 if kernel == "states" else 1), "the number of sequences is not compiled in"
