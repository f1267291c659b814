"""Compiling for Hopper without one: what a gate asks for is in the emitted source, and wrong code is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from libs.flags.errors import UserError
from libs.kernels.mimo.sm90 import inspect as inspect_module
from libs.kernels.mimo.sm90.dialect import CudaDialect
from libs.kernels.mimo.sm90.inspect import (
    Facts,
    inspect,
    mismatches,
    nvcc_path,
    parse_ptxas,
    resident_blocks,
    tma_ranks,
)
from libs.kernels.mimo.sm90.spec import ScanSpec
from libs.kernels.mimo.sm90.split import CombineSpec, make_combine, make_states
from libs.kernels.mimo.sm90.tiles import planned

REFERENCE = ScanSpec(1, 8192, 16, 1, 4, 64, 64, 16)

PTXAS = """ptxas info    : Compiling entry function 'main_kernel' for 'sm_90a'
ptxas info    : Function properties for main_kernel
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 168 registers, used 4 barriers, 40 bytes smem, 500 bytes cmem[0]
"""


def _states(mode: str, **changes: int) -> tuple[object, CudaDialect]:
    dialect = CudaDialect(mode)
    spec = planned("states", mode, REFERENCE._replace(splits=8, **changes))
    return make_states(dialect, spec), dialect


def test_off_emits_no_tma() -> None:
    """Neither loads nor stores; tiles come by cp.async."""
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


def test_what_the_gates_ask_for_is_compared_with_what_is_emitted() -> None:
    """Each way in which a kernel can miss its mode, one at a time."""
    tma = Facts(
        (16, 1, 1), 128, 1, 100, 100, 0, 2, tma_loads=3, tma_stores=1, bulk_copies=4, async_copies=0, wgmma=4, mma=0,
        specialized=False, tma_ranks=(2, 2, 1), lint=(),
    )  # fmt: skip
    plain = tma._replace(tma_loads=0, tma_stores=0, bulk_copies=0, tma_ranks=())
    assert mismatches("tma", tma) == ()
    assert mismatches("ws", tma._replace(specialized=True)) == ()
    assert mismatches("plain", plain) == ()
    assert mismatches("plain", plain._replace(tma_stores=1)) == ("1 TMA sites, although TMA is off",)
    assert mismatches("plain", plain._replace(specialized=True)) == ("warp specialization is on in mode plain",)
    assert len(mismatches("tma", plain)) == 2
    assert mismatches("tma", tma._replace(tma_ranks=(2, 3))) == (
        "TMA boxes of 2, 3 dimensions; tiles must be two-dimensional",
    )
    assert mismatches("ws", tma) == ("warp specialization is off in mode ws",)


def test_facts_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text is compiled once; another text, or another mode, is another entry."""
    monkeypatch.setattr(inspect_module.tilelang_env, "TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inspect_module, "tool_versions", lambda: {"tilelang": "1", "nvcc": "2"})
    seen = []

    def look(func: object, dialect: CudaDialect) -> Facts:
        seen.append(dialect.mode)
        return Facts((16, 1, 8), 256, 9, 128, 80, 0, 3, 2, 0, 4, 0, 1, 0, True, (2, 2), ("a finding",))

    monkeypatch.setattr(inspect_module, "inspect_now", look)
    first = inspect(*_states("ws"))
    assert inspect(*_states("ws")) == first
    assert inspect(*_states("tma")) == first
    inspect(*_states("ws", G=2))
    assert seen == ["ws", "tma", "ws"]


def test_nvcc_comes_from_the_path_or_from_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare machine needs no CUDA toolkit; with neither, the error says what to install."""
    find = nvcc_path.__wrapped__
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert find() == "/usr/bin/nvcc"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    wheel = tmp_path / "nvidia_cuda_nvcc-13.0.88.dist-info"
    wheel.mkdir()
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-nvcc\nVersion: 13.0.88\n")
    (wheel / "RECORD").write_text("nvidia/cu13/bin/ptxas,,\nnvidia/cu13/bin/nvcc,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find() == str(tmp_path / "nvidia/cu13/bin/nvcc")
    (wheel / "RECORD").write_text("nvidia/cu12/bin/ptxas,,\n")
    with pytest.raises(UserError, match="install the extra `dev`"):
        find()


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
