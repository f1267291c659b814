"""A sequence cut into splits: the three passes together equal the unsplit kernel and the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from libs.kernels.mimo.sm90 import forward, launch, split
from libs.kernels.mimo.sm90.dialect import CpuDialect
from tests.libs.kernels.mimo.sm90.scan_case import errors, run_case, scan_case
from tests.libs.kernels.mimo.sm90.test_fwd import DOCUMENTS, _mutated
from tests.support.mimo import Shape, relative_error

CASES = {
    "state carried in": (Shape(B=2, S=45, G=2), 8, None),
    "documents": (Shape(S=45), 8, DOCUMENTS),
    "norm, half rotation": (Shape(S=48, norm=True, divisor=2, R=2), 8, None),
}


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("state carried in", 6),
        ("documents", 2),
        pytest.param("state carried in", 2, marks=pytest.mark.slow),
        pytest.param("documents", 6, marks=pytest.mark.slow),
        pytest.param("norm, half rotation", 3, marks=pytest.mark.slow),
    ],
)
def test_splits_equal_the_oracle(name: str, splits: int) -> None:
    """As exact as the unsplit kernel; 6 splits are one chunk each."""
    case = scan_case(*CASES[name])
    assert max(errors(case, run_case(case, CpuDialect("float64", poison=True), splits=splits))) < 1e-12


@pytest.mark.slow
def test_the_order_of_parallel_iterations_does_not_matter() -> None:
    """For the state and the combining pass too."""
    case = scan_case(*CASES["documents"])
    plain, reverse = (run_case(case, CpuDialect("float64", order), splits=3) for order in ("forward", "reverse"))
    assert torch.equal(plain.out, reverse.out)
    assert torch.equal(plain.init_BHsNP, reverse.init_BHsNP)


def test_a_split_begins_with_the_state_the_one_before_ended_in() -> None:
    """The combined states are those of a call over the first part alone."""
    case = scan_case(Shape(S=48), 8)
    got = run_case(case, CpuDialect("float64"), splits=2)
    assert torch.equal(got.init_BHsNP[:, :, 0], case.op.first)
    by_token = {name: getattr(case.op, name)[:, :24].contiguous() for name in ("q", "k", "v", "z", "theta")}
    by_head = {name: getattr(case.op, name)[..., :24].contiguous() for name in ("log_decay", "gamma", "later")}
    first = run_case(case._replace(op=case.op._replace(**by_token, **by_head)), CpuDialect("float64"))
    assert relative_error(got.init_BHsNP[:, :, 1], first.h_end) < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_lower_precisions(precision: str) -> None:
    """Splitting adds nothing to the error of the precision."""
    case = scan_case(*CASES["state carried in"])
    whole, parts = (max(errors(case, run_case(case, CpuDialect(precision), splits=n))) for n in (1, 3))
    assert parts < max(1e-6, 1.5 * whole)


def test_splits_must_divide_the_chunks() -> None:
    """6 chunks do not make 4 splits."""
    case = scan_case(*CASES["documents"])
    with pytest.raises(AssertionError, match="do not divide"):
        run_case(case, CpuDialect("float64"), splits=4)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("passed[i] * carry_sh[C - 1]", "passed[i] * T.number(1.0)"),
        ("h[n, p] * through[bb, bh, s] + local", "h[n, p] + local"),
        ("c0 = (bs * per + c) * C", "c0 = c * C"),
    ],
)
def test_mutations_are_caught(old: str, new: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mistakes in the passes must show."""
    mutant = _mutated(split, old, new, tmp_path)
    monkeypatch.setattr(launch, "_built", {})
    monkeypatch.setattr(forward, "make_states", mutant.make_states)
    monkeypatch.setattr(forward, "make_combine", mutant.make_combine)
    case = scan_case(*CASES["state carried in"])
    assert max(errors(case, run_case(case, CpuDialect("float64"), splits=3))) > 1e-3
