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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from libs.flags.errors import UserError

MANIFEST = "MANIFEST.json"
MARKER = "COMMITTED"
CHECKPOINTS = "checkpoints"
MANIFEST_VERSION = 1
_NAME_BYTES = 255
_STEP = re.compile(r"step-(\d{8,})")
_STAGING = re.compile(rf"\.({_STEP.pattern})\.partial")


class FileRecord(NamedTuple):
    """What a manifest says of a file."""

    sha256: str
    size: int


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


def seal(path: Path) -> FileRecord:
    """Flush a finished file and take its record: what a rank does with the files it wrote itself."""
    _fsync(path)
    return FileRecord(_sha256(path), path.stat().st_size)


def write_manifest(directory: Path, sealed: Mapping[str, FileRecord] | None = None) -> str:
    """Write MANIFEST.json (sha256 and size of every file) and return its own sha256.

    Raises:
        UserError: a sealed file is not here, or not of the size it was sealed with.
    """
    known, found = sealed or {}, {path.relative_to(directory).as_posix(): path for path in _content(directory)}
    for name, record in known.items():
        size = found[name].stat().st_size if name in found else None
        if size != record.size:
            raise UserError(
                f"{directory / name} was written with {record.size} bytes, the rank that commits finds "
                f"{'nothing' if size is None else f'{size} bytes'}: all ranks must write to one shared file system"
            )
    files = {
        name: (known[name] if name in known else FileRecord(_sha256(path), path.stat().st_size))._asdict()
        for name, path in found.items()
    }
    body = {"manifest_version": MANIFEST_VERSION, "files": files}
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return _sha256(manifest)


def commit(staging_dir: Path, final_dir: Path, sealed: Mapping[str, FileRecord] | None = None) -> str:
    """Make a fully written directory a checkpoint. Writes the manifest; returns its sha256.

    Order: hash, flush files, rename, flush the parent, then the marker. A crash at any point leaves either no
    `final_dir`, or one without marker, which no reader accepts and the next commit of that name replaces.

    Args:
        sealed: {path inside the directory: its record} of files that are hashed and flushed already.

    Raises:
        UserError: `final_dir` is already a committed checkpoint or no folder, or a sealed file is not here.
        OSError: as it comes (disk full).
    """
    if (final_dir / MARKER).exists():
        raise UserError(f"{final_dir} is already a committed checkpoint; it is never overwritten")
    if final_dir.is_symlink() or final_dir.is_file():
        raise UserError(f"{final_dir} is in the way of a checkpoint, and no folder of one: move it, and resume the run")
    digest = write_manifest(staging_dir, sealed)
    flushed = {staging_dir / name for name in sealed or {}}
    for path in [*_content(staging_dir), staging_dir / MANIFEST]:
        if path not in flushed:
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


def committed_digest(directory: Path) -> str:
    """The sha256 of the manifest a checkpoint was committed with, which names the content; nothing is verified."""
    return str(_read_json(directory / MARKER).get("manifest_sha256"))


def verify_checkpoint(directory: Path, *, reader: int = 0, readers: int = 1) -> str:
    """Check marker, manifest, file list, sizes and hashes; return the manifest's sha256, which names the
    content.

    Args:
        reader, readers: when several processes share the work, each hashes its own files only; the rest is quick and
            checked by all.

    Raises:
        UserError: not committed, of another manifest version, or naming the file that is missing, extra, or of other
            bytes than were committed.
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
    if (version := manifest.get("manifest_version")) != MANIFEST_VERSION:
        raise UserError(
            f"{directory}: {MANIFEST} is of version {version!r}, this version of fathom reads {MANIFEST_VERSION}; "
            "use the version that wrote it"
        )
    # The manifest's own bytes are right, so its layout is ours.
    files: dict[str, dict[str, Any]] = manifest["files"]
    present = {path.relative_to(directory).as_posix(): path for path in _content(directory)}
    if differing := sorted(present.keys() ^ files.keys()):
        kind = {name: "extra" if name in present else "missing" for name in differing}
        listed = ", ".join(f"{name} ({kind[name]})" for name in differing[:8])
        raise UserError(f"corrupt checkpoint {directory}: files differ from its manifest: {listed}")
    mine = _share_out({name: int(record["size"]) for name, record in files.items()}, readers)[reader]
    for name, path in present.items():
        size = path.stat().st_size
        if size != files[name]["size"]:
            raise UserError(f"corrupt checkpoint {directory}: {name} has {size} bytes, committed {files[name]['size']}")
        if name in mine and (found := _sha256(path)) != files[name]["sha256"]:
            committed = files[name]["sha256"]
            raise UserError(f"corrupt checkpoint {directory}: {name} has sha256 {found}, committed {committed}")
    return digest


def _share_out(sizes: Mapping[str, int], readers: int) -> list[set[str]]:
    """Which files each reader hashes: the largest left goes to whoever has least so far."""
    shares: list[set[str]] = [set() for _ in range(readers)]
    load = [0] * readers
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = load.index(min(load))
        shares[least].add(name)
        load[least] += sizes[name] + 1
    return shares


def committed_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run by rising step; not verified."""
    parent = run_dir / CHECKPOINTS
    found = parent.iterdir() if parent.is_dir() else ()
    steps = {path: step for path in found if (step := checkpoint_step(path)) is not None and (path / MARKER).exists()}
    return sorted(steps, key=steps.__getitem__)


def unfinished_checkpoints(run_dir: Path) -> list[Path]:
    """What an interrupted save or deletion left: folders of a step without marker, and those written aside.

    Links, files and every other name in the folder of checkpoints are somebody else's.
    """
    parent = run_dir / CHECKPOINTS
    found = (path for path in (parent.iterdir() if parent.is_dir() else ()) if path.is_dir() and not path.is_symlink())
    return sorted(
        path
        for path in found
        if _STAGING.fullmatch(path.name) or (checkpoint_step(path) is not None and not (path / MARKER).exists())
    )


def resolve_run(path: Path) -> Path:
    """Follow a `latest` pointer (a symlink, or a file that holds a run's name) to the run directory.

    Raises:
        UserError: a file that is no such pointer.
    """
    if not path.is_file():
        return path
    with path.open("rb") as file:
        content = file.read(_NAME_BYTES + 2)
    try:
        name = content.decode("utf-8").strip()
    except UnicodeDecodeError:
        name = ""
    if not name or len(name.encode()) > _NAME_BYTES or len(name.splitlines()) > 1:
        raise UserError(f"{path} is a file, not a run or checkpoint folder; did you mean {path.parent}?")
    return path.parent / name


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
