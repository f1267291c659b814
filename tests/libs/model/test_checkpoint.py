"""The commit protocol: uncommitted does not exist, damaged is refused, at every point of a crash."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from libs.flags.errors import UserError
from libs.model import checkpoint
from libs.model.checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    MARKER,
    checkpoint_name,
    checkpoint_step,
    commit,
    committed_checkpoints,
    resolve_checkpoint,
    staging_directory,
    verify_checkpoint,
)


def write(run: Path, step: int, content: bytes = b"weights") -> Path:
    final = run / CHECKPOINTS / checkpoint_name(step)
    staging = staging_directory(final)
    (staging / "model.safetensors").write_bytes(content)
    (staging / "extra").mkdir()
    (staging / "extra" / "rng.bin").write_bytes(b"123")
    commit(staging, final)
    return final


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "one"
    write(run, 100)
    write(run, 20)
    return run


def test_newest_committed_checkpoint_of_a_run(run: Path) -> None:
    newest = run / CHECKPOINTS / "step-00000100"
    assert committed_checkpoints(run) == [run / CHECKPOINTS / "step-00000020", newest]
    assert resolve_checkpoint(run) == newest
    assert resolve_checkpoint(newest) == newest
    assert not list((run / CHECKPOINTS).glob(".*"))


def test_latest_may_be_a_file_or_a_link(run: Path) -> None:
    newest = resolve_checkpoint(run)
    (run.parent / "latest").write_text("one\n")
    assert resolve_checkpoint(run.parent / "latest") == newest
    (run.parent / "link").symlink_to(run, target_is_directory=True)
    assert resolve_checkpoint(run.parent / "link").resolve() == newest.resolve()


@pytest.mark.parametrize(
    "content", [b"", b" \n", b"one\ntwo", b"\xff\xfe", b"x" * 256, b'{"a":\n 1}', b"\x00\x80" * 500]
)
def test_a_file_that_is_no_pointer(run: Path, content: bytes) -> None:
    path = run.parent / "given"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        resolve_checkpoint(path)
    assert str(refused.value) == f"{path} is a file, not a run or checkpoint folder; did you mean {run.parent}?"


def test_another_manifest_version(run: Path) -> None:
    newest = resolve_checkpoint(run)
    manifest = newest / MANIFEST
    manifest.write_text(manifest.read_text().replace('"manifest_version": 1', '"manifest_version": 2'))
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    (newest / MARKER).write_text(json.dumps({"manifest_sha256": digest}))
    with pytest.raises(UserError, match=r"is of version 2, this version of fathom reads 1"):
        resolve_checkpoint(run)


def test_names_and_steps() -> None:
    assert checkpoint_name(200) == "step-00000200"
    assert checkpoint_step(Path("x/step-00000200")) == 200
    assert checkpoint_step(Path("step-123456789")) == 123456789
    assert checkpoint_step(Path(".step-00000200.partial")) is None


def test_half_written_directories_are_not_seen(run: Path) -> None:
    staging = staging_directory(run / CHECKPOINTS / checkpoint_name(300))
    (staging / "model.safetensors").write_bytes(b"half")
    (run / CHECKPOINTS / checkpoint_name(400)).mkdir()  # renamed, marker not yet written
    assert resolve_checkpoint(run).name == "step-00000100"
    with pytest.raises(UserError, match="no COMMITTED marker"):
        resolve_checkpoint(run / CHECKPOINTS / checkpoint_name(400))
    assert not list(staging_directory(run / CHECKPOINTS / checkpoint_name(300)).iterdir())
    write(run, 400)
    assert resolve_checkpoint(run).name == "step-00000400"


@pytest.mark.parametrize("after", range(1, 9))
def test_a_crash_at_any_flush_leaves_the_old_or_the_new(run: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    calls, fsync = 0, os.fsync

    def crash(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", crash)
    with pytest.raises(OSError, match="No space left"):
        write(run, 500)
    monkeypatch.undo()
    newest = resolve_checkpoint(run)
    committed = (run / CHECKPOINTS / checkpoint_name(500) / MARKER).exists()
    assert newest.name == ("step-00000500" if committed else "step-00000100")
    assert committed == (after == 8)  # only the very last flush comes after the marker
    if not committed:
        write(run, 500)
    assert resolve_checkpoint(run).name == "step-00000500"


def test_a_committed_checkpoint_is_never_overwritten(run: Path) -> None:
    with pytest.raises(UserError, match="already a committed checkpoint"):
        write(run, 100, b"other")
    assert (resolve_checkpoint(run) / "model.safetensors").read_bytes() == b"weights"


def damage(directory: Path, how: str) -> None:
    weights = directory / "model.safetensors"
    match how:
        case "flipped bit":
            weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "missing":
            (directory / "extra" / "rng.bin").unlink()
        case "extra":
            (directory / "stray").write_bytes(b"")
        case "manifest edited":
            manifest = directory / MANIFEST
            manifest.write_text(manifest.read_text().replace("model", "Model"))
        case "manifest missing":
            (directory / MANIFEST).unlink()
        case "marker garbled":
            (directory / MARKER).write_text("yes")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("flipped bit", r"model\.safetensors has sha256 \w+, committed \w+"),
        ("truncated", r"model\.safetensors has 6 bytes, committed 7"),
        ("missing", r"extra/rng\.bin \(missing\)"),
        ("extra", r"stray \(extra\)"),
        ("manifest edited", r"MANIFEST\.json has sha256"),
        ("manifest missing", "cannot be read"),
        ("marker garbled", "cannot be read"),
    ],
)
def test_damage_is_refused_and_never_skipped(run: Path, how: str, message: str) -> None:
    newest = resolve_checkpoint(run)
    digest = verify_checkpoint(newest)
    assert len(digest) == 64
    damage(newest, how)
    with pytest.raises(UserError, match=message):
        resolve_checkpoint(run)


def test_nothing_to_resolve(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run or checkpoint"):
        resolve_checkpoint(tmp_path / "nowhere")
    (tmp_path / "r" / CHECKPOINTS / ".step-00000001.partial").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no committed checkpoint \(found: \.step-00000001\.partial\)"):
        resolve_checkpoint(tmp_path / "r")
    with pytest.raises(UserError, match="not a committed checkpoint"):
        resolve_checkpoint(tmp_path)
