"""Writes a directory aside and puts it in place at the end, so that nothing half-written is ever found.

For `build`. Not for checkpoints, which have their own commit rule.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apps.train.data.interrupt import held_back
from libs.flags.errors import UserError
from libs.model.text.manifest import (
    DOCUMENTS_NAME,
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    read_manifest,
)

# Every file of a build beside its manifest: what is written, and all that may be replaced.
DATA_NAMES = (*(f"{split}{suffix}" for split in SPLITS for suffix in (".bin", ".idx")), TOKENIZER_NAME, DOCUMENTS_NAME)


def found_build(out: Path, build_key: str, *, force: bool) -> Manifest | None:
    """The manifest of `out` when it holds this very build, whole; None when it may be written. A build that was
    killed between the two renames of its end has its predecessor put back first.

    Raises:
        UserError: `out` is something else, or another or a damaged build and not `force`.
    """
    _put_back(_target(out))
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"--out {out}: exists and is not a directory")
    if not any(out.iterdir()):
        return None
    try:
        found = read_manifest(out)
        if found.build_key == build_key and not force:
            _check_files(out)
            return found
        reason = (
            f"holds another build (key {found.build_key[:12]}, asked for {build_key[:12]}: other "
            f"source files, options or library versions)"
        )
    except UserError as damage:
        reason = str(damage).splitlines()[0]
    _refuse_foreign(out)
    if force:
        return None
    raise UserError(f"--out {out}: {reason}; give --force to replace it, or another --out")


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """An empty directory next to `out` (next to what it points at, when it is a link) that takes its place when the
    block ends well, and vanishes otherwise.

    Raises:
        UserError: the disk is full, the place cannot be written, or something else has come there meanwhile.
        KeyboardInterrupt: with a text when it came too late to leave things as they were.
    """
    target = _target(out)
    aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(target)
        aside.mkdir()
        yield aside
        _sync(aside)
        _replace(target, aside)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error}; nothing was changed") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _target(out: Path) -> Path:
    """Where `out` really is: a link stays a link, and a rename stays on its disk."""
    return Path(os.path.realpath(out))


def _refuse_foreign(out: Path) -> None:
    """Only what a build wrote may be replaced: many a directory of another kind has a manifest.json."""
    held = {path.name: path for path in out.iterdir()}
    other = sorted(name for name, path in held.items() if name not in (*DATA_NAMES, MANIFEST_NAME) or path.is_dir())
    if other:
        shown = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        raise UserError(f"--out {out}: holds other files: {shown}; choose another directory")
    if held and (MANIFEST_NAME not in held or len(held) == 1):
        raise UserError(f"--out {out}: holds {', '.join(sorted(held))} only, no whole build; choose another directory")


def _check_files(out: Path) -> None:
    """Refuse a build with files missing or cut off."""
    # Imports megatron, in seconds in which a signal may come.
    with held_back():
        from libs.model.text.shards import DataDir

    DataDir.open(out, verify=False)


def _replace(target: Path, aside: Path) -> None:
    """Swap `aside` for `target`, of which nothing stays; on failure, all is as it was."""
    old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    there = target.exists()
    if there:
        _refuse_foreign(target)  # once more: a build takes minutes
    try:
        with held_back():
            if there:
                target.rename(old)
            try:
                aside.rename(target)
            except OSError:
                if there:
                    old.rename(target)
                raise
            if there:
                # No longer something to put back: half removed, it must never be.
                shutil.rmtree(old.rename(aside), ignore_errors=True)
    except KeyboardInterrupt as interrupt:
        if aside.exists():  # the swap had failed
            raise
        raise KeyboardInterrupt(f"{target} holds the new build") from interrupt


def _sync(directory: Path) -> None:
    for path in [*directory.iterdir(), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_back(target: Path) -> None:
    """Undo the first of the two renames where a build was killed before the second."""
    old = _left_behind(target, "replaced")
    if old and not os.path.lexists(target):
        max(old, key=lambda path: path.stat().st_ctime_ns).rename(target)


def _remove_left_behind(target: Path) -> None:
    """Remove what a build that was killed outright left next to `target`."""
    for path in _left_behind(target, "partial") + _left_behind(target, "replaced"):
        shutil.rmtree(path, ignore_errors=True)


def _left_behind(target: Path, what: str) -> list[Path]:
    """Directories of builds that no longer run; one with the number of this process is of an earlier one."""
    found = target.parent.glob(f".{glob.escape(target.name)}.{what}-*")
    numbers = {path: path.name.rpartition("-")[2] for path in found}
    own = str(os.getpid())
    return [path for path, n in numbers.items() if n.isdecimal() and (n == own or not Path("/proc", n).exists())]
