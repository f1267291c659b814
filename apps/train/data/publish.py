"""Writes a directory aside and puts it in place at the end, so that nothing half-written is ever found.

For `build`. Not for checkpoints, which have their own commit rule.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from libs.flags.errors import UserError
from libs.model.text.manifest import MANIFEST_NAME, Manifest, read_manifest


def found_build(out: Path, build_key: str, *, force: bool) -> Manifest | None:
    """The manifest of `out` when it holds this very build; None when it may be written.

    Raises:
        UserError: `out` is something else, or another build and not `force`.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"--out {out}: exists and is not a directory")
    if not any(out.iterdir()):
        return None
    if not (out / MANIFEST_NAME).is_file():
        raise UserError(f"--out {out}: holds other files and no data; choose another directory")
    if force:
        return None
    found = read_manifest(out)
    if found.build_key == build_key:
        return found
    raise UserError(
        f"--out {out}: holds another build (key {found.build_key[:12]}, asked for {build_key[:12]}: other "
        f"source files, options or library versions); give --force to replace it, or another --out"
    )


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """An empty directory next to `out` that takes its place when the block ends well, and vanishes otherwise.

    Raises:
        UserError: the disk is full, or the place cannot be written.
    """
    target = out.absolute()
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


def _replace(target: Path, aside: Path) -> None:
    old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in [*directory.iterdir(), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_left_behind(target: Path) -> None:
    """Remove what a build that was killed outright left next to `target`."""
    for path in target.parent.glob(f".{target.name}.partial-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and not Path("/proc", number).exists():
            shutil.rmtree(path, ignore_errors=True)
