"""The forward kernel, run on the CPU from the source that compiles for Hopper, against the one-token oracle."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from libs.kernels.mimo.sm90 import forward, fwd, launch, parts, psiv
from libs.kernels.mimo.sm90.dialect import CpuDialect
from tests.libs.kernels.mimo.sm90.scan_case import errors, run_case, scan_case
from tests.support.mimo import Shape, relative_error

DOCUMENTS = [0, 3, 17, 24, 45]
CASES = {
    "reference options": (Shape(), 8, None),
    "norm, a group per head, half rotation": (Shape(S=40, G=4, norm=True, divisor=2), 8, None),
    "two groups, rank 2, nothing optional": (Shape(S=24, G=2, out=False, z=False, d=False, R=2), 8, None),
    "no MIMO_Out but gate and norm": (Shape(S=24, G=2, out=False, norm=True, R=2, B=2), 8, None),
    "documents": (Shape(S=45), 8, DOCUMENTS),
    "rank 1": (Shape(R=1, S=32, divisor=2), 16, None),
    "rank 8, ungated, norm": (Shape(R=8, S=21, z=False, norm=True), 4, None),
}


@pytest.mark.parametrize("name", CASES)
def test_fp64_equals_the_oracle(name: str) -> None:
    """To the last digits, with poisoned tiles: nothing is read before it is written."""
    case = scan_case(*CASES[name])
    assert max(errors(case, run_case(case, CpuDialect("float64", poison=True)))) < 1e-12


@pytest.mark.parametrize("name", [pytest.param("reference options", marks=pytest.mark.slow), "documents"])
def test_the_order_of_parallel_iterations_does_not_matter(name: str) -> None:
    """A race between iterations of a `T.Parallel` would show."""
    case = scan_case(*CASES[name])
    plain, reverse = (run_case(case, CpuDialect("float64", order)) for order in ("forward", "reverse"))
    assert torch.equal(plain.out, reverse.out)
    assert torch.equal(plain.h_end, reverse.h_end)


@pytest.mark.parametrize("name", ["reference options", pytest.param("documents", marks=pytest.mark.slow)])
def test_fp32_and_emulated_bf16(name: str) -> None:
    """fp32 to 1e-5; with bf16 tiles the error is that of bf16, and not zero."""
    case = scan_case(*CASES[name])
    assert max(errors(case, run_case(case, CpuDialect("float32")))) < 1e-5
    rounded = max(errors(case, run_case(case, CpuDialect("bf16"))))
    assert 1e-4 < rounded < 1e-2


@pytest.mark.parametrize("name", ["reference options", pytest.param("rank 8, ungated, norm", marks=pytest.mark.slow)])
def test_sharing_a_tile_changes_nothing_but_rounding(name: str) -> None:
    """PsiV, weighted PsiV and y one after the other in one tile."""
    case = scan_case(*CASES[name])
    assert max(errors(case, run_case(case, CpuDialect("float64", poison=True), share_x=True))) < 1e-12
    assert max(errors(case, run_case(case, CpuDialect("bf16"), share_x=True))) < 1e-2


def test_one_document_cannot_touch_another() -> None:
    """Other values in document 1: every bit of the others stays."""
    shape = Shape(S=45)
    case = scan_case(shape, 8, DOCUMENTS)
    v = case.op.v.clone()
    v[:, DOCUMENTS[1] : DOCUMENTS[2]] += 3
    dialect = CpuDialect("float64")
    before = run_case(case, dialect)
    after = run_case(case._replace(op=case.op._replace(v=v)), dialect)
    same = [(before.out[0, t] == after.out[0, t]).all().item() for t in range(45)]
    assert all(same[: DOCUMENTS[1]])
    assert all(same[DOCUMENTS[2] :])
    assert not any(same[DOCUMENTS[1] : DOCUMENTS[2]])
    assert torch.equal(before.h_end, after.h_end)


@pytest.mark.slow
def test_psiv_is_written_and_read_back() -> None:
    """The cached product is v * psi in (B,H,S*R,P), and a forward that reads it gives the same bits."""
    case = scan_case(*CASES["reference options"])
    dialect = CpuDialect("bf16")
    plain = run_case(case, dialect)
    want = psiv.materialise(case.op.v.bfloat16(), case.op.psi.float())
    x = torch.empty_like(want)
    written = run_case(case, dialect, psiv="write", x_BHLP=x)
    assert torch.equal(x, want)
    assert torch.equal(plain.out, written.out)
    read = run_case(case, dialect, psiv="read", x_BHLP=x)
    assert relative_error(read.out, plain.out) < 1e-2
    exact = CpuDialect("float64")
    x = torch.empty_like(want, dtype=torch.float64)
    run_case(case, exact, psiv="write", x_BHLP=x)
    assert max(errors(case, run_case(case, exact, psiv="read", x_BHLP=x))) < 1e-12


MUTATIONS = {
    "whole weight on a token's own output": (parts, "gamma_sh[t], T.zero()", "later_sh[t], T.zero()"),
    "looks one token ahead": (parts, "else s < t\n", "else s <= t + 1\n"),
    "rotation before the bias": (parts, "+ bias_sh[i % R, second + a]", "+ T.zero()"),
    "state not decayed": (fwd, "h[n, p] * carry_sh[C - 1]", "h[n, p] * T.number(1.0)"),
    "state used after its update": (fwd, "                T.copy(h, h_sh)\n", ""),
    "rank sum over rows of another token": (fwd, "T.wide(y_sh[t * R + r, p])", "T.wide(y_sh[t + r * C, p])"),
    "other way round": (parts, "- other * sin_sh", "+ other * sin_sh"),
    "rank and token swapped": (parts, "psi_sh[i % R, p])\n", "psi_sh[i // R % R, p])\n"),
    "decay to the end of the chunk forgotten": (parts, "enter_sh[t] = T.exp(log_sh[C - 1] -", "enter_sh[t] = T.exp(-"),
    "skip weight dropped": (fwd, "+ d[bh] * T.wide(x_sh[i, p])", ""),
}  # fmt: skip


def _mutated(module, old: str, new: str, folder: Path):
    """A copy of a kernel module with one piece of its text replaced."""
    text = Path(module.__file__).read_text()
    assert text.count(old) >= 1, f"{old!r} is not in {module.__file__}: the mutation has gone stale"
    path = folder / "mutant.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"mutant_{abs(hash(new))}", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant


@pytest.mark.parametrize("name", [*MUTATIONS][:6] + [pytest.param(n, marks=pytest.mark.slow) for n in [*MUTATIONS][6:]])
def test_mutations_are_caught(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Deliberate mistakes in the kernel source must show in the comparison that the kernel passes."""
    module, old, new = MUTATIONS[name]
    mutant = _mutated(module, old, new, tmp_path)
    monkeypatch.setattr(launch, "_built", {})
    if module is parts:
        for maker in ("entering_values", "pair_weights", "project_pair", "spread_values", "token_weights"):
            monkeypatch.setattr(fwd, maker, getattr(mutant, maker))
    else:
        monkeypatch.setattr(forward, "make_forward", mutant.make_forward)
    case = scan_case(*CASES["reference options"])
    assert max(errors(case, run_case(case, CpuDialect("float64", poison=True)))) > 1e-3


