"""`fathom bench crossover`, small: the budget, a receipt that cannot lie, a red gate, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from apps.eval.bench import crossover, crossover_job, model_step, step_memory
from apps.eval.bench.__main__ import main
from apps.eval.bench.budget import EXTRA_CALLS, Measured, allowance, predicted_seconds
from apps.eval.bench.crossover import CrossoverReceipt, Point
from apps.eval.bench.crossover_job import CrossoverPlan, Found
from apps.eval.bench.model_step import How, Stepper, check_step
from apps.eval.bench.ops import RedGate
from apps.eval.report.__main__ import main as report_main
from libs.flags.errors import UserError, run_entry
from libs.flags.facts import Facts
from libs.flags.installed import install
from libs.flags.resolve import resolve
from libs.model import HybridLM, preset
from tests.support.inline import Inline

HOW = How("cpu", "fp32", "none", "auto", 0)
PLAN = CrossoverPlan("cpu_tiny", (32, 64, 128), 3, HOW, 600.0, 1)
GIB = 2**30


# What fits.


def test_time_is_predicted_from_the_longest_shorter_length() -> None:
    known = {1024: Measured(1.0, 10.0), 2048: Measured(3.0, 24.0)}
    assert predicted_seconds(known, 4096, 80.0) == pytest.approx(10.0)
    assert predicted_seconds(known, 2048, 24.0) == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("step", "left", "rounds"),
    [(1.0, 100.0, 7), (1.0, 7.0 + EXTRA_CALLS, 7), (1.0, 6.9 + EXTRA_CALLS, 6), (1.0, 2.0 + EXTRA_CALLS, 2),
     (1.0, 1.9 + EXTRA_CALLS, 0), (1.0, 0.0, 0), (1.0, -5.0, 0)],
)  # fmt: skip
def test_rounds_that_fit_the_time(step: float, left: float, rounds: int) -> None:
    got = allowance(step, wanted=7, left_s=left, need_bytes=GIB, free_bytes=8 * GIB)
    assert got.rounds == rounds
    assert (got.reason is None) == (rounds == 7)
    if rounds == 0:
        assert "--max-minutes" in str(got.reason)


def test_what_does_not_fit_into_memory_is_left_out_however_much_time_there_is() -> None:
    got = allowance(0.001, wanted=7, left_s=1e9, need_bytes=8 * GIB, free_bytes=10 * GIB)
    assert got.rounds == 0
    assert "needs about 8.0 GiB, 7.0 GiB may be used" in str(got.reason)


def test_without_time_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the first length: a shorter one told what it would take."""
    monkeypatch.setattr(crossover_job, "_length", lambda *_: pytest.fail("begun without time"))
    install(resolve({}, Facts(device="cpu", mimo_backend="chunked")))
    found = crossover_job.measure(PLAN._replace(seconds=0.0), {}, Facts(device="cpu", mimo_backend="chunked"))
    assert set(found.left_out) == set(PLAN.seq_lens)
    assert all("--max-minutes" in reason for reason in found.left_out.values())


