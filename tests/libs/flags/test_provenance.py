"""Where a run came from, and what must not be in it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from libs.flags import provenance
from libs.flags.events import EnvSnapshot
from libs.flags.provenance import git_state, redact_command, snapshot


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("ignored\n")
    (tmp_path / "a.txt").write_text("one\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_a_clean_checkout(checkout: Path) -> None:
    (checkout / "ignored").write_text("x")
    state = git_state(checkout)
    assert state.commit is not None
    assert len(state.commit) == 40
    assert (state.dirty, state.dirty_hash, state.reason) == (False, None, None)


def test_the_dirty_hash_follows_the_changes(checkout: Path) -> None:
    seen = set()
    for path, text in (
        ("a.txt", "two\n"),
        ("a.txt", "three\n"),
        ("new file.txt", "x"),
        ("new file.txt", "y"),
    ):
        (checkout / path).write_text(text)
        state = git_state(checkout)
        assert state.dirty is True
        assert state == git_state(checkout)
        seen.add(state.dirty_hash)
    (checkout / "link").symlink_to("nowhere")
    seen.add(git_state(checkout).dirty_hash)
    assert len(seen) == 5
    assert None not in seen


def test_new_receipts_are_results_and_changed_ones_are_changes(checkout: Path) -> None:
    """`fathom bench all` writes one after the other, of the same code."""
    receipt = checkout / "infra" / "receipts" / "one" / "receipt.json"
    receipt.parent.mkdir(parents=True)
    receipt.write_text("{}\n")
    assert git_state(checkout).dirty is False
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "receipt")
    receipt.write_text('{"mended": true}\n')
    assert git_state(checkout).dirty is True
    receipt.write_text("{}\n")
    (checkout / "infra" / "other.json").write_text("{}\n")
    assert git_state(checkout).dirty is True


def test_no_checkout_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = git_state(tmp_path)
    assert (state.commit, state.dirty) == (None, None)
    assert "not a git repository" in str(state.reason)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("git") is None
    assert git_state(tmp_path).reason == "git is not installed"


def test_a_snapshot_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    monkeypatch.setenv("FATHOM_TRAIN__WANDB__API_KEY", "hunter2")
    monkeypatch.setattr("sys.argv", ["fathom", "train", "--wandb.token", "hunter2", "--optim.lr", "1e-3"])
    event = EnvSnapshot.model_validate(snapshot({"devices": ["cpu"], "seed": 7}))
    assert event.extra == {"devices": ["cpu"], "seed": 7}
    assert event.packages["pydantic"]
    assert event.cpu
    assert event.cpu_count >= event.cpu_affinity >= 1
    assert event.memory_bytes > 1 << 28
    assert event.command[2:] == ["--wandb.token", "[redacted]", "--optim.lr", "1e-3"]
    assert "hunter2" not in event.model_dump_json()


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["--api-key=x", "y"], ["--api-key=[redacted]", "y"]),
        (["--password", "x", "y"], ["--password", "[redacted]", "y"]),
        (["--password", "--verbose"], ["--password", "--verbose"]),
        (["--tokenizer", "bpe:4096"], ["--tokenizer", "bpe:4096"]),
        (["--max_tokens=5"], ["--max_tokens=5"]),
        (["token"], ["token"]),
    ],
)
def test_redacted_command(command: list[str], shown: list[str]) -> None:
    assert redact_command(command) == shown


def test_the_root_is_the_repository() -> None:
    assert (provenance.ROOT / "libs" / "flags").is_dir()
