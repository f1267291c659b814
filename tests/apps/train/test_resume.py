"""N + resume + N steps equal 2N steps bit for bit, wherever the run was interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from apps.train import evaluate, loop, save, snapshot, start, step, writer
from libs.flags.logcheck import check_log
from libs.flags.runlog import log_path, read_events
from libs.flags.runs import verify_run
from libs.flags.verify import verify_chain

Train = Callable[..., int]

# What may differ between two runs of the same steps: when, how fast, in how much memory.
TIMES = {"ts", "mono_ns", "run_id", "attempt", "tokens_per_s", "max_memory_bytes"}
ENVELOPE = {"schema", "level", "rank"}


def history(run_dir: Path, name: str) -> dict[int, dict[str, Any]]:
    """Step -> what the log says of it; a step that was logged twice must have been logged alike."""
    found: dict[int, dict[str, Any]] = {}
    for event in read_events(run_dir):
        if event["event"] == name:
            kept = {k: v for k, v in event.items() if k not in TIMES | ENVELOPE and not k.endswith("_s")}
            assert found.setdefault(event["step"], kept) == kept
    return found


def assert_same_run(left: Path, right: Path, *, step: int) -> None:
    """Weights, optimizer, cursor, generators and log of two runs, bit for bit."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(run / "checkpoints" / f"step-{step:08d}" / name) for run in (left, right))
        assert a.keys() == b.keys()
        assert a, name
        for key in a:
            assert torch.equal(a[key], b[key]), (name, key)
    states = [
        json.loads((run / "checkpoints" / f"step-{step:08d}" / "trainer.json").read_text()) for run in (left, right)
    ]
    for key in ("step", "cursor", "rng", "tokens_total", "evaluated_at", "skipped", "gates", "data_fingerprint"):
        assert states[0][key] == states[1][key], key
    for name in ("train.step", "eval.result"):
        first, second = history(left, name), history(right, name)
        assert first == second
        assert first, name


@pytest.fixture
def whole(train: Train, recipe: Path, tmp_path: Path) -> Path:
    """Eight steps without interruption."""
    assert train("--recipe", recipe, "--run-dir", tmp_path / "whole") == 0
    return tmp_path / "whole"


def kill_in(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, *, call: int, after: bool = False) -> None:
    """Send SIGTERM to this process in the given call of a function, before or after its work."""
    original = getattr(module, name)
    calls = {"n": 0}

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == call and not after:
            os.kill(os.getpid(), signal.SIGTERM)
        result = original(*args, **kwargs)
        if calls["n"] == call and after:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(module, name, wrapped)


def test_log_of_a_whole_run(whole: Path) -> None:
    names = [event["event"] for event in read_events(whole) if event["event"] != "gate.exposed"]
    assert names[:4] == ["run.start", "config.resolved", "gates.resolved", "env.snapshot"]
    assert names.count("kernel.selftest") == 1
    assert names[-1] == "run.stop"
    assert list(history(whole, "train.step")) == list(range(1, 9))
    assert list(history(whole, "eval.result")) == [0, 4, 8]
    first, last = (history(whole, "eval.result")[k]["metrics"]["bpb"] for k in (0, 8))
    assert last < 0.9 * first
    assert verify_chain(whole / "audit" / "rank00000.jsonl").status == "intact"


def test_interrupted_by_its_own_limit(train: Train, recipe: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run, "--train.stop_after", "4") == 75
    assert train("--resume", run) == 0
    assert_same_run(whole, run, step=8)


