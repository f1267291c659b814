"""The whole run on the CPU, with the chunked backend for the kernels: order, refusals, receipt, what is left out."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.eval.bench.__main__ import main
from apps.eval.bench.cuda import accuracy, calls, floors, measure, run, summary
from apps.eval.bench.cuda import plan as plans
from apps.eval.bench.operands import Operands, Shape
from apps.eval.bench.receipt import Receipt
from libs.flags.errors import UserError, run_entry
from libs.kernels.mimo import mamba3_mimo
from libs.kernels.mimo.sm90.gates import KernelGates

pytestmark = pytest.mark.usefixtures("on_cpu")
ARGUMENTS = ["ops", "--device", "cuda", "--quick", "--n", "3", "--jobs", "1"]
CPU = torch.device("cpu")


def run_json(capsys: pytest.CaptureFixture[str], *more: str) -> Receipt:
    assert run_entry(main, [*ARGUMENTS, "--json", *more]) == 0
    return Receipt.model_validate_json(capsys.readouterr().out)


def chunked(operands: Operands, shape: Shape, chunk_size: int, gates: KernelGates) -> Tensor:
    out: Tensor = mamba3_mimo(*operands, chunk_size, shape.divisor, torch.bfloat16, backend="chunked")
    return out


class _Bent(torch.autograd.Function):
    """Right forward, gradient off by a twentieth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.05


def bent_gradient(operands: Operands, shape: Shape, chunk_size: int, gates: KernelGates) -> Tensor:
    out: Tensor = _Bent.apply(chunked(operands, shape, chunk_size, gates))  # type: ignore[no-untyped-call]
    return out


def test_the_receipt_holds_checks_times_floors_and_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    receipt = run_json(capsys, "--receipt-dir", str(tmp_path), "--machine", "Box 1")
    (written,) = tmp_path.glob("*_ops_box-1/receipt.json")
    assert Receipt.model_validate_json(written.read_bytes()) == receipt
    assert receipt.hardware.gpu is not None
    assert receipt.hardware.gpu.driver == "1.2"
    names = [check.name for check in receipt.correctness]
    gradients = [name for name in names if name.startswith("N8 P8 R2 C8 off d")]
    assert [name.rsplit(" ", 1)[1] for name in gradients] == list(accuracy.GRADIENTS)
    assert any("split at B2_S16, gradients vs the first" in name for name in names)
    timed = {one.name for one in receipt.contenders}
    assert {"gemm_B1_S32", "copy_B1_S32", "off_forward_B1_S32", "off_forward_backward_B2_S16"} <= timed
    # A stage that only writes for a backward is no other forward.
    assert "psiv_gmem_pool_forward_backward_B1_S32" in timed
    assert "psiv_gmem_pool_forward_B1_S32" not in timed
    assert all(one.n == 3 and one.warm_up for one in receipt.contenders)
    assert {m.seq_len for m in receipt.memory} == {16, 32}
    assert "not compiled ahead: fwd: no compiler" in receipt.notes
    assert receipt.aims == []


def test_ratios_to_the_floors_follow_from_the_samples(capsys: pytest.CaptureFixture[str]) -> None:
    receipt = run_json(capsys)
    shape, ratio = plans.Point(1, 32).shape, {r.name: r for r in receipt.ratios}
    op = receipt.contender("off_forward_backward_B1_S32")
    for floor, denominator, per_call, needed in (
        ("bytes", "copy_B1_S32", 2 * 1024, floors.moved_bytes(shape, training=True)),
        ("FLOPs", "gemm_B1_S32", 2 * 16**3, floors.needed_flops(shape, training=True)),
    ):
        product = 1.0
        for t, floor_sample in zip(op.samples_s, receipt.contender(denominator).samples_s, strict=True):
            product *= t / (needed / (per_call / floor_sample))
        assert ratio[f"{op.name} over {floor} floor"].value == pytest.approx(product ** (1 / 3))
    split = ratio["tma_ws_split_forward_B1_S32 over off"]
    assert (split.numerator, split.denominator) == ("tma_ws_split_forward_B1_S32", "off_forward_B1_S32")
    verdicts = [note for note in receipt.notes if note.startswith("verdict: psiv_gmem_pool_forward_backward_B1_S32")]
    assert len(verdicts) == 1
    assert verdicts[0].endswith((": faster", ": slower", ": noise"))


