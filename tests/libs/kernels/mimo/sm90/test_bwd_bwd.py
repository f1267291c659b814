"""Both backward kernels together, by CPU execution of their sources: all fourteen gradients and those of the state."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.kernels.mimo.sm90 import bwd_glue, bwd_launch
from libs.kernels.mimo.sm90.bwd_bwd import bwd_bwd
from libs.kernels.mimo.sm90.bwd_split import bwd_states
from libs.kernels.mimo.sm90.dialect import CpuDialect
from libs.kernels.mimo.sm90.gates import KernelGates, Mode
from tests.libs.kernels.mimo.sm90.bwd_cases import BF16, FP32, FP64, Question, compiled_for_hopper, errors, mutant
from tests.support.mimo import Shape

CHUNK = 4
# The same shapes as in test_bwd_fwd, so that kernels are built once.
FULL = Shape(B=2, S=11, H=2, R=2, N=8, P=4, norm=True)
PACKED = Shape(B=1, S=27, H=2, R=2, N=8, P=4, norm=True)
DOCUMENTS = (0, 1, 3, 9, 16, 21, 27)  # shorter than a chunk, across chunks, and on a chunk's edge


@pytest.mark.parametrize(
    "shape",
    [
        FULL,
        FULL._replace(norm=False, G=2, divisor=2),
        FULL._replace(B=1, out=False, R=4),
        FULL._replace(B=1, z=False, d=False, R=1),
        pytest.param(FULL._replace(B=1, z=False, out=False, R=8), marks=pytest.mark.slow),
        pytest.param(FULL._replace(z=False, norm=False), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_gradient_equals_the_oracle(shape: Shape) -> None:
    found = errors(Question(shape, CHUNK, with_state=True), CpuDialect("float64"))
    assert len(found) >= 14
    assert max(found.values()) <= FP64, found


def test_packed_documents() -> None:
    found = errors(Question(PACKED, CHUNK, DOCUMENTS), CpuDialect("float64"))
    assert max(found.values()) <= FP64, found


@pytest.mark.parametrize("splits", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cu", [None, pytest.param(DOCUMENTS, marks=pytest.mark.slow)])
def test_split_sequence(splits: int, cu: tuple[int, ...] | None) -> None:
    found = errors(Question(PACKED, CHUNK, cu, with_state=cu is None), CpuDialect("float64"), splits=splits)
    assert max(found.values()) <= FP64, found


def test_psiv_from_memory() -> None:
    found = errors(
        Question(FULL, CHUNK, with_state=True), CpuDialect("float64"), gates=KernelGates(psiv="python_precompute")
    )
    assert max(found.values()) <= FP64, found


def test_fp32_meets_its_figure() -> None:
    shape = Shape(S=70, H=2, R=4, N=16, P=16, norm=True)
    found = errors(Question(shape, 16), CpuDialect("float32"))
    assert max(found.values()) <= FP32, found


def test_emulated_bf16_meets_the_gpu_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the angles only because their sums are anchored at the chunks' ends: without, rounding piles up."""
    shape = Shape(S=256, H=2, R=4, N=64, P=64)
    found = errors(Question(shape, 16), CpuDialect("bf16"))
    assert max(found.values()) <= BF16, found
    assert max(found.values()) > 1e-4, "bf16 was not emulated"
    monkeypatch.setattr(bwd_glue, "_anchored", lambda spec, turn, spin, packed: turn)
    loose = errors(Question(shape, 16), CpuDialect("bf16"))
    assert loose["Angles"] > 2 * found["Angles"], (loose, found)


@pytest.mark.parametrize(
    ("mode", "N"),
    [
        ("ws", 64),
        pytest.param("ws", 128, marks=pytest.mark.slow),
        pytest.param("tma", 64, marks=pytest.mark.slow),
        pytest.param("tma", 128, marks=pytest.mark.slow),
    ],
)
def test_compiles_for_hopper_without_spills(mode: Mode, N: int) -> None:
    facts = compiled_for_hopper(bwd_bwd, mode, N, stages=1)
    assert max(facts.tma_ranks) == 2, facts


MUTANTS = {
    "state gradient passes a chunk undecayed": ("g[n, p] = g[n, p] * w_sh[THROUGH * C]", "g[n, p] = g[n, p]"),
    "key gradient without the shifted term": (
        "dk_f[i, n] = dk_f[i, n] * w_sh[ENTRY * C + i // R]", "dk_f[i, n] = dk_f[i, n] * w_sh[LATER * C + i // R]",
    ),
    "skip weight forgotten": ("dx_f[i, p] += d[bh] * dy_sh[i, p]", "dx_f[i, p] += 0 * dy_sh[i, p]"),
    "a token's own pair counted as a later one": (
        "j // R == i // R, T.zero(), st[j, i]", "j < 0, T.zero(), st[j, i]",
    ),
    "angle sums anchored to the wrong row": ("h_sh[(n + N // 2) % N, p]", "h_sh[n, p]"),
    "chunks walked in the order of time": ("per - 1 - step", "step"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bwd_launch, "bwd_bwd", mutant(bwd_bwd, *MUTANTS[name], tmp_path))
    found = errors(Question(FULL, CHUNK, with_state=True), CpuDialect("float64"))
    assert max(found.values()) > 1e-4, found


def test_a_mutant_of_the_split_pass_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutant(bwd_states, "passed[i] = passed[i] * w_sh[THROUGH * C]", "passed[i] = passed[i]", tmp_path)
    monkeypatch.setattr(bwd_launch, "bwd_states", wrong)
    found = errors(Question(PACKED, CHUNK, with_state=True), CpuDialect("float64"), splits=7)
    assert max(found.values()) > 1e-4, found