def test_a_length_that_takes_longer_than_it_seemed_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes a second of a clock that stands still otherwise; the probe said that one takes nothing."""
    install(resolve({}, Facts(device="cpu", mimo_backend="chunked")))
    now = [0.0]

    def step(self: Stepper) -> None:
        now[0] += 1.0

    monkeypatch.setattr(Stepper, "step", step)
    monkeypatch.setattr(crossover_job, "check_step", lambda *_: [model_step.Outcome("loss", 0.0, 1.0)])
    monkeypatch.setattr(crossover_job, "resident_peak", lambda *_, **__: None)
    monkeypatch.setattr(crossover_job, "wall_seconds", lambda run: 1e-9)
    monkeypatch.setattr(crossover_job.time, "monotonic", lambda: now[0])
    # Two probes, two warm-ups and three rounds of two are ten seconds; the time is over in the third round.
    plan = PLAN._replace(seq_lens=(32, 64), rounds=9, seconds=8.5)
    found = crossover_job.measure(plan, {}, Facts(device="cpu", mimo_backend="chunked"))
    assert {key: len(times) for key, times in found.samples.items()} == {("hybrid", 32): 3, ("twin", 32): 3}
    assert found.fewer == {32: "3 instead of 9 rounds: then the time allowed was over"}
    assert set(found.left_out) == {64}


# The step itself.


@pytest.fixture
def _gates() -> None:
    install(resolve({}, Facts(device="cpu", mimo_backend="chunked")))


@pytest.mark.usefixtures("_gates")
def test_a_step_moves_every_parameter_and_a_wrong_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = Stepper(preset("cpu_tiny"), HOW)
    stepper.length(32)
    before = {name: p.detach().clone() for name, p in stepper.model.named_parameters()}
    stepper.step()
    assert [name for name, p in stepper.model.named_parameters() if torch.equal(p, before[name])] == []
    assert stepper.held_bytes == pytest.approx(4 * 4 * sum(p.numel() for p in before.values()), rel=0.01)
    right = check_step("hybrid", preset("cpu_tiny"), HOW, tokens=24)
    assert all(outcome.passed for outcome in right)
    exact = model_step._exact

    def another_rate(*args: Any) -> Stepper:
        found = exact(*args)
        found._optimizer.param_groups[0]["weight_decay"] = 100.0
        return found

    monkeypatch.setattr(model_step, "_exact", another_rate)
    wrong = check_step("hybrid", preset("cpu_tiny"), HOW, tokens=24)
    assert [outcome.passed for outcome in wrong] == [True, True, False]


@pytest.mark.usefixtures("_gates")
def test_a_wrong_gradient_is_red_and_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(self: HybridLM, *args: Any, **kwargs: Any) -> Any:
        out = loss(self, *args, **kwargs)
        # The value stays, its gradient is twice as large; in float64 it is left alone.
        low = out.loss.dtype == torch.float32
        return out._replace(loss=2 * out.loss - out.loss.detach()) if low else out

    loss = HybridLM.loss
    monkeypatch.setattr(HybridLM, "loss", doubled)
    found = crossover_job.measure(PLAN, {}, Facts(device="cpu", mimo_backend="chunked"))
    assert found.samples == {}
    assert {o.name.split(" vs ")[0] for o in found.outcomes if not o.passed} >= {
        "hybrid gradient norm", "twin gradient norm"
    }  # fmt: skip
    with pytest.raises(RedGate, match="hybrid gradient norm"):
        _run(monkeypatch, found)


# The receipt.


class _Pool:
    """In place of a process: its answer."""

    def __init__(self, found: Found) -> None:
        self._found = found

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, *_: object) -> _Pool:
        return self

    def result(self) -> Found:
        return self._found


def _found(left_out: dict[int, str] | None = None) -> Found:
    """The hybrid takes 1.5, 1.1 and 0.8 of the twin's time."""
    samples, peaks = {}, {}
    for seq_len, ratio in ((32, 1.5), (64, 1.1), (128, 0.8)):
        twin = [seq_len * (1 + 0.1 * i) for i in range(3)]
        samples["twin", seq_len] = twin
        samples["hybrid", seq_len] = [ratio * t * (1 + 0.002 * i) for i, t in enumerate(twin)]
        peaks["twin", seq_len], peaks["hybrid", seq_len] = seq_len * 1000, 64_000
    outcomes = [model_step.Outcome("hybrid loss", 0.0, 1.0)]
    return Found(outcomes, samples, peaks, left_out or {}, {128: "3 instead of 7 rounds: a reason"})


def _run(monkeypatch: pytest.MonkeyPatch, found: Found, modelled: list[Any] | None = None) -> CrossoverReceipt:
    monkeypatch.setattr(crossover, "own_process", lambda *_: _Pool(found))
    return crossover.run_crossover(PLAN, command=["fathom"], machine="box", modelled=modelled or [])


def test_the_receipt_says_where_they_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = _run(monkeypatch, _found({256: "too long"}))
    time, memory, flops = receipt.crossings
    assert (time.status, time.has_interval) == ("crossed", True)
    assert 64 < float(time.tokens or 0) < 128
    assert memory.tokens == pytest.approx(64.0)
    assert not flops.has_interval
    assert receipt.decision.reason == time.sentence()
    assert [(item.name, item.reason) for item in receipt.left_out] == [("S=256", "too long")]
    assert "S=128: 3 instead of 7 rounds: a reason" in receipt.notes
    point = next(p for p in receipt.points if (p.model, p.seq_len) == ("hybrid", 64))
    assert point.tokens_per_s == pytest.approx(64 / receipt.contender("hybrid_step_S64").mean_s)
    assert abs(receipt.parameters["hybrid"] / receipt.parameters["twin"] - 1) < 0.005
    assert CrossoverReceipt.model_validate_json(receipt.model_dump_json()) == receipt


