"""`fathom bench loss-side`: what scores say, gates on equal treatment, and real runs that go on where they stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from apps.eval.bench import loss_side, loss_side_runs
from apps.eval.bench.__main__ import main
from apps.eval.bench.loss_side import LossSideReceipt, SeedScore, Spread, answer_of, check_runs, spreads_of
from apps.eval.bench.loss_side_runs import LossSidePlan, Trained
from apps.eval.bench.ops import RedGate
from apps.eval.results import Estimate
from libs.flags.errors import RunRefused, UserError, run_entry
from tests.support.tiny_run import build_corpus, write_recipe

PLAN = LossSidePlan("tiny", "cpu_tiny", 64, 6, (0, 1, 2), 8, 1024, 1, ())


def _scores(hybrid: list[float], twin: list[float]) -> list[SeedScore]:
    both = (("hybrid", hybrid), ("twin", twin))
    return [
        SeedScore.model_validate({
            "model": model, "seed": seed, "run": f"{model}{seed}", "tokens": 384, "documents": 8,
            "bpb": Estimate(value=value, low=None, high=None),
        })
        for model, values in both for seed, value in enumerate(values)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("hybrid", "twin", "answer"),
    [
        ([4.10, 4.21, 4.31], [4.00, 4.10, 4.20], "dense_lower"),
        ([4.00, 4.10, 4.20], [4.10, 4.21, 4.31], "hybrid_lower"),
        ([4.00, 4.20, 4.40], [4.10, 4.10, 4.40], "not_told_apart"),
        ([4.00], [4.90], "not_told_apart"),
    ],
)
def test_seeds_decide_in_pairs(hybrid: list[float], twin: list[float], answer: str) -> None:
    """Seeds differ by more than the models do: only the paired difference tells the first two apart."""
    *_, difference = spreads_of(_scores(hybrid, twin))
    assert answer_of(difference) == answer
    assert difference.n == len(hybrid)


def test_the_interval_is_student_s() -> None:
    spread = Spread.of([1.0, 2.0, 3.0])
    assert (spread.low, spread.high) == (pytest.approx(2 - 4.303 / 3**0.5), pytest.approx(2 + 4.303 / 3**0.5))
    assert Spread.of([1.0]).low is None


@pytest.fixture
def _one_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody edited a file while the test runs."""
    monkeypatch.setattr(loss_side_runs, "code_version", lambda: "code")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """One seed of both models, really trained and evaluated by the programs."""
    root = tmp_path_factory.mktemp("loss-side")
    recipe = write_recipe(build_corpus(root / "corpus"), root / "tiny.toml")
    words = ["loss-side", "--recipe", str(recipe), "--preset", "cpu_tiny", "--window", "64", "--steps", "6"]
    words += ["--seeds", "1", "--documents", "6", "--max-tokens", "1k", "--threads", "1", "--work", str(root / "work")]
    words += ["--receipt-dir", str(root / "receipts"), "--machine", "box", "--", "--optim.lr", "0.02"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loss_side_runs, "code_version", lambda: "code")
        assert run_entry(main, words) == 0
    return root, words


@pytest.mark.slow
def test_real_runs(workplace: tuple[Path, list[str]]) -> None:
    root, _ = workplace
    (path,) = (root / "receipts").glob("*/receipt.json")
    receipt = LossSideReceipt.model_validate_json(path.read_bytes())
    assert [(one.model, one.seed) for one in receipt.scores] == [("hybrid", 0), ("twin", 0)]
    assert {one.tokens for one in receipt.scores} == {6 * 64}
    assert receipt.answer == "not_told_apart", "one seed has no interval"
    assert all(check.passed for check in receipt.correctness)
    settings = json.loads((root / "work" / "twin-seed0" / "config.json").read_bytes())["config"]
    assert settings["optim"]["lr"] == 0.02
    assert settings["model"]["pattern"] == "*-*-/*-"
    content = json.loads(path.read_bytes())
    for field, value in (
        ("answer", "dense_lower"),
        ("difference", content["difference"] | {"mean": 0.5}),
        ("decision", {"value": "record", "reason": "the hybrid has the lower loss"}),
        ("scores", [content["scores"][0], content["scores"][0] | {"seed": 1}]),
    ):
        with pytest.raises(ValidationError):
            LossSideReceipt.model_validate(content | {field: value})


@pytest.mark.slow
@pytest.mark.usefixtures("_one_code")
def test_what_is_done_is_not_done_again(
    workplace: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, words = workplace
    ran: list[list[str]] = []
    program = loss_side_runs._program

    def counted(module: str, given: list[str]) -> None:
        ran.append([module, *given[:2]])
        program(module, given)

    monkeypatch.setattr(loss_side_runs, "_program", counted)
    assert run_entry(main, words) == 0
    assert ran == []
    shutil.rmtree(root / "work" / "hybrid-seed0" / "eval")
    assert run_entry(main, words) == 0
    assert [one[0] for one in ran] == ["apps.eval"]
    # A result of an older checkpoint, in a folder with the right name.
    ran.clear()
    result = root / "work" / "twin-seed0" / "eval" / "loss_by_position.json"
    content = json.loads(result.read_bytes())
    result.write_text(json.dumps(content | {"checkpoint": content["checkpoint"] | {"step": 3}}))
    assert run_entry(main, words) == 0
    assert [one[0] for one in ran] == ["apps.eval"]
    assert "step 3, not 6): evaluated again" in capsys.readouterr().err
    assert json.loads(result.read_bytes())["checkpoint"] == content["checkpoint"]
    assert len(list(result.parent.glob("loss_by_position.2*.json"))) == 1
    # An attempt without an end: the log is cut off as a killed process leaves it.
    ran.clear()
    run = root / "work" / "twin-seed0"
    log = run / "logs" / "rank00000.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    end = next(i for i, event in enumerate(events) if event["event"] == "run.stop")
    assert loss_side_runs._status(run) == "completed"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:end]))
    assert loss_side_runs._status(run) is None
    assert loss_side_runs._train_words(PLAN, "twin", 0, run) == ["--resume", str(run)]
    capsys.readouterr()
    changed = [*words[:8], "7", *words[9:]] if words[7] == "--steps" else [w if w != "6" else "7" for w in words]
    assert run_entry(main, changed) == 2
    assert "another plan" in capsys.readouterr().err


