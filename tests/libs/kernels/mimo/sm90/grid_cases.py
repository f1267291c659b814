"""Entries of the tile table, and the comparison of one with what the compilers say."""

from __future__ import annotations

from typing import Any

import pytest

from libs.flags.errors import UserError
from libs.kernels.mimo.sm90.gates import KernelGates, Mode, Psiv
from libs.kernels.mimo.sm90.inspect import SHARED_PER_BLOCK, Facts, mismatches, nvcc_path
from libs.kernels.mimo.sm90.kernel_set import KernelName, Problem, facts
from libs.kernels.mimo.sm90.tiles import TABLE, Kernel, TileShape

ENTRIES = [
    pytest.param(kernel, mode, shape, id=f"{kernel}-{mode}-{'x'.join(map(str, shape))}")
    for (kernel, mode), rows in TABLE.items()
    for shape in rows
]


def _no_nvcc() -> bool:
    try:
        nvcc_path()
    except UserError:
        return True
    return False


needs_nvcc = pytest.mark.skipif(_no_nvcc(), reason="no nvcc on this machine")


def gates_of(mode: Mode, psiv: Psiv = "off") -> KernelGates:
    """Gates that build every kernel in this mode."""
    return KernelGates(
        tma="off" if mode == "plain" else "all", warp_specialization="all" if mode == "ws" else "off", psiv=psiv
    )


def compiled(kernel: KernelName, mode: Mode, shape: TileShape, psiv: Psiv = "off", **options: Any) -> Facts:
    """At the reference size, with `options` of `Problem`; the state passes for a split sequence."""
    return facts(kernel, gates_of(mode, psiv), Problem(shape, splits=8 if "states" in kernel else 1, **options))


def assert_as_tabled(kernel: Kernel, mode: Mode, shape: TileShape) -> Facts:
    """No wrong code, what the gates ask for, the table's spills, and its figures."""
    entry, found = TABLE[kernel, mode][shape], compiled(kernel, mode, shape)
    assert found.lint == ()
    assert mismatches(mode, found) == ()
    assert found.spills <= entry.spills
    assert found.shared == entry.shared <= SHARED_PER_BLOCK
    assert found.blocks == entry.blocks
    assert found.threads == entry.threads + (128 if mode == "ws" else 0)
    assert abs(found.needed - entry.needed) <= 8, "another ptxas may differ a little"
    return found
