"""Decides which files enter the corpus: readable, UTF-8, written by people, within the byte budget.

One reason per file left out, in a fixed order. Not for near-duplicates (see `duplicates`) or licences.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from apps.train.data.options import BuildOptions
from apps.train.data.source import SourceFile
from libs.model.text.manifest import Dropped

_EXAMPLES = 5
_HEAD_BYTES = 3_000
_GENERATED = re.compile(
    rb"@generated|do not (?:edit|modify)\b|auto-?\s?generated|automatically generated|machine generated|"
    rb"this (?:file|header|code) (?:is|was|has been) generated|^[\s/*#!]*generated (?:by|from|with)\b",
    re.IGNORECASE | re.MULTILINE,
)
_COMMENT = re.compile(rb"//[^\n]*|/\*.*?\*/", re.DOTALL)
_LEAST_BYTES = 64
_MAX_DEPTH = 1_000
_MOST_PATH_BYTES = 400
_OPEN, _CLOSE = b"([{", b")]}"


class KeptFile(NamedTuple):
    """A file of the corpus with its content."""

    source: SourceFile
    text: bytes
    sha256: str


class DropLog:
    """Counts what was left out, by reason."""

    def __init__(self) -> None:
        self._sizes: dict[str, list[int]] = defaultdict(list)
        self._examples: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, path: str, size: int) -> None:
        """Record one file."""
        self._sizes[reason].append(size)
        if len(self._examples[reason]) < _EXAMPLES:
            self._examples[reason].append(path)

    def summary(self) -> dict[str, Dropped]:
        """Reason -> files, bytes, first examples."""
        return {
            reason: Dropped(files=len(sizes), bytes=sum(sizes), examples=tuple(self._examples[reason]))
            for reason, sizes in sorted(self._sizes.items())
        }

    def __str__(self) -> str:
        counts = ", ".join(f"{reason}: {len(sizes)}" for reason, sizes in sorted(self._sizes.items()))
        return counts or "none"


def read_files(
    files: Iterable[SourceFile], options: BuildOptions, drops: DropLog, advance: Callable[[], None]
) -> list[KeptFile]:
    """Read and filter; exact duplicates (the first by path stays) go too."""
    kept: list[KeptFile] = []
    seen: set[str] = set()
    for source in files:
        advance()
        text = _read(source, options, drops)
        if text is None:
            continue
        reason = refusal(text, options.max_line_bytes)
        checksum = hashlib.sha256(text).hexdigest()
        if reason is None and checksum in seen:
            reason = "exact_duplicate"
        if reason is not None:
            drops.add(reason, source.path, len(text))
            continue
        seen.add(checksum)
        kept.append(KeptFile(source, text, checksum))
    return kept


def _read(source: SourceFile, options: BuildOptions, drops: DropLog) -> bytes | None:
    """The content, or None (and why is recorded) when the file is not even read."""
    reason, size = _bad_place(source), 0
    if reason is None:
        try:
            status = source.location.stat()
            size = status.st_size
            if not stat.S_ISREG(status.st_mode):
                reason = "not_a_file"
            elif size > options.max_file_bytes:
                reason = "too_large"
            else:
                return source.location.read_bytes()
        except OSError:
            reason = "unreadable"
    drops.add(reason, source.path.encode("utf-8", "replace").decode(), size)
    return None


def _bad_place(source: SourceFile) -> str | None:
    """Why a file is not even read, or None."""
    try:
        if len(source.path.encode("utf-8")) > _MOST_PATH_BYTES:
            return "path_too_long"
    except UnicodeEncodeError:
        return "path_not_utf8"
    return "symlink" if os.path.islink(source.location) else None


def refusal(text: bytes, max_line_bytes: int) -> str | None:
    """Why a file's content keeps it out, or None."""
    if len(text) < _LEAST_BYTES:
        return "tiny"
    if b"\x00" in text:
        return "binary"
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return "not_utf8"
    if _is_generated(text[:_HEAD_BYTES]):
        return "generated"
    if max(map(len, text.split(b"\n"))) > max_line_bytes:
        return "long_line"
    values = np.frombuffer(text, dtype=np.uint8)
    if np.isin(values, np.frombuffer(b"0123456789", dtype=np.uint8)).mean() > 0.4:
        return "data_table"
    if _depth(values) > _MAX_DEPTH:
        return "nested_too_deep"
    return None


def _is_generated(head: bytes) -> bool:
    """A generator's notice inside a comment near the top."""
    return any(_GENERATED.search(comment.group()) for comment in _COMMENT.finditer(head))


def _depth(values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> int:
    """Deepest nesting of brackets; tree-sitter's time is quadratic in it."""
    steps = np.zeros(256, dtype=np.int32)
    steps[list(_OPEN)], steps[list(_CLOSE)] = 1, -1
    level = np.concatenate([[0], np.cumsum(steps[values])])
    return int((level - np.minimum.accumulate(level)).max())


def within_budget(kept: list[KeptFile], max_bytes: int, seed: int, drops: DropLog) -> list[KeptFile]:
    """At most `max_bytes`: small packages whole, large ones cut to an equal cap, directory by directory.

    Directories are taken in the order of a seeded hash, so that neighbours, which call each other, stay together.
    """
    packages: dict[str, list[KeptFile]] = defaultdict(list)
    for file in kept:
        packages[file.source.package].append(file)
    sizes = {name: sum(len(file.text) for file in files) for name, files in packages.items()}
    cap = _equal_cap(list(sizes.values()), max_bytes)
    chosen: set[str] = set()
    for files in packages.values():
        used = 0
        for file in sorted(files, key=lambda f: _place(f.source.path, seed)):
            if used + len(file.text) <= cap:
                used += len(file.text)
                chosen.add(file.source.path)
            else:
                drops.add("over_budget", file.source.path, len(file.text))
    return [file for file in kept if file.source.path in chosen]


def _equal_cap(sizes: list[int], budget: int) -> int:
    """The cap c with sum(min(size, c)) <= budget, as large as can be."""
    remaining, left = budget, len(sizes)
    for size in sorted(sizes):
        if size * left > remaining:
            return remaining // left
        remaining, left = remaining - size, left - 1
    return max(sizes, default=0)


def _place(path: str, seed: int) -> tuple[str, str]:
    directory = path.rpartition("/")[0]
    return hashlib.sha256(f"{seed}:{directory}".encode()).hexdigest(), path
