"""Files of a run that are gone: a chain or a log that the others, a checkpoint or an anchor tell of is missed; a rank
that never came to write them is no case of tampering."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from libs.flags.audit_record import audit_path
from libs.flags.cli import main_flags, main_log
from libs.flags.errors import UserError, run_entry
from libs.flags.events import RunStart
from libs.flags.fleet_cli import main_runs
from libs.flags.runlog import RunLog, log_path, read_events
from libs.flags.runs import verify_run
from libs.flags.summary import summarise

Write = Callable[..., Path]


@pytest.fixture
def two(write_run: Write, tmp_path: Path) -> Path:
    """A finished run of two ranks with a committed checkpoint."""
    run = tmp_path / "two"
    for rank in (0, 1):
        write_run(run, rank=rank, world_size=2)
    checkpoint = run / "checkpoints" / "step-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer.json").write_text(json.dumps({"audit_anchor": _anchor(run)}))
    (checkpoint / "COMMITTED").touch()
    assert [verdict.status for verdict in verify_run(run).values()] == ["intact", "intact"]
    return run


@pytest.fixture
def killed(write_run: Write, tmp_path: Path) -> Path:
    """Two ranks killed before the first checkpoint: no anchor anywhere."""
    run = tmp_path / "killed"
    for rank in (0, 1):
        write_run(run, rank=rank, world_size=2, stop=False)
        _keep(run, rank, lambda line: b"audit_anchor" not in line)
    assert [verdict.status for verdict in verify_run(run).values()] == ["intact", "intact"]
    return run


def _anchor(run: Path) -> str:
    return str(next(event["audit_anchor"] for event in read_events(run) if event.get("audit_anchor")))


def _keep(run: Path, rank: int, wanted: Callable[[bytes], bool]) -> None:
    lines = log_path(run, rank).read_bytes().splitlines(keepends=True)
    log_path(run, rank).write_bytes(b"".join(line for line in lines if wanted(line)))


def _remove(run: Path, rank: int, which: Iterable[str] = ("audit", "logs")) -> None:
    for folder in which:
        (run / folder / f"rank{rank:05d}.jsonl").unlink()


def _start(run: Path, rank: int, world_size: int, attempt: int = 0) -> None:
    with RunLog.open(run, run_id=run.name, attempt=attempt, rank=rank) as log:
        log.emit(RunStart(command=["x"], recipe="r", config_hash="c", gates_hash=None, world_size=world_size))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("which", [("audit", "logs"), ("audit",), ("logs",)])
@pytest.mark.parametrize("case", ["two", "killed"])
def test_a_rank_whose_files_are_gone_is_missed(
    case: str, which: tuple[str, ...], rank: int, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Path = request.getfixturevalue(case)
    _remove(run, rank, which)
    verdicts = verify_run(run)
    assert list(verdicts) == [0, 1]
    assert (verdicts[rank].status, verdicts[rank].kind) == ("tampered", "missing")
    assert verdicts[1 - rank].status == "intact"
    assert run_entry(main_flags, ["verify", str(run)]) == 2
    assert f"rank{rank:05d}.jsonl: tampered (missing)" in capsys.readouterr().err
    summary = summarise(run)
    assert summary.chain == "tampered"
    assert f"rank {rank}: tampered (missing)" in str(summary.problem)
    assert run_entry(main_runs, ["show", str(run)]) == 2
    assert run_entry(main_log, ["check", str(run)]) != 0


def test_the_log_of_the_others_tells_of_a_rank_that_is_gone(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _remove(two, 1)
    assert run_entry(main_log, ["check", str(two), "--json"]) == 1
    (violation,) = json.loads(capsys.readouterr().out)[0]["violations"]
    assert violation["rule"] == "anchor"
    assert violation["message"].startswith("audit chain of rank 1 tampered (missing)")


@pytest.mark.parametrize("kept", ["checkpoint", "elsewhere"])
def test_an_anchor_tells_of_rank_0_where_no_log_does(two: Path, write_run: Write, tmp_path: Path, kept: str) -> None:
    """The checkpoint's, or one that the user kept: also where the files of all ranks are gone."""
    anchor = _anchor(two)
    for rank in (0, 1):
        _remove(two, rank)
    if kept == "checkpoint":
        assert verify_run(two)[0].kind == "missing"
    (two / "checkpoints" / "step-3" / "COMMITTED").unlink()
    with pytest.raises(UserError, match="no audit chain"):
        verify_run(two)
    assert summarise(two).chain == "none"
    assert run_entry(main_flags, ["verify", str(two), "--anchor", anchor]) == 2


@pytest.mark.parametrize("how", ["emptied", "deleted"])
def test_a_chain_that_its_own_log_tells_of(killed: Path, how: str) -> None:
    """One process, so that no other rank tells: the log does, of gates resolved and exposed."""
    _remove(killed, 0)
    _keep(killed, 1, lambda line: b'"data.fingerprint"' not in line)
    path = audit_path(killed, 1)
    if how == "emptied":
        path.write_bytes(b"")
    else:
        path.unlink()
    verdict = verify_run(killed)[1]
    assert (verdict.status, verdict.kind) == ("tampered", "truncate" if how == "emptied" else "missing")
    assert "the run log tells of" in verdict.problem


def test_fewer_ranks_in_a_later_attempt_are_no_tampering_and_gone_ones_still_are(
    write_run: Write, tmp_path: Path
) -> None:
    run = tmp_path / "elastic"
    for rank in range(3):
        write_run(run, rank=rank, world_size=3, stop=False)
    for rank in range(2):
        write_run(run, rank=rank, world_size=2)
    _start(run, 0, 1, attempt=2)  # as an evaluation
    assert {verdict.status for verdict in verify_run(run).values()} == {"intact"}
    _remove(run, 1)
    assert {rank: verdict.kind for rank, verdict in verify_run(run).items()} == {0: None, 1: "missing", 2: None}
    _remove(run, 2)
    assert {rank: verdict.kind for rank, verdict in verify_run(run).items()} == {0: None, 1: "missing", 2: "missing"}


def test_a_rank_that_never_came_to_write_is_no_tampering(write_run: Write, tmp_path: Path) -> None:
    """It died, or all were killed, before the first meeting of all ranks, which they have before they open the data."""
    run = write_run(tmp_path / "one")
    _start(run, 0, 8, attempt=1)
    assert {rank: verdict.status for rank, verdict in verify_run(run).items()} == {0: "intact"}
    late = tmp_path / "late"
    _start(late, 1, 2)
    with pytest.raises(UserError, match="no audit chain"):
        verify_run(late)
    refused = write_run(tmp_path / "refused", {"FATHOM_TMA": "what"}, world_size=2)
    assert verify_run(refused)[0].status == "intact"


@pytest.mark.parametrize("world_size", [10**12, -1, "two", None])
def test_a_number_of_ranks_that_cannot_be(write_run: Write, tmp_path: Path, world_size: object) -> None:
    run = write_run(tmp_path / "run")
    text = log_path(run).read_text()
    log_path(run).write_text(text.replace('"world_size":1', f'"world_size":{json.dumps(world_size)}'))
    with pytest.raises(UserError, match=r"the run log is damaged: run\.start"):
        verify_run(run)
    assert "damaged" in str(summarise(run).problem)