def test_the_table_is_short_and_names_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry(main, ARGUMENTS) == 0
    out = capsys.readouterr().out
    assert "Test GPU, 132 multiprocessors, clock unknown, driver 1.2" in out
    assert out.count("green:") < 10
    assert "checks within 0.012; the worst:" in out


@pytest.mark.parametrize("where", ["accuracy", "measure"])
def test_a_red_gate_prints_no_speed(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the eleven shapes show it or only a point's own shape, where two settings must agree."""

    def wrong_with_split(operands: Operands, shape: Shape, chunk_size: int, gates: KernelGates) -> Tensor:
        call = chunked if gates.split_scan == "off" else bent_gradient
        return call(operands, shape, chunk_size, gates)

    monkeypatch.setattr({"accuracy": accuracy, "measure": measure}[where], "op_call", wrong_with_split)
    monkeypatch.setattr(measure, "interleave", lambda *_a, **_k: pytest.fail("timed behind a red gate"))
    assert run_entry(main, [*ARGUMENTS, "--json", "--receipt-dir", str(tmp_path / "r")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "correctness gate is red" in captured.err
    assert ("tma_ws_split dq: error 0.0" if where == "accuracy" else "tma_ws_split at B1_S32, grad") in captured.err
    assert "off output" not in captured.err
    assert not (tmp_path / "r").exists()


def test_an_error_only_beyond_the_oracles_shapes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are built anew for a longer sequence: its first tokens are compared with the oracle again."""

    def wrong_when_long(operands: Operands, shape: Shape, chunk_size: int, gates: KernelGates) -> Tensor:
        return chunked(operands, shape, chunk_size, gates) * (1.05 if shape.S == 32 else 1)

    monkeypatch.setattr(measure, "op_call", wrong_when_long)
    assert run_entry(main, ARGUMENTS) == 1


@pytest.mark.parametrize("error", [UserError("no such shape; nearest: none"), RuntimeError("nvcc said no\nat length")])
def test_a_kernel_that_cannot_be_had_is_red(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(accuracy, "op_call", fail)
    assert run_entry(main, ARGUMENTS) == 1
    assert f"{type(error).__name__}: {str(error).splitlines()[0]}: error nan" in capsys.readouterr().err


def test_what_does_not_fit_into_memory_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(operands: Operands, shape: Shape, chunk_size: int, gates: KernelGates) -> Tensor:
        if gates.psiv != "off" and shape.B == 2:
            raise torch.OutOfMemoryError("tried to allocate 4 GiB\nsee the manual")
        return chunked(operands, shape, chunk_size, gates)

    monkeypatch.setattr(measure, "op_call", full)
    receipt = run_json(capsys)
    left_out = [(item.name, item.reason) for item in receipt.left_out]
    assert left_out == [("psiv_gmem_pool at B2_S16", "tried to allocate 4 GiB")]
    timed = {one.name for one in receipt.contenders}
    assert "psiv_gmem_pool_forward_backward_B1_S32" in timed
    assert not any(name.startswith("psiv") and "B2" in name for name in timed)


def test_nothing_to_time_is_refused_with_the_reasons(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> Tensor:
        raise UserError("needs 300000 bytes of shared memory")

    monkeypatch.setattr(measure, "op_call", refuse)
    assert run_entry(main, ARGUMENTS) == 2
    assert "off at B1_S32: needs 300000 bytes of shared memory" in capsys.readouterr().err


def test_our_own_failure_at_a_point_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(measure, "op_call", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_entry(main, ARGUMENTS)


class _Clock:
    """Monotonic time that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_no_round_begins_after_the_time_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = _Clock()
    monkeypatch.setattr(run.time, "monotonic", clock)

    def slow(operands: Operands, shape: Shape, chunk_size: int, gates: KernelGates) -> Tensor:
        clock.now += 1.0  # three calls to admit each of three settings: 9 s before the first round of the first point
        return chunked(operands, shape, chunk_size, gates)

    monkeypatch.setattr(measure, "op_call", slow)
    receipt = run_json(capsys, "--minutes", "0.2")  # 12 s
    assert {one.n for one in receipt.contenders} == {1}
    assert [(item.name, item.reason) for item in receipt.left_out] == [("B2_S16", "the time allowed was over")]
    clock.now = 0.0
    monkeypatch.setattr(accuracy, "op_call", slow)
    assert run_entry(main, [*ARGUMENTS, "--minutes", "0.1"]) == 0  # three checks take 3 of 6 s
    clock.now = 0.0

    def slower(operands: Operands, shape: Shape, chunk_size: int, gates: KernelGates) -> Tensor:
        clock.now += 9.0
        return chunked(operands, shape, chunk_size, gates)

    monkeypatch.setattr(accuracy, "op_call", slower)
    capsys.readouterr()
    assert run_entry(main, [*ARGUMENTS, "--minutes", "0.1"]) == 2
    assert "nothing could be timed (27 s after the start): B1_S32: the time allowed was over" in capsys.readouterr().err


def test_settings_that_come_too_late_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = _Clock()
    monkeypatch.setattr(run.time, "monotonic", clock)

    def slow(operands: Operands, shape: Shape, chunk_size: int, gates: KernelGates) -> Tensor:
        clock.now += 3.0  # 9 s for the first setting
        return chunked(operands, shape, chunk_size, gates)

    monkeypatch.setattr(measure, "op_call", slow)
    receipt = run_json(capsys, "--minutes", "0.1")  # 6 s
    assert [item.name for item in receipt.left_out] == ["psiv_gmem_pool at B1_S32", "tma_ws_split at B1_S32", "B2_S16"]
    names = {one.name for one in receipt.contenders}
    assert names == {"off_forward_B1_S32", "off_forward_backward_B1_S32", "gemm_B1_S32", "copy_B1_S32"}


def test_gates_of_the_kernels_in_the_environment_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FATHOM_TMA", "all")
    assert run_entry(main, ARGUMENTS) == 2
    assert "FATHOM_TMA: the benchmark goes through the settings itself" in capsys.readouterr().err
    monkeypatch.delenv("FATHOM_TMA")
    monkeypatch.setenv("FATHOM_TMAA", "all")
    assert run_entry(main, ARGUMENTS) == 78


def upstream(monkeypatch: pytest.MonkeyPatch, op: object) -> None:
    module = ModuleType("mamba3_mimo")
    module.mamba3_mimo = op  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.tilelang.mamba3.mamba3_mimo", module)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.tilelang", "mamba_ssm.ops.tilelang.mamba3"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(calls.importlib.util, "find_spec", lambda name: object())


def test_upstream_is_timed_when_it_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream(monkeypatch, lambda *arguments: mamba3_mimo(*arguments, backend="chunked"))
    monkeypatch.setattr(summary, "GOALS", {plans.Point(1, 32): 0.5})
    receipt = run_json(capsys, "--against", "mamba_ssm")
    names = [ratio.name for ratio in receipt.ratios]
    assert "off_forward_B1_S32 over mamba_ssm" in names
    assert "mamba_ssm_forward_backward_B2_S16 over bytes floor" in names
    (aim,) = receipt.aims
    best = min(
        (one for one in receipt.contenders if "_forward_backward_B1_S32" in one.name and "mamba" not in one.name),
        key=lambda one: one.mean_s,
    )
    assert aim.name.startswith(best.name)
    assert aim.met == (aim.measured <= 0.5)


def test_upstream_that_differs_or_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream(monkeypatch, lambda *arguments: 2 * mamba3_mimo(*arguments, backend="chunked"))
    receipt = run_json(capsys, "--against", "mamba_ssm")
    assert "not within 0.1 of the oracle" in receipt.left_out[0].reason

    def fail(*_: object) -> Tensor:
        raise ValueError("cannot lower a reduce")

    upstream(monkeypatch, fail)
    receipt = run_json(capsys, "--against", "mamba_ssm")
    assert "ValueError: cannot lower a reduce" in receipt.left_out[0].reason
    assert not any("mamba_ssm" in one.name for one in receipt.contenders)
