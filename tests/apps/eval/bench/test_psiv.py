"""`fathom bench psiv`: what is offered, an answer where nothing is, and arms that compute the same with other means."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from apps.eval.bench import psiv
from apps.eval.bench.__main__ import main
from apps.eval.bench.operands import Shape, make_operands
from apps.eval.bench.psiv import PsivPlan, PsivReceipt, offers_on
from apps.eval.bench.receipt import Comparison
from libs.flags.errors import run_entry
from libs.kernels.mimo.shapes import MimoInputs
from libs.kernels.mimo.xla import scan

SMALL = Shape(S=40, H=2, N=16, P=8, R=2)
PLAN = PsivPlan("cpu", SMALL, 8, 2, 1, 0)


@pytest.fixture(scope="module")
def receipt() -> PsivReceipt:
    return psiv.run_psiv(PLAN, command=["fathom"], machine="box")


def test_on_a_cpu_no_backend_has_the_stage_and_the_receipt_says_so(receipt: PsivReceipt) -> None:
    by = {offer.backend: offer for offer in receipt.offers}
    assert (by["chunked"].runs_here, by["chunked"].stages) == (True, [])
    assert (by["xla"].runs_here, by["xla"].stages) == (False, ["python_precompute"])
    assert by["tilelang"].stages[0] == "python_precompute"
    assert len(by["tilelang"].stages) == 4
    assert receipt.result == "no_backend_here_has_the_stage"
    assert receipt.comparison is None
    assert receipt.decision.value == "record"
    assert any(note.startswith("an experiment") for note in receipt.notes)
    assert receipt.product_bytes == 40 * 2 * 2 * 8 * 4
    assert {one.name for one in receipt.contenders} == {
        "xla_loop_off", "xla_loop_python_precompute", "chunked", "product"
    }  # fmt: skip
    assert PsivReceipt.model_validate_json(receipt.model_dump_json()) == receipt


def test_an_experiment_cannot_pass_for_a_measurement_of_the_gate(receipt: PsivReceipt) -> None:
    content = json.loads(receipt.model_dump_json())
    with pytest.raises(ValidationError, match="the offers say that none has it"):
        PsivReceipt.model_validate(content | {"result": "measured"})
    pair = (receipt.contender("xla_loop_off"), receipt.contender("xla_loop_python_precompute"))
    comparison = Comparison.of(*pair, scope="step", gate=("psiv_cache", "off", "python_precompute"))
    claimed = {"comparison": comparison.model_dump(), "decision": comparison.decision().model_dump()}
    with pytest.raises(ValidationError, match="no_backend_here_has_the_stage with a comparison"):
        PsivReceipt.model_validate(content | claimed)
    here = [{**offer, "runs_here": True, "reason": None} for offer in content["offers"]]
    with pytest.raises(ValidationError, match="the offers say that one has it"):
        PsivReceipt.model_validate(content | {"offers": here})
    with pytest.raises(ValidationError, match="its samples say"):
        PsivReceipt.model_validate(content | {"decision": {"value": "record", "reason": "it saves much"}})
    with pytest.raises(ValidationError, match="1 ratios: there are two"):
        PsivReceipt.model_validate(content | {"ratios": content["ratios"][:1]})


def test_the_arm_with_the_stage_reads_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that is wrong reaches the arm with the stage, and no other."""
    outcomes = psiv._check(PLAN, psiv._arms(PLAN))
    assert all(outcome.passed for outcome in outcomes)
    spread = scan._spread_values

    def wrong(inputs: MimoInputs) -> Tensor:
        return spread(inputs) * 1.001

    monkeypatch.setattr(scan, "_spread_values", wrong)
    red = {outcome.name.split(" ")[0] for outcome in psiv._check(PLAN, psiv._arms(PLAN)) if not outcome.passed}
    assert red == {"xla_loop_python_precompute"}


def test_the_product_is_that_of_every_rank() -> None:
    operands = make_operands(SMALL, seed=0)
    got = psiv.materialise(operands.v_BSHP, operands.mimo_v_HRP).view(1, SMALL.H, SMALL.S, SMALL.R, SMALL.P)
    for rank in range(SMALL.R):
        want = operands.v_BSHP[0] * operands.mimo_v_HRP[:, rank]
        assert torch.equal(got[0, :, :, rank].transpose(0, 1), want)


def test_a_red_gate_times_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(psiv, "_check", lambda *_: [psiv.Outcome("on output vs oracle", float("nan"), 1e-5)])
    monkeypatch.setattr(psiv, "_measure", lambda *_: pytest.fail("timed behind a red gate"))
    assert main(["psiv", "--quick", "--n", "1", "--threads", "1"]) == 1
    assert "no speed is reported" in capsys.readouterr().err


def test_offers_name_every_backend_once() -> None:
    assert [offer.backend for offer in offers_on("cpu")] == list(psiv.BACKENDS)
    on_gpu = {name: probe for name, probe in psiv.BACKENDS.items() if name != "tilelang"}
    assert {offer.backend for offer in offers_on("xla") if offer.runs_here} == {"xla", "xla_loop"} <= on_gpu.keys()


def test_refusals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry(main, ["psiv", "--seq-len", "-1"]) == 2
    monkeypatch.setenv("FATHOM_PSIV_CACHE", "python_precompute")
    assert run_entry(main, ["psiv", "--quick"]) == 78
    assert "psiv_cache" in capsys.readouterr().err
