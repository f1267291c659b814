"""`fathom eval` from the command line: what it writes, what it records, what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from apps.eval.__main__ import main
from apps.eval.config import parse_tokens
from apps.eval.results import check_place, items_path, read_result, write_result
from apps.eval.suites import SUITES
from libs.flags.audit_record import audit_path
from libs.flags.errors import UserError, run_entry
from libs.flags.logcheck import check_log
from libs.flags.runlog import log_path, read_events
from libs.flags.runs import verify_run
from libs.model.checkpoint import MARKER, commit
from libs.model.text.shards import DataDir
from tests.apps.eval.small_run import RUN_ID, build_data_dir, make_run, save_checkpoint

QUICK = ("--suite", "loss_by_position", "--max-documents", "4", "--span-tokens", "32")


def run_cli(*arguments: str | Path) -> int:
    return run_entry(main, [str(argument) for argument in arguments])


def test_result_and_record(run_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("--checkpoint", run_dir, *QUICK, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    path = run_dir / "eval" / "loss_by_position.json"
    result = read_result(path)
    assert json.loads(path.read_text()) == printed
    assert result.checkpoint.path == "checkpoints/step-00000040"
    assert result.checkpoint.step == 40
    assert result.n + len(result.excluded) == 4
    assert result.available == 12
    assert result.details.trained_window == 128
    assert set(result.backends) == {"mimo", "attention", "loss"}
    assert result.data.directory == str(data_dir)

    events = [event for event in read_events(run_dir) if event["attempt"] == 1]
    assert [event["event"] for event in events] == [
        "run.start", "config.resolved", "gates.resolved", "env.snapshot", "eval.result", "run.stop",
    ]  # fmt: skip
    recorded = events[-2]
    assert recorded["metrics"] == result.metrics
    assert recorded["path"] == "eval/loss_by_position.json"
    assert recorded["step"] == 40
    assert events[0]["gates_hash"] == result.gates.hash
    assert check_log(run_dir).violations == ()
    assert verify_run(run_dir)[0].status == "intact"


def test_same_again_gives_the_same_numbers_and_keeps_the_first_file(run_dir: Path) -> None:
    for _ in range(2):
        assert run_cli("--checkpoint", run_dir, *QUICK) == 0
    files = sorted((run_dir / "eval").glob("*.json"))
    assert len(files) == 2
    assert {items_path(file) for file in files} == set((run_dir / "eval").glob("*.jsonl"))
    for file in files:
        written = items_path(file).read_bytes()
        assert read_result(file).items.sha256 == hashlib.sha256(written).hexdigest()
        assert written.count(b"\n") == read_result(file).items.lines == read_result(file).n
    first, second = (read_result(file) for file in files)
    assert first.details == second.details
    assert first.metrics == second.metrics
    assert first.data == second.data


def test_the_draw_depends_on_the_seed_and_the_hash_on_the_draw(run_dir: Path, tmp_path: Path) -> None:
    results = []
    for seed in ("0", "0", "5"):
        out = tmp_path / f"r{len(results)}.json"
        assert run_cli("--checkpoint", run_dir, *QUICK, "--seed", seed, "--out", out, "--detached") == 0
        results.append(read_result(out))
    assert results[0].data.prompt_sha256 == results[1].data.prompt_sha256 != results[2].data.prompt_sha256


def test_detached_leaves_the_run_alone(run_dir: Path, tmp_path: Path) -> None:
    before = log_path(run_dir).read_bytes(), audit_path(run_dir).read_bytes()
    assert run_cli("--checkpoint", run_dir, *QUICK, "--detached", "--out", tmp_path / "r.json") == 0
    assert (log_path(run_dir).read_bytes(), audit_path(run_dir).read_bytes()) == before


def test_an_older_checkpoint_by_its_directory(run_dir: Path, tmp_path: Path) -> None:
    older = run_dir / "checkpoints" / "step-00000020"
    assert run_cli("--checkpoint", older, *QUICK, "--out", tmp_path / "old.json") == 0
    assert read_result(tmp_path / "old.json").checkpoint.step == 20


def test_a_refused_gate_is_recorded_and_nothing_is_written(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FATHOM_PSIV_CACHE", "yes")
    assert run_cli("--checkpoint", run_dir, *QUICK) == 78
    assert "FATHOM_PSIV_CACHE" in capsys.readouterr().err
    assert not (run_dir / "eval").exists()
    events = [event for event in read_events(run_dir) if event["attempt"] == 1]
    assert [e["event"] for e in events] == ["run.start", "config.resolved", "gate.refused", "run.stop"]
    assert events[-1]["status"] == "refused"
    assert check_log(run_dir).violations == ()


def test_a_failed_evaluation_is_recorded_as_failed(run_dir: Path) -> None:
    assert run_cli("--checkpoint", run_dir, *QUICK, "--max-tokens", "10") == 2
    last = list(read_events(run_dir))[-1]
    assert (last["event"], last["status"], last["exit_code"]) == ("run.stop", "failed", 2)
    assert not (run_dir / "eval").exists()
    assert check_log(run_dir).violations == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "loss_by_positon"], "did you mean 'loss_by_position'"),
        ([*QUICK, "--context", "4k,1k"], "rising"),
        ([*QUICK, "--context", "many"], "not a number of tokens"),
        ([*QUICK, "--max-documents", "0"], "--max-documents"),
        ([*QUICK, "--split", "test"], "--split"),
        ([*QUICK, "--data", "/nonexistent"], "no data directory"),
        ([*QUICK, "--context", "64,60k"], "no drawn document"),
        ([*QUICK, "--items", "0"], "--items"),
        (["--suite", "needle,scop"], "did you mean 'scope'"),
    ],
)
def test_usage_errors_say_what_is_wrong(
    run_dir: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("--checkpoint", run_dir, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (run_dir / "eval").exists()


def test_a_changed_checkpoint_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run_dir / "checkpoints" / "step-00000040" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert run_cli("--checkpoint", run_dir, *QUICK) == 2
    assert "corrupt checkpoint" in capsys.readouterr().err


def test_a_tampered_audit_chain_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = audit_path(run_dir)
    chain.write_bytes(chain.read_bytes().replace(b'"off"', b'"on!"', 1))
    assert run_cli("--checkpoint", run_dir, *QUICK) == 2
    assert "tampered" in capsys.readouterr().err
    assert not (run_dir / "eval").exists()


def test_a_checkpoint_outside_a_run_needs_data_and_out(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path, 7, data_dir, anchor="0" * 64 + ":0")
    checkpoint = tmp_path / "checkpoints" / "step-00000007"
    assert run_cli("--checkpoint", checkpoint, *QUICK) == 2
    assert "--data" in capsys.readouterr().err
    assert run_cli("--checkpoint", checkpoint, *QUICK, "--data", data_dir) == 2
    assert "--out" in capsys.readouterr().err
    assert run_cli("--checkpoint", checkpoint, *QUICK, "--data", data_dir, "--out", tmp_path / "r.json") == 0


def test_another_tokenizer_is_refused(tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / RUN_ID
    run_dir.mkdir()
    other = build_data_dir(tmp_path / "other", {"train": [600] * 5, "valid": [900] * 4})
    make_run(run_dir, other)
    definition = other / "tokenizer.json"
    # The same bytes under other ids: the text can be encoded, and would mean nothing to the model.
    checkpoint = run_dir / "checkpoints" / "step-00000040"
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in checkpoint.iterdir():
        if file.name not in ("MANIFEST.json", MARKER):
            (moved / file.name).write_bytes(file.read_bytes())
    vocabulary = json.loads(definition.read_text())
    ids = vocabulary["model"]["vocab"]
    a, b = [name for name, index in ids.items() if index in (100, 101)]
    ids[a], ids[b] = ids[b], ids[a]
    (moved / "tokenizer.json").write_text(json.dumps(vocabulary))
    commit(moved, tmp_path / "standalone" / "step-00000040")
    arguments = ("--data", other, "--out", tmp_path / "r.json")
    assert run_cli("--checkpoint", tmp_path / "standalone" / "step-00000040", *QUICK, *arguments) == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_lengths_are_written_with_a_unit() -> None:
    assert [parse_tokens(text) for text in ("512", "1k", "64K", " 4k")] == [512, 1024, 65536, 4096]
    for text in ("", "0", "-1", "1.5k", "4m"):
        with pytest.raises(UserError):
            parse_tokens(text)


@pytest.mark.slow
def test_several_suites_are_one_attempt_with_a_result_each(tmp_path: Path, cpp_dir: Path) -> None:
    """`--suite all` on a tiny model over real C++; lengths that only some suites can have do not stop the others."""
    run_dir = tmp_path / RUN_ID
    run_dir.mkdir()
    make_run(run_dir, cpp_dir, steps=20, vocab_size=DataDir.open(cpp_dir).tokenizer.vocab_size)
    quick = ("--max-documents", "30", "--items", "1", "--context", "512,2k", "--max-tokens", "2k")
    assert run_cli("--checkpoint", run_dir, "--suite", "all", *quick) == 0
    results = {path.stem: read_result(path) for path in (run_dir / "eval").glob("*.json")}
    assert results.keys() == SUITES.keys()
    for name, result in results.items():
        lines = [json.loads(line) for line in items_path(run_dir / "eval" / f"{name}.json").read_text().splitlines()]
        assert len(lines) == result.items.lines
        assert result.n > 0
        assert sum(not line.get("control") for line in lines) == result.n
        assert len(result.data.prompt_sha256) == 64
    assert results["needle"].details.prefix.mode == "off"
    events = [event for event in read_events(run_dir) if event["attempt"] == 1]
    assert [e["suite"] for e in events if e["event"] == "eval.result"] == list(SUITES)
    assert [e["gate"] for e in events if e["event"] == "gate.exposed"] == ["prefix_cache", "mtp_speculation"]
    assert check_log(run_dir).violations == ()
    assert verify_run(run_dir)[0].status == "intact"


def test_a_file_that_is_no_result_is_not_overwritten(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "eval").mkdir()
    mine = run_dir / "eval" / "loss_by_position.json"
    mine.write_text("my notes")
    assert run_cli("--checkpoint", run_dir, *QUICK) == 2
    assert "no evaluation result" in capsys.readouterr().err
    assert mine.read_text() == "my notes"


@pytest.mark.parametrize(
    "content", ["my notes", "[]", "{}", '{"created": "2026-01-01T00:00:00Z"}', '{"suite": "s", "created": "a/b"}',
                '{"suite": "s", "created": null}', '{"suite": "s", "created": "../../../../x"}'],
)  # fmt: skip
def test_a_place_that_holds_no_result_is_refused_before_anything_is_scored(
    run_dir: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apps.eval.run.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    before = log_path(run_dir).read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    (out / "needle.json").write_text(content)
    for words in (("--suite", "needle", "--out", out / "needle.json"), ("--suite", "all", "--out", out)):
        assert run_cli("--checkpoint", run_dir, *words) == 2
        error = capsys.readouterr().err
        assert f"{out}/needle.json is no evaluation result: " in error
        assert "move it, or give --out FILE" in error
    assert run_cli("--checkpoint", run_dir, *QUICK, "--out", out) == 2
    assert f"{out} is a directory: give the name of a JSON file" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["needle.json"]
    assert (out / "needle.json").read_text() == content
    assert log_path(run_dir).read_bytes() == before


@pytest.mark.parametrize("out", ["/proc/xx/o.json", "FILE/o.json", f"DIR/{'x' * 300}.json"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_scored(
    run_dir: Path, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apps.eval.run.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    place = out.replace("FILE", str(tmp_path / "file")).replace("DIR", str(tmp_path))
    assert run_cli("--checkpoint", run_dir, *QUICK, "--out", place) == 2
    assert f"cannot write the result {place}: " in capsys.readouterr().err


def test_a_late_refusal_names_what_was_scored(run_dir: Path, tmp_path: Path) -> None:
    """Somebody else's file came while the suite ran: it stays, and the result lies beside it, whole."""
    assert run_cli("--checkpoint", run_dir, *QUICK) == 0
    result = read_result(run_dir / "eval" / "loss_by_position.json")
    late = tmp_path / "new" / "r.json"
    check_place(late)
    assert not late.parent.exists(), "looking leaves nothing behind"
    late.parent.mkdir()
    late.write_text("my notes")
    with pytest.raises(UserError, match=r"is no evaluation result.*what was scored lies in .*/\.r\.json\.partial"):
        write_result(result, "", late)
    assert late.read_text() == "my notes"
    assert read_result(late.with_name(".r.json.partial")) == result


def test_a_result_of_an_older_schema_is_kept_under_its_time(run_dir: Path) -> None:
    (run_dir / "eval").mkdir()
    old = {"schema_version": 1, "suite": "loss_by_position", "created": "2025-02-03T04:05:06.000007Z"}
    (run_dir / "eval" / "loss_by_position.json").write_text(json.dumps(old))
    assert run_cli("--checkpoint", run_dir, *QUICK) == 0
    kept = run_dir / "eval" / "loss_by_position.20250203T040506.000007Z.json"
    assert json.loads(kept.read_text()) == old