def _trained(model: str, seed: int, **changed: Any) -> Trained:
    class Score:
        class data:
            prompt_sha256 = changed.get("prompt", "p")

        class checkpoint:
            parameters = changed.get("parameters", 1000)
            step = changed.get("step", 6)

    fields = {"violations": 0, "tokens": 384, "data": "d"} | {k: v for k, v in changed.items() if k in Trained._fields}
    return Trained(model=model, seed=seed, run=f"{model}{seed}", score=Score(), step_s=1.0, threads=1, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "red"),
    [
        ({}, None),
        ({"violations": 2}, "twin0: rules of the run log"),
        ({"tokens": 385}, "seed 0: tokens trained on differ"),
        ({"data": "e"}, "seed 0: training data differ"),
        ({"prompt": "q"}, "seed 0: documents scored differ"),
        ({"parameters": 1100}, "seed 0: parameters differ"),
        ({"step": 3}, "seed 0: steps of the checkpoints scored differ"),
    ],
)
def test_both_models_must_have_got_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: dict[str, Any], red: str | None
) -> None:
    runs = [_trained("hybrid", 0), _trained("twin", 0, **changed)]
    assert [outcome.name for outcome in check_runs(runs) if not outcome.passed] == ([] if red is None else [red])
    if red is not None:
        monkeypatch.setattr(loss_side, "run_all", lambda *_: runs)
        with pytest.raises(RedGate, match=red):
            loss_side.run_loss_side(PLAN, tmp_path, command=["fathom"], machine="box")


LAST = "b" * 64


def _result(**changed: Any) -> SimpleNamespace:
    """Of the last checkpoint of a run of PLAN, scored as planned, but for what is changed."""
    checkpoint = {"step": PLAN.steps, "sha256": LAST} | {k: v for k, v in changed.items() if k in ("step", "sha256")}
    config = {"split": "valid", "max_documents": PLAN.documents, "max_tokens": PLAN.max_tokens, "seed": 0}
    config |= {k: v for k, v in changed.items() if k in config}
    return SimpleNamespace(checkpoint=SimpleNamespace(**checkpoint), config=config)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"step": 3}, "step 3, not 6"),
        ({"step": None}, "step None, not 6"),
        ({"sha256": "a" * 64}, "checkpoint a"),
        ({"split": "train"}, "split train, not valid"),
        ({"max_documents": 2}, "max_documents 2, not 8"),
        ({"max_documents": None}, "max_documents None, not 8"),
        ({"max_tokens": 512}, "max_tokens 512, not 1024"),
    ],
)
def test_a_result_of_something_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any], said: str | None,
) -> None:  # fmt: skip
    path = tmp_path / "eval" / "loss_by_position.json"
    path.parent.mkdir()
    path.write_text("")
    commits = [{"event": "checkpoint.commit", "sha256": sha256} for sha256 in ("a" * 64, LAST)]
    results, evaluated = [_result(**changed), _result()], []
    monkeypatch.setattr(loss_side_runs, "read_events", lambda run_dir: iter(commits))
    monkeypatch.setattr(loss_side_runs, "read_result", lambda where: results.pop(0))
    monkeypatch.setattr(loss_side_runs, "_program", lambda module, words: evaluated.append([module, *words]))
    assert loss_side_runs._unlike(PLAN, tmp_path, loss_side_runs._scored(PLAN, tmp_path)) == []
    assert len(evaluated) == (0 if said is None else 1)
    assert (said or "") in capsys.readouterr().err
    # A new result that is no better is the run's fault.
    if said is not None:
        results[:] = [_result(**changed), _result(**changed)]
        with pytest.raises(UserError, match="is no run of this plan"):
            loss_side_runs._scored(PLAN, tmp_path)


@pytest.mark.parametrize("missing", [("twin", 1), ("hybrid", 0)])
def test_a_score_without_a_partner_is_told(missing: tuple[str, int]) -> None:
    scores = [one for one in _scores([4.0, 4.1], [4.1, 4.2]) if (one.model, one.seed) != missing]
    with pytest.raises(ValueError, match="not one score of each model"):
        spreads_of(scores)


@pytest.mark.usefixtures("_one_code")
def test_a_folder_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"has files and no plan\.json"):
        loss_side_runs._claim(PLAN, tmp_path)
    loss_side_runs._claim(PLAN, tmp_path / "new")
    loss_side_runs._claim(PLAN, tmp_path / "new")
    with pytest.raises(UserError, match=r"another plan \(steps differ\)"):
        loss_side_runs._claim(PLAN._replace(steps=7), tmp_path / "new")
    monkeypatch.setattr(loss_side_runs, "code_version", lambda: "other code")
    with pytest.raises(UserError, match="another version of the code"):
        loss_side_runs._claim(PLAN, tmp_path / "new")


def test_a_program_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode, stderr = 2, "error: no such data"

    monkeypatch.setattr(loss_side_runs.subprocess, "run", lambda *_, **__: Done)
    with pytest.raises(UserError, match="no such data"):
        loss_side_runs._program("apps.train", ["--recipe", "x"])
    Done.returncode = 78
    with pytest.raises(RunRefused, match="is refused"):
        loss_side_runs._program("apps.train", [])
