"""Wrong code is found in what TileLang emits for it today, and the right form of the same kernel is clean."""

from __future__ import annotations

from typing import Any

import pytest

from libs.kernels.mimo.sm90.dialect import CudaDialect
from libs.kernels.mimo.sm90.fwd import make_forward
from libs.kernels.mimo.sm90.inspect import tma_ranks
from libs.kernels.mimo.sm90.lint import lint, overlaps
from libs.kernels.mimo.sm90.spec import ScanSpec
from tests.libs.kernels.mimo.sm90 import wrong_code

PATTERNS = {
    "reversed_rows": "division by a negative constant",
    "tile_before_the_loop": "stmatrix before the warp-specialized loop",
    "ranks_in_a_tile": "writes an unstaged tile",
}


def _lowered(name: str, wrong: bool) -> Any:
    dialect = CudaDialect("ws")
    return dialect.lower(getattr(wrong_code, name)(dialect, wrong))


@pytest.mark.parametrize("name", PATTERNS)
def test_each_wrong_kernel_is_found_and_its_right_form_is_clean(name: str) -> None:
    found = lint(_lowered(name, wrong=True).kernel_source, registers=168, threads=256)
    assert found
    assert all(PATTERNS[name] in line for line in found)
    assert lint(_lowered(name, wrong=False).kernel_source, registers=168, threads=256) == []


def test_a_rank_in_the_tile_makes_a_box_of_three_dimensions() -> None:
    assert max(tma_ranks(_lowered("ranks_in_a_tile", wrong=True))) == 3
    assert set(tma_ranks(_lowered("ranks_in_a_tile", wrong=False))) == {2}


def test_registers_that_would_hang_are_caught() -> None:
    """24 + 240 registers are more than two groups of 128 launch with."""
    source = "main_kernel(\n tl::warpgroup_reg_dealloc<24>();\n tl::warpgroup_reg_alloc<240>();"
    assert lint(source, registers=128, threads=256) != []
    assert lint(source.replace("240", "232"), registers=128, threads=256) == []
    assert lint(source, registers=168, threads=256) == []


def test_the_aggressive_merge_is_caught() -> None:
    """TileLang 0.1.15 lays the consumer's tiles over tiles that the producer already refills."""
    dialect = CudaDialect("ws", {"tl.enable_aggressive_shared_memory_merge": True})
    func = make_forward(dialect, ScanSpec(1, 8192, 16, 1, 4, 64, 64, 16))
    found = overlaps(dialect.lower(func).kernel_source, func)
    assert any("q_raw is filled by TMA and shares memory" in line for line in found)


SCRATCH = """main_kernel(
  void* q = ((void*)((char*)buf_dyn_shmem + {q}));
  void* workspace = ((void*)((char*)buf_dyn_shmem + {scratch}));
  a[i] = tl::AllReduce<tl::SumOp, 128, 64, 0, tl::NamedBarrier<128>>::run(a[i], (&(((float*)workspace)[0])));
  tl::tma_load(q_desc, mbarrier[0], (&(((bfloat16_t*)q)[0])), 0);
"""


class _Traced:
    """Stands for a traced kernel with one tile of 64 bf16 numbers."""

    @staticmethod
    def script() -> str:
        return 'q = T.alloc_buffer((64,), "bfloat16", scope="shared.dyn")'


def test_the_scratch_of_reductions_is_known_by_its_uses() -> None:
    """512 bytes for 128 threads; with a batch of four, 2048. A tile nobody knows is our mistake."""
    assert overlaps(SCRATCH.format(q=512, scratch=0), _Traced) == []
    assert overlaps(SCRATCH.format(q=508, scratch=0), _Traced) == [
        "q is filled by TMA and shares memory with workspace"
    ]
    batch = SCRATCH.replace("128>>::run(", "128>, 4, 128>::run_batch(")
    assert overlaps(batch.format(q=2048, scratch=0), _Traced) == []
    assert overlaps(batch.format(q=2047, scratch=0), _Traced) != []
    with pytest.raises(AssertionError, match="unknown size: other"):
        overlaps(SCRATCH.format(q=512, scratch=0).replace("workspace", "other").replace("AllReduce", "Any"), _Traced)
