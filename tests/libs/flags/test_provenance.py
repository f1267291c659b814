"""Where a run came from, and what must not be in it."""

from __future__ import annotations

import hashlib
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


def test_the_dirty_hash_is_over_difference_names_lengths_and_contents(checkout: Path) -> None:
    """By hand, so that the hash of the same changes stays what receipts have; files larger than a piece included."""
    (checkout / "a.txt").write_text("two\n")
    big = bytes(range(256)) * (2 * provenance._PIECE_BYTES // 256) + b"end"
    for name, content in (("b\udce9", big), ("new file.txt", b"x")):
        (checkout / name).write_bytes(content)
    (checkout / "link").symlink_to("b\udce9")
    command = ["git", "-C", str(checkout), "diff", "--no-ext-diff", "--binary", "HEAD"]
    by_hand = hashlib.sha256(subprocess.run(command, check=True, capture_output=True).stdout)
    for named, content in ((b"b\xe9", big), (b"link", b"b\xe9"), (b"new file.txt", b"x")):
        by_hand.update(b"\0" + named + b"\0" + str(len(content)).encode() + b"\0" + content)
    assert git_state(checkout).dirty_hash == by_hand.hexdigest()


def test_a_repository_inside_counts_with_its_contents(checkout: Path) -> None:
    """Whether it has commits or not, and that of another one inside it; what it ignores does not count."""
    inner = checkout / "inner"
    deeper = inner / "deeper"
    deeper.mkdir(parents=True)
    git(inner, "init", "-q")
    (inner / ".gitignore").write_text("ignored\n")
    git(inner, "add", ".")
    git(inner, "commit", "-qm", "first")
    git(deeper, "init", "-q")
    seen = {git_state(checkout).dirty_hash}
    for path, text in (("code.py", "1"), ("code.py", "2"), ("deeper/code.py", "1"), ("deeper/code.py", "2")):
        (inner / path).write_text(text)
        seen.add(git_state(checkout).dirty_hash)
    git(inner, "add", "code.py")
    (inner / "code.py").write_text("3")
    seen.add(git_state(checkout).dirty_hash)
    assert len(seen) == 6
    assert None not in seen
    (inner / "ignored").write_text("x")
    assert git_state(checkout).dirty_hash in seen


def test_the_commit_of_another_repository_is_no_answer(checkout: Path, tmp_path: Path) -> None:
    """As of a package installed inside someone's checkout, in a folder that this one ignores."""
    installed = checkout / "ignored" / "site-packages"
    installed.mkdir(parents=True)
    assert git_state(checkout).dirty is False
    state = git_state(installed)
    assert state[:3] == (None, None, None)
    assert f"it lies in that of {checkout}" in str(state.reason)


@pytest.mark.parametrize("name", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"])
def test_git_is_asked_about_the_folder_and_nothing_else(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Hooks set these variables, and whoever runs one of ours from a hook gets them."""
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "-q")
    git(other, "commit", "-q", "--allow-empty", "-m", "another one")
    expected = git_state(checkout)
    place = {"GIT_DIR": other / ".git", "GIT_WORK_TREE": other, "GIT_INDEX_FILE": other / ".git" / "index"}
    monkeypatch.setenv(name, str(place[name]))
    assert git_state(checkout) == expected
    assert expected.dirty is False


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
        (["--api.token", "-secret", "x"], ["--api.token", "[redacted]", "x"]),
        (["--accesskey", "x"], ["--accesskey", "[redacted]"]),
        (["--tokenizer", "bpe:4096"], ["--tokenizer", "bpe:4096"]),
        (["--max_tokens=5"], ["--max_tokens=5"]),
        (["token"], ["token"]),
    ],
)
def test_redacted_command(command: list[str], shown: list[str]) -> None:
    assert redact_command(command) == shown


def test_the_root_is_the_repository() -> None:
    assert (provenance.ROOT / "libs" / "flags").is_dir()
