"""The benchmark's parts: the plain formulation, the FLOP count, the rounds, the memory reading, the receipt."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from apps.eval.bench import memory, ops
from apps.eval.bench.__main__ import main
from apps.eval.bench.contenders import op_call, plain_call
from apps.eval.bench.correctness import Outcome, check_contenders, relative_error
from apps.eval.bench.interleave import Contender, interleave
from apps.eval.bench.operands import Shape, make_operands, scan_flops
from apps.eval.bench.receipt import Ratio, Receipt, Sampled, write_receipt
from libs.flags.errors import UserError, run_entry


@pytest.mark.parametrize(
    "shape",
    [
        Shape(S=48, B=2, H=4, G=2, N=16, P=8, R=2, divisor=2),
        Shape(S=16, B=1, H=3, G=3, N=8, P=16, R=1, divisor=4),
        Shape(S=64, B=1, H=2, G=1, N=16, P=16, R=4, divisor=4),
    ],
)
def test_plain_formulation_is_the_oracle_in_float64(shape: Shape) -> None:
    operands = make_operands(shape, seed=1, dtype=torch.float64)
    want = op_call(operands, shape, chunk_size=16, backend="reference")
    assert relative_error(plain_call(operands, shape), want) < 1e-12


def test_plain_formulation_refuses_a_ragged_tail() -> None:
    shape = Shape(S=20, H=2, N=8, P=8)
    with pytest.raises(ValueError, match="not a multiple"):
        plain_call(make_operands(shape, seed=0), shape)


def test_correctness_gate_is_green_and_turns_red_for_a_wrong_op(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Shape(S=32, H=2, G=1, N=16, P=16, R=2)
    green = check_contenders(seed=0, chunk_size=16, shape=small)
    assert len(green) == 4
    assert all(outcome.passed for outcome in green)

    def off_by_little(operands: object, shape: Shape, *, chunk_size: int, backend: str = "chunked") -> torch.Tensor:
        out = op_call(operands, shape, chunk_size=chunk_size, backend=backend)  # type: ignore[arg-type]
        return out if backend == "reference" else out * (1 + 1e-3)

    monkeypatch.setattr("apps.eval.bench.correctness.op_call", off_by_little)
    red = check_contenders(seed=0, chunk_size=16, shape=small)
    assert [outcome.passed for outcome in red] == [False, False, True, True]


def test_a_nan_never_passes() -> None:
    assert not Outcome("x", float("nan"), 1.0).passed
    assert not Outcome("x", relative_error(torch.tensor([1.0, torch.nan]), torch.ones(2).double()), 1.0).passed


def test_scan_flops_at_the_reference_shape() -> None:
    assert scan_flops(Shape(S=8192)) == 512 * 16 * 4 * 2 * 64**3 == pytest.approx(17.2e9, rel=0.002)
    assert scan_flops(Shape(S=16, B=2, H=3, N=32, P=8, R=2)) == 6 * (2 * 32 * 32 * (32 + 8) + 4 * 32 * 32 * 8)


def test_rounds_are_interleaved_and_shuffled() -> None:
    calls: list[str] = []
    contenders = [
        Contender(n, lambda n=n: calls.append(n), r, w)
        for n, r, w in (("a", 6, True), ("b", 6, False), ("c", 2, False))
    ]
    samples = interleave(contenders, seed=0, on_sample=lambda _name, _seconds: None)
    assert {name: len(values) for name, values in samples.items()} == {"a": 6, "b": 6, "c": 2}
    assert calls[0] == "a"  # the warm-up
    rounds = [calls[1:4], calls[4:7], *[calls[i : i + 2] for i in range(7, 15, 2)]]
    assert [sorted(r) for r in rounds] == [["a", "b", "c"]] * 2 + [["a", "b"]] * 4
    assert len({tuple(r) for r in rounds}) > 2
    assert all(seconds > 0 for values in samples.values() for seconds in values)


def test_allocator_peak_sees_temporaries_and_forgets_what_was_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate() -> None:
        first = torch.empty(8 << 20, dtype=torch.uint8)
        del first
        second, third = (torch.empty(5 << 20, dtype=torch.uint8) for _ in range(2))
        del second, third

    monkeypatch.setattr(memory, "training_runner", lambda *_args, **_kwargs: allocate)
    peak = memory._allocator_peak("op", Shape(S=16), 16, 1)
    assert 10 << 20 <= peak < 11 << 20


@pytest.mark.slow
def test_peak_of_a_fresh_process_counts_inputs_and_both_readings() -> None:
    shape = Shape(S=2048, H=4)
    peak = memory.measure_peak("sdpa", shape, chunk_size=16, threads=1)
    assert peak.input_bytes == 3 * 2048 * 4 * 64 * 4
    # Gradients of q, k, v and the output at least; far less than the S x S scores.
    assert 4 / 3 * peak.input_bytes <= peak.allocator_bytes < 2048 * 2048 * 4
    assert peak.resident_bytes is None or peak.resident_bytes < 64 << 20


def fake_peaks(kind: str, shape: Shape, *, chunk_size: int, threads: int) -> memory.Peak:
    return memory.Peak(1000, 5000, 6000)


def small_plan(*, rounds: int, chunk_size: int, threads: int, seed: int) -> ops.OpsPlan:
    return ops.OpsPlan((16, 32), 32, (16, 32), rounds, 16, 2, chunk_size, threads, seed)


@pytest.fixture
def small_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "measure_peak", fake_peaks)
    monkeypatch.setattr("apps.eval.bench.ops_command.quick_plan", small_plan)


@pytest.mark.usefixtures("small_bench")
def test_ops_prints_a_receipt_and_writes_it_once_per_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "ops",
        "--quick",
        "--json",
        "--n",
        "3",
        "--receipt-dir",
        str(tmp_path),
        "--machine",
        "Test box, 1 thread",
    ]
    for _ in range(2):
        assert run_entry(main, arguments) == 0
        printed = json.loads(capsys.readouterr().out)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert len(folders) == 2
    assert folders[0].endswith("_ops_test-box-1-thread")
    receipt = Receipt.model_validate_json((tmp_path / folders[1] / "receipt.json").read_bytes())
    assert json.loads(receipt.model_dump_json()) == printed
    assert receipt.hardware.machine == "Test box, 1 thread"
    assert receipt.command[:3] == ["fathom", "bench", "ops"]
    names = {sampled.name for sampled in receipt.contenders}
    assert {"gemm_16", "op_forward_S16", "plain_forward_backward_S32", "sdpa_forward_S32"} <= names
    assert receipt.contender("op_forward_S16").n == 3
    assert receipt.contender("op_forward_S32").n == 2  # long shapes get fewer rounds
    fraction = next(ratio for ratio in receipt.ratios if ratio.name == "op_gemm_fraction_S32")
    gemm, op = receipt.contender(fraction.numerator), receipt.contender("op_forward_S32")
    assert gemm.flops is not None
    expected = [op.flops / gemm.flops * g / o for g, o in zip(gemm.samples_s, op.samples_s, strict=False)]  # type: ignore[operator]
    assert fraction.value == pytest.approx((expected[0] * expected[1]) ** 0.5)
    assert [aim.name for aim in receipt.aims][2].startswith("peak extra memory")
    assert receipt.aims[2].measured == 6.0
    assert receipt.aims[2].met


@pytest.mark.usefixtures("small_bench")
def test_table_names_machine_spread_and_aims(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry(main, ["ops", "--quick", "--n", "2", "--machine", "Test box"]) == 0
    out = capsys.readouterr().out
    for expected in ("machine Test box", "green: op output vs oracle", "std", "95 % interval", "aim: forward"):
        assert expected in out


@pytest.mark.usefixtures("small_bench")
def test_a_red_gate_prints_no_speed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = [Outcome("op output vs oracle", 0.5, 1e-5), Outcome("plain output vs oracle", 0.0, 1e-5)]
    monkeypatch.setattr(ops, "check_contenders", lambda **_: red)
    monkeypatch.setattr(ops, "interleave", lambda *_args, **_kwargs: pytest.fail("timed behind a red gate"))
    assert run_entry(main, ["ops", "--quick", "--receipt-dir", str(tmp_path / "r")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "op output vs oracle: error 0.5" in captured.err
    assert "plain output" not in captured.err
    assert not (tmp_path / "r").exists()


def test_what_does_not_fit_is_left_out_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(rounds=2, chunk_size=16, threads=1, seed=0)
    peaks = {kind: memory.Peak(1 << 20, 1 << 20, None) for kind in ops.KINDS} | {
        "plain": memory.Peak(1 << 20, 1 << 50, None)
    }
    kept, left_out = ops._fitting(plan, peaks)  # type: ignore[arg-type]
    assert {kind for kind, _, _ in kept} == {"op", "sdpa"}
    assert {item.name for item in left_out} == {
        f"plain_{phase}_S{s}" for phase in ("forward", "forward_backward") for s in (16, 32)
    }
    assert all("GiB" in item.reason for item in left_out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--receipt-dir", "/proc/nowhere"], "--receipt-dir /proc/nowhere: no folder can be made there"),
        (["--receipt-dir", f"{__file__}/below"], "no folder can be made there"),
        (["--device", "cuda"], "there is no CUDA device here"),
        (["--n", "0"], "--n 0"),
        (["--threads", "9999"], "--threads 9999"),
        (["--chunk-size", "0"], "--chunk-size 0"),
        (["--against", "mamba_ssm"], "--against mamba_ssm: only with --device cuda"),
        (["--device", "cuda", "--chunk-size", "16"], "--chunk-size 16: only with --device cpu"),
        (["--device", "cuda", "--base", "ws"], "unknown base 'ws'"),
        (["--device", "cuda", "--minutes", "0"], "--minutes 0"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ops, "check_contenders", lambda **_: pytest.fail("begun before the options were looked at"))
    assert run_entry(main, ["ops", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def receipt(small_bench: None, capsys: pytest.CaptureFixture[str]) -> Receipt:
    assert run_entry(main, ["ops", "--quick", "--json", "--n", "2"]) == 0
    return Receipt.model_validate_json(capsys.readouterr().out)


def test_the_schema_refuses_a_red_or_invented_receipt(receipt: Receipt, tmp_path: Path) -> None:
    plain = receipt.model_dump(mode="json")
    red = json.loads(json.dumps(plain))
    red["correctness"][0]["passed"] = False
    with pytest.raises(ValidationError, match="green correctness gate"):
        Receipt.model_validate(red)
    claimed = json.loads(json.dumps(plain))
    claimed["correctness"][0] |= {"error": 1.0, "passed": True}
    with pytest.raises(ValidationError, match="green correctness gate"):
        Receipt.model_validate(claimed)
    faster = json.loads(json.dumps(plain))
    faster["contenders"][0]["mean_s"] /= 2
    with pytest.raises(ValidationError, match="its samples give"):
        Receipt.model_validate(faster)
    with pytest.raises(ValidationError, match="extra"):
        Receipt.model_validate(plain | {"remark": "fast"})
    assert Receipt.model_validate_json(write_receipt(receipt, tmp_path).read_bytes()) == receipt


def test_one_sample_has_no_deviation_and_no_interval() -> None:
    one = Sampled.of("a", "a", [2.0], flops=None, warm_up=True)
    ratio = Ratio.of("r", one, Sampled.of("b", "b", [1.0], flops=None, warm_up=True))
    assert one.std_s is None
    assert (ratio.value, ratio.low, ratio.high, ratio.n) == (2.0, None, None, 1)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("ratios", 0, "value"), 1.0, "ratio op_gemm_fraction_S16: states value 1.0"),
        (("ratios", 0, "low"), 0.0, "states low 0.0"),
        (("ratios", 0, "high"), 0.0, "states high 0.0"),
        (("ratios", 0, "low"), None, "states low None"),
        (("ratios", 0, "n"), 7, "states n 7"),
        (("ratios", 0, "numerator"), "nobody", "nobody: there is no sample of it"),
        (("contenders", 0, "std_s"), 0.0, "states std_s 0.0"),
        (("aims", 0, "target"), 1e9, "it says True"),
        (("aims", 2, "met"), False, "6.0 < 12.0 is True, it says False"),
        (("decision", "reason"), "3 of 2 aims met; decides about no change", "its samples say"),
        (("decision", "reason"), "twice as fast", "its samples say"),
        (("aims",), [], "'0 of 0 aims met"),
    ],
)
def test_figures_that_do_not_follow_are_refused(
    receipt: Receipt, path: tuple[str | int, ...], value: object, said: str
) -> None:
    content = receipt.model_dump(mode="json")
    fraction = content["aims"][0]
    fraction |= {"target": fraction["measured"], "met": True}
    met = sum(aim["met"] for aim in content["aims"])
    content["decision"]["reason"] = f"{met} of 3 aims met; decides about no change"
    Receipt.model_validate(content)
    inside = content
    for key in path[:-1]:
        inside = inside[key]  # type: ignore[index]
    inside[path[-1]] = value  # type: ignore[index]
    with pytest.raises(ValidationError, match=said):
        Receipt.model_validate(content)


def test_a_place_that_cannot_be_written_is_told(receipt: Receipt, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(UserError, match="cannot write the receipt into"):
            write_receipt(receipt, place)


@pytest.mark.parametrize("when", ["write_text", "rename"])
def test_a_kill_leaves_no_folder(receipt: Receipt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """What is seen at the moment of the kill, before anything is tidied up."""
    seen: list[Path] = []

    def kill(*_: object, **__: object) -> None:
        seen.extend(tmp_path.glob("*/receipt.json"))
        seen.extend(path for path in tmp_path.iterdir() if not path.name.startswith("."))
        raise KeyboardInterrupt

    monkeypatch.setattr(Path if when == "write_text" else os, when, kill)
    with pytest.raises(KeyboardInterrupt):
        write_receipt(receipt, tmp_path)
    assert seen == []
    monkeypatch.undo()
    assert write_receipt(receipt, tmp_path).is_file()
    assert len(list(tmp_path.iterdir())) == 1