def test_a_document_mask_left_out_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The pair mask alone: tokens of one chunk see each other across a boundary."""
    mutant = _mutated(parts, "T.And(s < t, doc_sh[s] == doc_sh[t])", "T.And(s < t, s < t)", tmp_path)
    monkeypatch.setattr(launch, "_built", {})
    monkeypatch.setattr(fwd, "pair_weights", mutant.pair_weights)
    case = scan_case(*CASES["documents"])
    assert max(errors(case, run_case(case, CpuDialect("float64")))) > 1e-3


FAST = ("-O3", "-march=native", "-fno-strict-aliasing", "-w")  # large shapes run longer than they build


@pytest.mark.slow
@pytest.mark.parametrize(
    ("N", "P", "R", "C"),
    [(16, 64, 4, 8), (32, 64, 4, 16), (64, 64, 4, 16), (128, 64, 4, 16), (256, 64, 4, 8), (64, 128, 4, 16),
     (128, 32, 4, 16), (128, 128, 4, 8), (128, 64, 8, 8), (128, 64, 2, 32), (128, 64, 1, 64)],
)  # fmt: skip
@pytest.mark.parametrize("share_x", [False, True])
def test_the_eleven_shapes_in_emulated_bf16(N: int, P: int, R: int, C: int, share_x: bool) -> None:
    """Largest error over largest value at most 0.01, the acceptance figure."""
    case = scan_case(Shape(S=192, H=2, R=R, N=N, P=P), C)
    assert max(errors(case, run_case(case, CpuDialect("bf16"), share_x=share_x, flags=FAST))) < 1e-2
