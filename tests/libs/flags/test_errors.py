"""Exit statuses, refusals and the messages users meet."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from libs.flags.errors import ExitStatus, GateRefused, Refusal, UserError, nearest, run_entry

REFUSAL = Refusal("tma", "FATHOM_TMA", "all", ("needs sm_90", "needs tilelang"), ("buy one", "install it"))


def _raising(error: BaseException) -> object:
    def main(argv: Sequence[str] | None = None) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("bad value 3"), 2, "error: bad value 3"),
        (GateRefused([REFUSAL]), 78, "needs tilelang"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_run_entry_maps_errors(
    error: BaseException,
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.dup2", lambda *_: None)
    monkeypatch.setattr("sys.stdout.fileno", lambda: 1, raising=False)
    assert run_entry(_raising(error)) == status  # type: ignore[arg-type]
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("x"), AssertionError("ours"), RuntimeError("x"), KeyboardInterrupt()])
def test_run_entry_leaves_our_mistakes_alone(error: BaseException) -> None:
    with pytest.raises(type(error)):
        run_entry(_raising(error))  # type: ignore[arg-type]


def test_run_entry_passes_arguments_and_status() -> None:
    assert run_entry(lambda argv: ExitStatus.REQUEUE if argv == ["a"] else 0, ["a"]) == 75


def test_refusal_shows_everything() -> None:
    text = str(GateRefused([REFUSAL, REFUSAL._replace(gate=None, variable="FATHOM_X")]))
    for part in (
        "FATHOM_TMA=all",
        "gate tma",
        "needs sm_90",
        "needs tilelang",
        "buy one",
        "no such gate",
        "FATHOM_X",
    ):
        assert part in text


def test_unknown_names_nearest_and_all() -> None:
    message = str(UserError.unknown("recipe", "cpu_dmo", ["cpu_demo", "h200_8x"]))
    assert "'cpu_dmo'" in message
    assert "did you mean 'cpu_demo'" in message
    assert "h200_8x" in message
    assert "known: none" in str(UserError.unknown("recipe", "x", []))


def test_nearest() -> None:
    assert nearest("FATHOM_PSVI_CACHE", ["FATHOM_TMA", "FATHOM_PSIV_CACHE"]) == "FATHOM_PSIV_CACHE"
    assert nearest("fathom_tma", ["FATHOM_TMA"]) == "FATHOM_TMA"
    assert nearest("zzz", ["FATHOM_TMA"]) is None


def test_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m libs.flags list --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout == "["
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    "words", ["libs.flags list", "libs.flags status --json", "libs.flags --help", "apps.cli --help"]
)
@pytest.mark.parametrize("where", [">&-", ">/dev/full"])
def test_what_cannot_be_written_is_said(words: str, where: str) -> None:
    """Long and short output, through rich, print and argparse."""
    command = f"env -u PYTHONUNBUFFERED {sys.executable} -m {words} {where}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(("error: stdout is closed", "error: cannot write to stdout: No space left"))


def test_an_error_of_another_file_stays_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="of another file"):
        run_entry(_raising(OSError(28, "of another file")))  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


def test_an_error_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_entry(_raising(UserError("run \x1b[2J\x9b\udc80:\n  why"))) == 2  # type: ignore[arg-type]
    assert capsys.readouterr().err == "error: run \\x1b[2J\\x9b\\udc80:\n  why\n"