@pytest.mark.parametrize(
    ("module", "name", "call", "phase", "at"),
    [
        (step, "accumulate_gradients", 2, "step", 2),  # in the warm-up of the learning rate
        (step, "accumulate_gradients", 6, "step", 6),
        (evaluate, "score_documents", 1, "evaluation", 0),
        (evaluate, "score_documents", 2, "evaluation", 4),
        (evaluate, "score_documents", 3, "evaluation", 8),
    ],
)
def test_killed(
    train: Train,
    recipe: Path,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    call: int,
    phase: str,
    at: int,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_in(patch, module, name, call=call)
        assert train("--recipe", recipe, "--run-dir", run) == 75
    received = [event for event in read_events(run) if event["event"] == "signal.received"]
    assert [(event["signal"], event["phase"]) for event in received] == [("SIGTERM", phase)]
    assert save.committed_steps(run) == [at]
    stop = list(read_events(run))[-1]
    assert (stop["event"], stop["status"], stop["exit_code"]) == ("run.stop", "requeue", 75)
    assert train("--resume", run) == 0
    if at == 8:  # the last checkpoint was written before the last evaluation, which the resumed run made up for
        assert history(run, "eval.result") == history(whole, "eval.result")
    else:
        assert_same_run(whole, run, step=8)


@pytest.mark.parametrize("after", [False, True])
def test_killed_while_saving(
    train: Train, recipe: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_in(patch, snapshot, "save_model", call=1, after=after)
        assert train("--recipe", recipe, "--run-dir", run, "--checkpoint.every", "3") == 75
    assert [e["phase"] for e in read_events(run) if e["event"] == "signal.received"] == ["checkpoint"]
    assert save.committed_steps(run) == [3]
    assert train("--resume", run) == 0
    assert_same_run(whole, run, step=8)


@pytest.mark.parametrize("name", ["build_engine", "_build_model"])
def test_killed_in_start_up(
    train: Train, recipe: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_in(patch, start, name, call=1)
        assert train("--recipe", recipe, "--run-dir", run) == 75
    assert not (run / "checkpoints").exists()
    assert [e["phase"] for e in read_events(run) if e["event"] == "signal.received"] == ["startup"]
    assert list(read_events(run))[-1]["exit_code"] == 75
    assert train("--resume", run) == 0
    assert_same_run(whole, run, step=8)


class Killed(BaseException):
    """Ends the process at once, as far as a test in the same process can."""


def die_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, call: int) -> None:
    original, calls = getattr(owner, name), {"n": 0}

    def die(*args: Any, **kwargs: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, die)


@pytest.fixture
def unsaved(train: Train, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that died after two steps, before its first checkpoint."""
    with monkeypatch.context() as patch:
        die_in(patch, loop, "train_step", call=3)
        with pytest.raises(Killed):
            train("--recipe", recipe, "--run-dir", tmp_path / "run")
    assert not save.committed_steps(tmp_path / "run")
    return tmp_path / "run"


def test_killed_between_the_marker_and_the_log(
    train: Train, recipe: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_in(patch, loop.Saves, "on_commit", call=2)
        with pytest.raises(Killed):
            train("--recipe", recipe, "--run-dir", run, "--checkpoint.every", "2")
    path = log_path(run)
    lines = path.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["event"] == "run.stop"
    path.write_text("".join(lines[:-1]))  # nor did the process live to write that
    assert save.committed_steps(run) == [2, 4]
    assert train("--resume", run) == 0
    assert_same_run(whole, run, step=8)
    assert check_log(run).violations == ()


def test_resumed_before_the_first_checkpoint(train: Train, unsaved: Path, whole: Path) -> None:
    assert train("--resume", unsaved) == 0
    assert_same_run(whole, unsaved, step=8)
    assert check_log(unsaved).violations == ()


def _recorded(run: Path, event: str, change: Callable[[dict[str, Any]], None], **where: object) -> None:
    """Change one event of the log, as if the earlier attempt had been another one."""
    path = log_path(run)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = [r for r in records if r["event"] == event and all(r.get(k) == v for k, v in where.items())]
    change(found[0])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("event", "where", "change", "status", "said"),
    [
        ("data.fingerprint", {}, {"fingerprint": "f"}, 2, "an earlier attempt had data fingerprint 'f', now"),
        ("backend.chosen", {"op": "train.device"}, {"value": "cuda"}, 2, "had device 'cuda', now it is 'cpu'"),
        ("backend.chosen", {"op": "train.precision"}, {"value": "bf16"}, 2, "had precision 'bf16', now it is 'fp32'"),
        ("gates.resolved", {}, {}, 78, "--accept-gate-change tma"),
    ],
)
def test_other_circumstances_before_the_first_checkpoint(
    train: Train,
    unsaved: Path,
    capsys: pytest.CaptureFixture[str],
    event: str,
    where: dict[str, str],
    change: dict[str, str],
    status: int,
    said: str,
) -> None:
    def edit(record: dict[str, Any]) -> None:
        record.update(change)
        for row in record.get("gates", []):
            row["value"] = "fwd" if row["gate"] == "tma" else row["value"]

    _recorded(unsaved, event, edit, **where)
    assert train("--resume", unsaved) == status
    assert said in capsys.readouterr().err
    assert train("--resume", unsaved) == status, "a refused attempt does not become what is compared with"


@pytest.mark.parametrize("gone", [False, True])
def test_checkpoints_hold_the_tokenizer_the_run_opened(
    train: Train, recipe: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    """Whatever becomes of the data directory while the run goes on."""
    data, run, original = tmp_path / "data", tmp_path / "run", loop.train_step
    shutil.copytree(corpus, data)
    definition = (data / "tokenizer.json").read_bytes()

    def meddle(*args: Any, **kwargs: Any) -> Any:
        shutil.rmtree(data) if gone else (data / "tokenizer.json").write_text("{}")
        monkeypatch.setattr(loop, "train_step", original)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", meddle)
    assert train("--recipe", recipe, "--data.dir", data, "--run-dir", run) == 0
    assert (run / "checkpoints" / "step-00000008" / "tokenizer.json").read_bytes() == definition


def test_other_things_among_the_checkpoints_stop_no_resume(train: Train, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run, "--train.stop_after", "3") == 75
    folder = run / "checkpoints"
    (folder / "best").symlink_to("step-00000003")
    (folder / "notes.txt").write_text("mine")
    (folder / "mine").mkdir()
    assert train("--resume", run) == 0
    assert {"best", "notes.txt", "mine", "step-00000008"} <= {path.name for path in folder.iterdir()}


def test_killed_three_times_with_accumulation_and_checkpointing(train: Train, recipe: Path, tmp_path: Path) -> None:
    words = ["--recipe", recipe, "--train.grad_accumulation", "2", "--train.activation_checkpointing", "block"]
    assert train(*words, "--run-dir", tmp_path / "whole") == 0
    run = tmp_path / "run"
    assert train(*words, "--run-dir", run, "--train.stop_after", "1") == 75
    assert train("--resume", run, "--train.stop_after", "3") == 75
    assert train("--resume", run, "--train.stop_after", "7") == 75
    assert train("--resume", run) == 0
    assert_same_run(tmp_path / "whole", run, step=8)
    assert [e["attempt"] for e in read_events(run) if e["event"] == "run.start"] == [0, 1, 2, 3]


def test_the_comparison_can_fail(
    train: Train, recipe: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume that forgets one part of the state must not pass as the same run."""
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run, "--train.stop_after", "4") == 75
    with monkeypatch.context() as patch:
        patch.setattr(start, "restore_optimizer", lambda *_: None)
        assert train("--resume", run) == 0
    with pytest.raises(AssertionError):
        assert_same_run(whole, run, step=8)


def test_from_an_earlier_step(train: Train, recipe: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run, "--checkpoint.every", "2", "--checkpoint.keep_last", "9") == 0
    assert save.committed_steps(run) == [2, 4, 6, 8]
    assert train("--resume", run, "--from-step", "4") == 0
    assert save.committed_steps(run) == [2, 4, 6, 8]
    kept = sorted(path.name for path in (run / "checkpoints" / "superseded" / "before-attempt-1").iterdir())
    assert kept == ["step-00000006", "step-00000008"]
    assert_same_run(whole, run, step=8)


def test_a_finished_run_resumes_to_nothing(train: Train, whole: Path) -> None:
    before = (whole / "checkpoints" / "step-00000008" / "COMMITTED").stat().st_mtime_ns
    assert train("--resume", whole) == 0
    assert (whole / "checkpoints" / "step-00000008" / "COMMITTED").stat().st_mtime_ns == before
    assert list(history(whole, "train.step")) == list(range(1, 9))


def test_the_number_of_threads_is_that_of_the_first_attempt(train: Train, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run, "--train.threads", "2", "--train.stop_after", "2") == 75
    torch.set_num_threads(1)
    assert train("--resume", run, "--train.stop_after", "3") == 75
    chosen = [e for e in read_events(run) if e["event"] == "backend.chosen" and e["op"] == "train.threads"]
    assert [event["value"] for event in chosen] == ["2", "2"]
    assert "as before the interruption" in chosen[1]["reason"]


def test_loop_uses_the_functions_the_tests_interrupt() -> None:
    """The interruptions above patch names; they mean nothing if the loop calls others."""
    assert loop.CheckpointWriter is writer.CheckpointWriter
    assert writer.save_checkpoint is save.save_checkpoint
    assert loop.validate is evaluate.validate


def test_a_run_with_paths_that_are_not_utf8_goes_on(train: Train, recipe: Path, corpus: Path, tmp_path: Path) -> None:
    """Their bytes stay in config.json; the records hold them spelled out, and every reader takes them."""
    data, named, run = tmp_path / "caf\udce9", tmp_path / "t\udce9.toml", tmp_path / "run"
    shutil.copytree(corpus, data)
    shutil.copy(recipe, named)
    assert train("--recipe", named, "--data.dir", data, "--train.stop_after", 2, "--run-dir", run) == 75
    assert train("--resume", run) == 0
    fingerprints = [event["data_dir"] for event in read_events(run) if event["event"] == "data.fingerprint"]
    assert fingerprints == [str(tmp_path / "caf\\udce9")] * 2
    assert verify_run(run)[0].status == "intact"
    assert check_log(run).violations == ()


def test_data_may_have_moved(train: Train, recipe: Path, corpus: Path, tmp_path: Path) -> None:
    """Their place may be another one on resume; what they hold may not (test_refusals)."""
    first, then, run = tmp_path / "first", tmp_path / "then", tmp_path / "run"
    shutil.copytree(corpus, first)
    assert train("--recipe", recipe, "--data.dir", first, "--train.stop_after", 2, "--run-dir", run) == 75
    first.rename(then)
    assert train("--resume", run) == 2
    assert train("--resume", run, "--data.dir", then) == 0
