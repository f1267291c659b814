"""`fathom bench step`: the parts of a step, checked, timed, and what recomputation does."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from apps.eval.bench import step_memory, train_step
from apps.eval.bench.__main__ import main
from apps.eval.bench.model_step import How, Outcome
from apps.eval.bench.train_step import PARTS, StepReceipt
from libs.flags.errors import run_entry
from libs.model import ModelConfig, flops_per_token, preset
from tests.support.inline import Inline


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (train_step, step_memory):
        monkeypatch.setattr(module, "own_process", Inline)


def test_every_part_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", "--preset", "cpu_tiny", "--seq-len", "48", "--n", "2", "--threads", "1", "--json"]) == 0
    receipt = StepReceipt.model_validate_json(capsys.readouterr().out)
    assert {one.name: one.n for one in receipt.contenders} == dict.fromkeys(PARTS, 2)
    assert receipt.contender("step").flops == flops_per_token(preset("cpu_tiny"), 48).train * 48
    assert receipt.tokens_per_s == pytest.approx(48 / receipt.contender("step").mean_s)
    assert set(receipt.peak_bytes) == {"step", "step_recomputed"}
    assert len(receipt.correctness) == 6
    content = json.loads(receipt.model_dump_json())
    for changed, said in (
        ({"tokens_per_s": 1e9}, "states tokens_per_s"),
        ({"config": content["config"] | {"seq_len": 96}}, "states tokens_per_s"),
        ({"peak_bytes": {}}, "says nothing of step, step_recomputed"),
        ({"ratios": []}, "there is no such ratio"),
        ({"decision": {"value": "record", "reason": "fast"}}, "its samples say"),
    ):
        with pytest.raises(ValidationError, match=said):
            StepReceipt.model_validate(content | changed)


def test_a_wrong_step_is_red(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def check(name: str, config: ModelConfig, how: How) -> list[Outcome]:
        return [Outcome(f"{name} loss", 1.0 if how.checkpointing == "block" else 0.0, 1e-4)]

    monkeypatch.setattr(train_step, "check_step", check)
    assert main(["step", "--preset", "cpu_tiny", "--seq-len", "48", "--n", "1"]) == 1
    assert "step_recomputed loss" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--seq-len", "1"], ["--n", "0"], ["--preset", "nosuch"], ["--threads", "0"]])
def test_refusals(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry(main, ["step", *words]) == 2
    assert words[1] in capsys.readouterr().err
