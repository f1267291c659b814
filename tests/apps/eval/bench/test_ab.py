"""`fathom bench ab`: what an arm is, what is checked before timing, what the samples decide; one real comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from apps.eval.bench import ab, ab_arm
from apps.eval.bench.__main__ import main
from apps.eval.bench.ab import AbPlan, compare, run_ab
from apps.eval.bench.ab_arm import Arm, ArmRun, Steps
from apps.eval.bench.ops import RedGate
from apps.eval.bench.receipt import Receipt
from libs.flags.errors import RunRefused, UserError, run_entry
from libs.flags.evidence import read_evidence
from libs.flags.provenance import snapshot
from tests.support.tiny_run import build_corpus, write_recipe


@pytest.mark.parametrize(
    ("text", "variables", "words"),
    [
        ("", {}, ()),
        ("--recipe cpu_demo", {}, ("--recipe", "cpu_demo")),
        ("FATHOM_TMA=fwd --optim.lr '1e-3'", {"FATHOM_TMA": "fwd"}, ("--optim.lr", "1e-3")),
        ("FATHOM_TMA=all FATHOM_PSIV_CACHE=off", {"FATHOM_TMA": "all", "FATHOM_PSIV_CACHE": "off"}, ()),
    ],
)
def test_arms(text: str, variables: dict[str, str], words: tuple[str, ...]) -> None:
    arm = Arm.parse("b", text)
    assert (arm.variables, arm.words) == (variables, words)
    assert Arm.parse("b", arm.describe().replace("fathom train", "")) == arm


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("'", "No closing quotation"),
        ("cpu_demo", "'cpu_demo' is neither a gate's variable"),
        ("PATH=x", "'PATH' is neither"),
        ("FATHOM_TRAIN__OPTIM__LR=1", "settings are given as --section.key"),
        ("--run-dir x", "--run-dir is set by the comparison itself"),
        ("--train.stop_after=3", "set by the comparison itself"),
    ],
)
def test_what_is_no_arm(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Arm.parse("b", text)


def _run(
    arm: Arm, seconds: float, *, config: str = "c", loss: float = 2.0, violations: int = 0, commit: bool = True
) -> ArmRun:
    """What a process of this arm leaves: three slow steps that are left out, then steps of these seconds."""
    gates = {"psiv_cache": "off", "tma": "off"} | {k[7:].lower(): v for k, v in arm.variables.items()}
    events: list[dict[str, Any]] = [
        {"event": "run.start", "config_hash": config},
        {"event": "gates.resolved", "hash": "g", "gates": [{"gate": k, "value": v} for k, v in gates.items()]},
        {"event": "env.snapshot", "extra": {"device": "cpu", "threads": 1}},
        {"event": "data.fingerprint", "fingerprint": "f"},
    ]
    steps = [{"time_s": 9.0 if i < 3 else seconds, "loss": loss, "grad_norm": 1.0} for i in range(7)]
    return ArmRun(events, steps, violations)


def _plan(b: str, n: int = 9, a: str = "") -> AbPlan:
    return AbPlan(Arm.parse("a", a), Arm.parse("b", b), n, Steps(3, 4), 1e-3, 0, (), 60.0)


def _fake(monkeypatch: pytest.MonkeyPatch, ratio: float, **of_b: Any) -> list[str]:
    """Replace processes: B takes `ratio` of A's time, with some noise. Returns the arms in the order they ran."""
    order: list[str] = []

    def run(arm: Arm, run_dir: Path, *_: object) -> ArmRun:
        run_dir.mkdir(parents=True)
        order.append(arm.name)
        noise = 1 + 0.001 * ((7 * len(order)) % 5)
        return _run(arm, noise * (ratio if arm.name == "b" else 1.0), **(of_b if arm.name == "b" else {}))

    clean = snapshot({}) | {"git_commit": "0" * 40, "git_dirty": False, "git_dirty_hash": None, "git_reason": None}
    monkeypatch.setattr(ab, "run_arm", run)
    monkeypatch.setattr(ab, "snapshot", lambda extra: clean)
    return order