def _mutated(content: dict[str, Any], path: tuple[Any, ...], value: object) -> str:
    changed = json.loads(json.dumps(content))
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return json.dumps(changed)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("crossings", 0, "tokens"), 70.0, "its samples give"),
        (("crossings", 0, "low"), 1.0, "its samples give"),
        (("crossings", 0, "status"), "not_crossed", "its samples give"),
        (("crossings", 1, "tokens"), 1.0, "its samples give"),
        (("points", 0, "seconds"), 1.0, "states seconds"),
        (("points", 0, "tokens_per_s"), 1e9, "states tokens_per_s"),
        (("points", 0, "rounds"), 19, "states rounds"),
        (("contenders", 0, "mean_s"), 1.0, "its samples give"),
        (("contenders", 0, "name"), "else", "there is no sample of it"),
        (("points", 0, "seq_len"), 256, "hybrid_step_S256, twin_step_S32 missing"),
        (("points", 0, "model"), "hybrid", "hybrid_step_S32 missing|twin_step_S32 missing"),
        (("ratios", 0, "value"), 0.5, "ratio hybrid_over_twin_S32: states value 0.5"),
        (("ratios", 0, "low"), 9.0, "states low 9.0"),
        (("ratios", 0, "name"), "hybrid_over_twin", "ratios hybrid_over_twin, "),
        (("ratios", 0, "numerator"), "twin_step_S32", "ratio hybrid_over_twin_S32: states"),
        (("ratios", 0, "scale"), 2.0, "ratio hybrid_over_twin_S32: states"),
        (("ratios",), [], "its points ask for hybrid_over_twin_S32"),
        (("decision", "reason"), "faster at every length", "its samples say"),
    ],
)
def test_a_mutated_summary_is_refused(
    monkeypatch: pytest.MonkeyPatch, path: tuple[Any, ...], value: object, said: str
) -> None:
    content = json.loads(_run(monkeypatch, _found()).model_dump_json())
    with pytest.raises(ValidationError, match=said):
        CrossoverReceipt.model_validate_json(_mutated(content, path, value))


@pytest.mark.parametrize(
    ("field", "drop", "said"),
    [
        ("points", "twin_step_S32", "twin_step_S32 missing"),
        ("points", "hybrid_step_S128", "hybrid_step_S128 missing"),
        ("contenders", "twin_step_S32", "twin_step_S32: there is no sample of it"),
    ],
)
def test_a_model_that_is_missing_at_a_length_is_named(
    monkeypatch: pytest.MonkeyPatch, field: str, drop: str, said: str
) -> None:
    content = json.loads(_run(monkeypatch, _found()).model_dump_json())
    content[field] = [
        one for one in content[field] if drop != one.get("name", f"{one.get('model')}_step_S{one.get('seq_len')}")
    ]
    with pytest.raises(ValidationError, match=said):
        CrossoverReceipt.model_validate(content)
    whole = json.loads(_run(monkeypatch, _found()).model_dump_json())
    with pytest.raises(ValidationError, match="two points of one model"):
        CrossoverReceipt.model_validate(whole | {"points": [*whole["points"], whole["points"][0]]})
    only_points = whole | {"contenders": [one for one in whole["contenders"] if one["name"] != drop], "ratios": []}
    with pytest.raises(ValidationError, match=f"{drop} missing"):
        CrossoverReceipt.model_validate(only_points)


def test_no_length_that_fits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = _found()._replace(samples={}, left_out={32: "no time"})
    with pytest.raises(UserError, match="S=32: no time"):
        _run(monkeypatch, nothing)


# The command.


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (crossover, step_memory):
        monkeypatch.setattr(module, "own_process", Inline)
    words = ["crossover", "--preset", "cpu_tiny", "--seq-lens", "32,64", "--n", "2", "--threads", "1", "--json"]
    plot = tmp_path / "plot.html"
    assert main([*words, "--receipt-dir", str(tmp_path / "receipts"), "--plot", str(plot)]) == 0
    receipt = CrossoverReceipt.model_validate_json(capsys.readouterr().out)
    assert [point.seq_len for point in receipt.points] == [32, 32, 64, 64]
    assert all((point.peak_bytes or 1) > 0 for point in receipt.points)
    assert isinstance(receipt.points[0], Point)
    page = plot.read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "http" not in page.split("<body")[1]
    (path,) = (tmp_path / "receipts").glob("*/receipt.json")
    again = tmp_path / "again.html"
    assert report_main(["crossover", str(path.parent), "--out", str(again)]) == 0
    assert again.read_text(encoding="utf-8").split("Written")[0] == page.split("Written")[0]
    path.write_text("{}")
    assert run_entry(report_main, ["crossover", str(path)]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seq-lens", "4q"], "not a number of tokens"),
        (["--seq-lens", "2,4k"], "--seq-lens 2"),
        (["--preset", "nosuch"], "unknown model preset"),
        (["--preset", "cpu_tiny_dense"], "no 'M' to replace"),
        (["--max-minutes", "0"], "--max-minutes"),
        (["--scan", "tilelang", "--preset", "cpu_tiny"], "--scan tilelang"),
        (["--device", "cuda"], "no CUDA device"),
        (["--plot", "/nowhere/at/all.html"], "--plot"),
    ],
)
def test_options_that_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if said == "no CUDA device" and torch.cuda.is_available():
        pytest.skip("there is one")
    assert run_entry(main, ["crossover", *words]) == 2
    assert said in capsys.readouterr().err
