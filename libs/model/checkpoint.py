"""The commit protocol of checkpoints: write aside, hash, flush, rename, and a marker last. One reader for
everyone.

What is inside a checkpoint is the business of `weights` (the model) and of apps.train (optimizer, cursor). A
directory without the marker does not exist for a reader; one whose bytes differ from its manifest is refused,
never skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from libs.flags.errors import UserError

MANIFEST = "MANIFEST.json"
MARKER = "COMMITTED"
CHECKPOINTS = "checkpoints"
MANIFEST_VERSION = 1
_STEP = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Directory name of a step: "step-00000200"."""
    return f"step-{step:08d}"


def checkpoint_step(path: Path) -> int | None:
    """The step a directory name stands for, None when it is not a checkpoint's name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _content(directory: Path) -> list[Path]:
    """Every file the manifest covers, sorted by relative path."""
    files = (path for path in directory.rglob("*") if not path.is_dir())
    return sorted(path for path in files if path.relative_to(directory).as_posix() not in (MANIFEST, MARKER))


def staging_directory(final_dir: Path) -> Path:
    """A fresh empty directory beside `final_dir`; what an interrupted save left there is removed."""
    staging = final_dir.with_name(f".{final_dir.name}.partial")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def write_manifest(directory: Path) -> str:
    """Write MANIFEST.json (sha256 and size of every file) and return its own sha256."""
    files = {
        path.relative_to(directory).as_posix(): {"sha256": _sha256(path), "size": path.stat().st_size}
        for path in _content(directory)
    }
    body = {"manifest_version": MANIFEST_VERSION, "files": files}
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return _sha256(manifest)


def commit(staging_dir: Path, final_dir: Path) -> str:
    """Make a fully written directory a checkpoint. Writes the manifest; returns its sha256.

    Order: hash, flush files, rename, flush the parent, then the marker. A crash at any point leaves either no
    `final_dir`, or one without marker, which no reader accepts and the next commit of that name replaces.

    Raises:
        UserError: `final_dir` is already a committed checkpoint. OSError: as it comes (disk full).
    """
    if (final_dir / MARKER).exists():
        raise UserError(f"{final_dir} is already a committed checkpoint; it is never overwritten")
    digest = write_manifest(staging_dir)
    for path in [*_content(staging_dir), staging_dir / MANIFEST]:
        _fsync(path)
    for directory in [*(path for path in staging_dir.rglob("*") if path.is_dir()), staging_dir]:
        _fsync(directory)
    if final_dir.exists():
        shutil.rmtree(final_dir)
    final_dir.parent.mkdir(parents=True, exist_ok=True)
    staging_dir.rename(final_dir)
    _fsync(final_dir.parent)
    aside = final_dir / f".{MARKER}"
    aside.write_text(json.dumps({"manifest_sha256": digest}) + "\n", encoding="utf-8")
    _fsync(aside)
    aside.rename(final_dir / MARKER)
    _fsync(final_dir)
    return digest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"corrupt checkpoint: {path} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"corrupt checkpoint: {path} is not a JSON object")
    return value


def verify_checkpoint(directory: Path) -> str:
    """Check marker, manifest, file list, sizes and hashes; return the manifest's sha256, which names the
    content.

    Raises:
        UserError: not committed, or naming the file that is missing, extra, or of other bytes than were
            committed.
    """
    if not (directory / MARKER).exists():
        raise UserError(
            f"{directory} is not a committed checkpoint (no {MARKER} marker): half-written, or not one at all"
        )
    expected = _read_json(directory / MARKER).get("manifest_sha256")
    manifest = _read_json(directory / MANIFEST)
    digest = _sha256(directory / MANIFEST)
    if digest != expected:
        raise UserError(f"corrupt checkpoint {directory}: {MANIFEST} has sha256 {digest}, committed as {expected}")
    # The manifest's own bytes are right, so its layout is ours.
    files: dict[str, dict[str, Any]] = manifest["files"]
    present = {path.relative_to(directory).as_posix(): path for path in _content(directory)}
    if differing := sorted(present.keys() ^ files.keys()):
        kind = {name: "extra" if name in present else "missing" for name in differing}
        listed = ", ".join(f"{name} ({kind[name]})" for name in differing[:8])
        raise UserError(f"corrupt checkpoint {directory}: files differ from its manifest: {listed}")
    for name, path in present.items():
        size = path.stat().st_size
        if size != files[name]["size"]:
            raise UserError(f"corrupt checkpoint {directory}: {name} has {size} bytes, committed {files[name]['size']}")
        if (found := _sha256(path)) != files[name]["sha256"]:
            committed = files[name]["sha256"]
            raise UserError(f"corrupt checkpoint {directory}: {name} has sha256 {found}, committed {committed}")
    return digest


def committed_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run by rising step; not verified."""
    parent = run_dir / CHECKPOINTS
    found = parent.iterdir() if parent.is_dir() else ()
    steps = {path: step for path in found if (step := checkpoint_step(path)) is not None and (path / MARKER).exists()}
    return sorted(steps, key=steps.__getitem__)


def resolve_run(path: Path) -> Path:
    """Follow a `latest` pointer (a symlink, or a file that holds a run's name) to the run directory."""
    if path.is_file():
        return path.parent / path.read_text(encoding="utf-8").strip()
    return path


def resolve_checkpoint(run_or_dir: Path) -> Path:
    """The verified checkpoint a user means: that directory, or the newest committed one of a run.

    A corrupt newest checkpoint is an error, not a reason to take an older one silently.

    Raises:
        UserError: nothing there, nothing committed (what was found is listed), or corrupt.
    """
    path = resolve_run(run_or_dir)
    if not path.is_dir():
        raise UserError(f"no such run or checkpoint: {run_or_dir}")
    if (path / CHECKPOINTS).is_dir():
        committed = committed_checkpoints(path)
        if not committed:
            found = sorted(entry.name for entry in (path / CHECKPOINTS).iterdir())
            raise UserError(f"{path} has no committed checkpoint (found: {', '.join(found) or 'nothing'})")
        path = committed[-1]
    verify_checkpoint(path)
    return path
