"""The Pallas kernels, interpreted on the CPU: they compute attention, and a query sees nothing that it must not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from libs.kernels.attention.pallas import kernels, operator
from libs.kernels.attention.reference import attention_reference
from tests.support.mimo import relative_error
from tests.support.pallas import interpreted, plain

ROOT = Path(__file__).resolve().parents[2]
S, H, G = 384, 4, 2  # three blocks of 128
# Inside blocks, across blocks, of one token, and at the edge of a block.
DOCUMENTS = [0, 50, 128, 129, 300, S]
FP32 = 1e-5
BF16, BF16_GRADIENT = 0.01, 0.012


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(operator, "tpu_call", interpreted)
    return


def given(dtype: torch.dtype = torch.float32, D: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, S, heads, D, generator=generator).to(dtype) for heads in (H, G, G)]


def numbers(bounds: list[int]) -> Tensor:
    return torch.bucketize(torch.arange(S), torch.tensor(bounds[1:-1]), right=True)[None].int()


def weight(D: int = 64) -> Tensor:
    return torch.randn(1, S, H, D, generator=torch.Generator().manual_seed(1))


def pallas(tensors: list[Tensor], bounds: list[int] | None, scale: float = 0.125) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [u.detach().requires_grad_() for u in tensors]
    out = operator.attention_pallas(*leaves, None if bounds is None else numbers(bounds), scale)
    (out * weight(out.shape[-1]).to(out.dtype)).sum().backward()
    return [out.detach(), *(u.grad for u in leaves if u.grad is not None)]


def reference(tensors: list[Tensor], bounds: list[int] | None, scale: float = 0.125) -> list[Tensor]:
    leaves = [u.double().requires_grad_() for u in tensors]
    out = attention_reference(*leaves, bounds, True, scale)
    (out * weight(out.shape[-1]).to(tensors[0].dtype)).sum().backward()
    return [out.detach(), *(u.grad for u in leaves if u.grad is not None)]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [relative_error(a, b) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("bounds", [None, DOCUMENTS], ids=["one_document", "documents"])
def test_equals_the_reference_in_fp32(bounds: list[int] | None) -> None:
    found = errors(pallas(given(), bounds), reference(given(), bounds))
    assert len(found) == 4
    assert max(found) <= FP32


@pytest.mark.parametrize("D", [64, 128])
def test_keeps_the_figures_of_bf16(D: int) -> None:
    low = given(torch.bfloat16, D)
    out, *gradients = errors(pallas(low, DOCUMENTS), reference(low, DOCUMENTS))
    assert out <= BF16
    assert max(gradients) <= BF16_GRADIENT


@pytest.mark.slow
def test_a_mask_left_out_or_another_scale_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    want = reference(given(), DOCUMENTS)
    assert min(errors(pallas(given(), DOCUMENTS, scale=0.13), want)) > 10 * FP32
    scores: Any = kernels._scores
    monkeypatch.setattr(kernels, "_scores", lambda *operands: scores(*operands[:-1], False))
    assert min(errors(pallas(given(), DOCUMENTS), want)) > 10 * FP32


def test_blocks_that_no_query_sees_are_never_read() -> None:
    """Not a number in a whole block of another document: outputs and gradients of the others are the same bits."""
    bounds, first = [0, 128, S], slice(0, 128)
    clean, poisoned = given(), given()
    for u in poisoned:
        u[:, first] = torch.nan
    for got, want in zip(pallas(poisoned, bounds), pallas(clean, bounds), strict=True):
        assert torch.equal(got[:, 128:], want[:, 128:])
        assert got[:, first].isnan().all()


def test_masked_keys_of_a_shared_block_do_not_count() -> None:
    bounds = [0, 50, S]
    clean, poisoned = given(), given()
    poisoned[1][:, :50] = torch.nan
    poisoned[2][:, :50] = 1e30
    ids = numbers(bounds)
    got, want = (operator.attention_pallas(*tensors, ids, 0.125) for tensors in (poisoned, clean))
    assert torch.equal(got[:, 50:], want[:, 50:])


def test_what_the_kernels_are_told_of_the_documents() -> None:
    ids = numbers(DOCUMENTS)
    starts = operator.document_starts(ids)
    assert starts[0].tolist() == [max(b for b in DOCUMENTS if b <= t) for t in range(S)]
    (reach,) = operator.block_reach(starts, 128).tolist()
    blocks = [range(i * 128, i * 128 + 128) for i in range(3)]
    first, whole, last = reach
    for i, queries in enumerate(blocks):
        seen = {int(starts[0, q]) // 128 for q in queries}
        assert first[i] == min(seen)
        assert all(int(starts[0, queries[-1]]) <= keys[0] for keys in blocks[whole[i] :])
        assert whole[i] == 0 or int(starts[0, queries[-1]]) > blocks[whole[i] - 1][0]
        assert last[i] == max(j for j, later in enumerate(blocks) if int(starts[0, later[0]]) <= queries[-1])


def test_the_stand_in_of_the_mesh_test_is_the_kernel() -> None:
    ids = numbers(DOCUMENTS)
    seen: list[float] = []

    def both(kernel: str, problem: kernels.Problem, tensors: Any) -> tuple[Tensor, ...]:
        found = interpreted(kernel, problem, tensors)
        seen.extend(errors(list(found), list(plain(kernel, problem, tensors))))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "tpu_call", both)
        leaves = [u.requires_grad_() for u in given()]
        operator.attention_pallas(*leaves, ids, 0.125).sum().backward()
    assert len(seen) == 5
    assert max(seen) <= FP32


@pytest.mark.slow
def test_on_a_mesh_each_chip_has_its_rows_and_heads() -> None:
    environment = {n: v for n, v in os.environ.items() if n not in ("PJRT_DEVICE", "CPU_NUM_DEVICES")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.pallas_mesh"], cwd=ROOT, capture_output=True, text=True, env=environment,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
