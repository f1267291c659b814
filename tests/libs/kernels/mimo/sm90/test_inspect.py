"""Compiling for Hopper without one: what a gate asks for is in the emitted source, and wrong code is found."""

from __future__ import annotations

import shutil

import pytest

from libs.kernels.mimo.sm90.dialect import CudaDialect
from libs.kernels.mimo.sm90.fwd import make_forward
from libs.kernels.mimo.sm90.inspect import (
    SHARED_PER_BLOCK,
    Facts,
    inspect,
    lint,
    overlaps,
    parse_ptxas,
    resident_blocks,
    tma_ranks,
)
from libs.kernels.mimo.sm90.spec import ScanSpec
from libs.kernels.mimo.sm90.split import CombineSpec, make_combine, make_states
from libs.kernels.mimo.sm90.tiles import planned

REFERENCE = ScanSpec(1, 8192, 16, 1, 4, 64, 64, 16)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")

PTXAS = """ptxas info    : Compiling entry function 'main_kernel' for 'sm_90a'
ptxas info    : Function properties for main_kernel
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 168 registers, used 4 barriers, 40 bytes smem, 500 bytes cmem[0]
"""


def _states(mode: str, **changes: int) -> tuple[object, CudaDialect]:
    dialect = CudaDialect(mode)
    spec = planned("states", mode, REFERENCE._replace(splits=8, **changes))
    return make_states(dialect, spec), dialect


@needs_nvcc
def test_the_state_pass_specialized() -> None:
    """TMA from a producer group, wgmma, no spills, three blocks, and a grid that fills the machine."""
    facts = inspect(*_states("ws"))
    _assert_hopper(facts)
    assert facts.blocks == 3
    assert (facts.grid, facts.busy) == ((16, 1, 8), 128)


@needs_nvcc
def test_the_forward_specialized() -> None:
    """Two blocks at the reference shape; unsplit at B = 1 it keeps 16 multiprocessors busy."""
    dialect = CudaDialect("ws")
    facts = inspect(make_forward(dialect, planned("fwd", "ws", REFERENCE)), dialect)
    _assert_hopper(facts)
    assert facts.wgmma == 4
    assert facts.blocks == 2
    assert facts.busy == 16


def _assert_hopper(facts: Facts) -> None:
    assert facts.specialized
    assert facts.tma_loads > 0
    assert facts.wgmma > 0
    assert facts.spills == 0
    assert facts.shared <= SHARED_PER_BLOCK
    assert facts.lint == ()


def test_off_emits_no_tma() -> None:
    """Neither loads nor stores; tiles come by cp.async, two stages deep."""
    func, dialect = _states("plain")
    source = dialect.lower(func).kernel_source
    assert "tma_load" not in source
    assert "tma_store" not in source
    assert "cp_async_gs" in source


def test_tma_without_a_producer() -> None:
    """TMA loads, and no warp specialization."""
    func, dialect = _states("tma")
    source = dialect.lower(func).kernel_source
    assert "tma_load" in source
    assert "warpgroup_reg" not in source


def test_tiles_of_groups_are_two_dimensional_boxes() -> None:
    """With G > 1 the keys are strided: they come by descriptor, in flat tiles."""
    func, dialect = _states("ws", G=4)
    artifact = dialect.lower(func)
    assert "tma_load(k_desc" in artifact.kernel_source
    assert tma_ranks(artifact) == (2, 2, 2)


def test_the_combining_pass_lowers() -> None:
    """It has no tiles at all."""
    dialect = CudaDialect("plain")
    assert "main_kernel" in dialect.lower(make_combine(dialect, CombineSpec(1, 16, 64, 64, 8))).kernel_source


def test_the_aggressive_merge_is_caught() -> None:
    """TileLang 0.1.15 lays the consumer's tiles over tiles that the producer already refills."""
    dialect = CudaDialect("ws", {"tl.enable_aggressive_shared_memory_merge": True})
    func = make_forward(dialect, REFERENCE)
    found = overlaps(dialect.lower(func).kernel_source, func)
    assert any("q_raw is filled by TMA and shares memory" in line for line in found)


def test_registers_that_would_hang_are_caught() -> None:
    """24 + 240 registers are more than two groups of 128 launch with."""
    source = "main_kernel(\n tl::warpgroup_reg_dealloc<24>();\n tl::warpgroup_reg_alloc<240>();"
    assert lint(source, registers=128, threads=256) != []
    assert lint(source.replace("240", "232"), registers=128, threads=256) == []
    assert lint(source, registers=168, threads=256) == []


def test_lint_finds_the_wrong_code_of_0_1_15() -> None:
    """Each pattern, and the right form of each."""
    branch = "  if (((int)threadIdx.x) < 128) {{\n    tl::warpgroup_reg_dealloc<24>();\n"
    prelude = "main_kernel(\n{call}  mbarrier[0].init(1);\n" + branch
    assert lint(prelude.format(call="  tl::ptx_stmatrix_m8n8_x4(a);\n"), registers=168, threads=256) != []
    assert lint(prelude.format(call=""), registers=168, threads=256) == []
    fill = "main_kernel(\n tl::tma_load(k_desc, mbarrier[(c & 1)], (&(((bfloat16_t*)k)[{at}])), 0);\n"
    assert lint(fill.format(at="0"), registers=168, threads=256) != []
    assert lint(fill.format(at="((c & 1) * 4096)"), registers=168, threads=256) == []
    assert lint("main_kernel(\n int rdiv = (i / -4);\n", registers=168, threads=256) != []
    assert lint("main_kernel(\n int rdiv = (i / 4);\n", registers=168, threads=256) == []


def test_ptxas_log_is_read() -> None:
    """Registers, both kinds of spill, static shared memory."""
    assert parse_ptxas(PTXAS) == (168, 12, 20, 40)
    with pytest.raises(AssertionError, match="no kernel"):
        parse_ptxas("ptxas info : nothing")


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [(256, 128, 115_712, 2), (256, 128, 115_713, 1), (256, 129, 1000, 1), (128, 255, 1000, 2), (128, 64, 232_449, 0),
     (128, 32, 0, 16), (256, 80, 48_128, 3)],
)  # fmt: skip
def test_resident_blocks(threads: int, registers: int, shared: int, blocks: int) -> None:
    """Each limit in turn: shared memory to the byte, registers, too much for any block."""
    assert resident_blocks(threads, registers, shared) == blocks