@pytest.mark.parametrize(("ratio", "decision"), [(0.95, "kept"), (1.0, "noise"), (1.05, "rejected")])
def test_the_samples_decide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ratio: float, decision: str) -> None:
    order = _fake(monkeypatch, ratio)
    receipt = run_ab(_plan("FATHOM_PSIV_CACHE=gmem_pool"), command=["x"], machine="Box")
    assert receipt.decision.value == decision
    assert receipt.subject == "step_psiv_cache"
    comparison = receipt.comparison
    assert comparison is not None
    assert (comparison.gate, comparison.baseline, comparison.value) == ("psiv_cache", "off", "gmem_pool")
    assert comparison.ratio.value == pytest.approx(ratio, rel=0.01)
    assert comparison.difference_s == pytest.approx(ratio - 1, abs=0.01)
    assert [sampled.n for sampled in receipt.contenders] == [9, 9]
    assert all(sampled.mean_s < 2 for sampled in receipt.contenders), "the steps left out were timed"
    # One check of each, then rounds of both, in an order that changes.
    assert order[:2] == ["a", "b"]
    rounds = [tuple(order[i : i + 2]) for i in range(2, len(order), 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}
    path = tmp_path / "receipt.json"
    path.write_text(receipt.model_dump_json())
    if decision == "kept":
        assert read_evidence(path, "psiv_cache").ratio == pytest.approx(comparison.ratio.value)
    else:
        with pytest.raises(UserError, match="not kept"):
            read_evidence(path, "psiv_cache")


@pytest.mark.parametrize(
    ("of_b", "red"),
    [
        ({"loss": 2.1}, "loss of a and b"),
        ({"violations": 2}, "b: rules of the run log"),
        ({"loss": float("nan")}, "loss"),
    ],
)
def test_a_red_gate_times_nothing(monkeypatch: pytest.MonkeyPatch, of_b: dict[str, Any], red: str) -> None:
    order = _fake(monkeypatch, 0.5, **of_b)
    with pytest.raises(RedGate, match=red):
        run_ab(_plan("FATHOM_TMA=fwd"), command=["x"], machine=None)
    assert order == ["a", "b"]


@pytest.mark.parametrize("device", ["xla:0", "tpu"])
def test_a_device_that_receipts_are_not_of_is_refused_before_the_samples(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    order = _fake(monkeypatch, 0.9)
    fake = ab.run_arm

    def elsewhere(*args: Any) -> ArmRun:
        run = fake(*args)
        run.event("env.snapshot")["extra"]["device"] = device
        return run

    monkeypatch.setattr(ab, "run_arm", elsewhere)
    with pytest.raises(UserError, match=f"the arms ran on {device}"):
        run_ab(_plan("FATHOM_TMA=fwd"), command=["x"], machine=None)
    assert order == ["a", "b"]


def test_other_settings_compare_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(monkeypatch, 0.5, config="other", loss=3.0)
    receipt = run_ab(_plan("--optim.lr 1"), command=["x"], machine=None)
    assert receipt.decision.value == "kept"
    assert receipt.comparison is not None
    assert receipt.comparison.gate is None
    assert receipt.left_out[0].name == "losses of a and b"
    assert len(receipt.correctness) == 2


def test_two_gates_at_once_prove_neither() -> None:
    plan = _plan("FATHOM_TMA=fwd FATHOM_PSIV_CACHE=gmem_pool")
    assert compare(plan, _run(plan.a, 1.0), _run(plan.b, 1.0)).gate is None


def test_a_receipt_cannot_state_another_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(monkeypatch, 1.0)
    whole = json.loads(run_ab(_plan("FATHOM_TMA=fwd"), command=["x"], machine=None).model_dump_json())
    Receipt.model_validate(whole)
    decision, comparison = {"value": "kept", "reason": "hope"}, whole["comparison"]
    wrong_ratio = comparison | {"ratio": comparison["ratio"] | {"value": 0.5}}
    for spoiled, said in (
        (whole | {"decision": decision}, "but the rule says"),
        (whole | {"comparison": comparison | {"scope": "forward"}, "decision": decision}, "but the rule says"),
        (whole | {"comparison": None}, "without a comparison"),
        (whole | {"comparison": comparison | {"b": "c"}}, "no sample"),
        (whole | {"comparison": wrong_ratio}, "its samples give"),
        (whole | {"comparison": comparison | {"ratio": comparison["ratio"] | {"low": 0.1}}}, "its samples give"),
        (whole | {"comparison": comparison | {"ratio": comparison["ratio"] | {"high": 0.1}}}, "its samples give"),
        (whole | {"comparison": comparison | {"ratio": comparison["ratio"] | {"n": 99}}}, "its samples give"),
        (whole | {"comparison": comparison | {"difference_s": -0.5}}, "states difference_s -0.5"),
        (whole | {"comparison": comparison | {"difference_low_s": None}}, "states difference_low_s None"),
        (whole | {"decision": whole["decision"] | {"reason": "B takes 0.5 of A's time"}}, "its samples say"),
    ):
        with pytest.raises(ValidationError, match=said):
            Receipt.model_validate(spoiled)


@pytest.mark.parametrize(
    "words",
    [
        ["--n", "0"], ["--steps", "0"], ["--skip", "-1"], ["--tolerance", "2"], ["--limit", "0"],
        ["--receipt-dir", __file__], ["--receipt-dir", f"{__file__}/below"], ["--receipt-dir", "/proc/nowhere/at/all"],
    ],
)  # fmt: skip
def test_bad_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry(main, ["ab", "--a", "", "--b", "", *words]) == 2
    assert words[0] in capsys.readouterr().err


class _Done:
    def __init__(self, returncode: int) -> None:
        self.returncode, self.stderr = returncode, "error: because"


@pytest.mark.parametrize(
    ("status", "error", "said"), [(78, RunRefused, "b is refused"), (2, UserError, "ended with exit status 2")]
)
def test_an_arm_that_does_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, error: type[Exception], said: str
) -> None:
    monkeypatch.setattr(ab_arm.subprocess, "run", lambda *_, **__: _Done(status))
    with pytest.raises(error, match=said) as raised:
        ab_arm.run_arm(Arm.parse("b", "FATHOM_TMA=all"), tmp_path, Steps(1, 1), (), 1.0)
    assert "error: because" in str(raised.value)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the tokens per step takes longer; the receipt says so and keeps the schema."""
    recipe = write_recipe(build_corpus(tmp_path / "corpus"), tmp_path / "tiny.toml")
    base = f"--recipe {recipe} --train.steps 50"
    words = ["ab", "--a", base, "--b", f"{base} --data.windows_per_batch 8", "--n", "2", "--steps", "4", "--skip", "1"]
    out = tmp_path / "receipts"
    assert run_entry(main, [*words, "--receipt-dir", str(out), "--machine", "box"]) == 0
    (path,) = out.glob("*/receipt.json")
    receipt = Receipt.model_validate_json(path.read_bytes())
    assert receipt.comparison is not None
    assert receipt.comparison.ratio.value > 1
    assert receipt.hardware.threads == 1
    assert path.parent.name == receipt.directory_name()
    assert f"decision: {receipt.decision.value}" in capsys.readouterr().out
    refused = ["ab", "--a", base, "--b", f"FATHOM_TMA=fwd {base}", "--n", "1"]
    assert run_entry(main, refused) == 78
    assert "b is refused" in capsys.readouterr().err
