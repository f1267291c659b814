"""A file that only grows, one whole line at a time, by one writer: under the run log and the audit chain.

Not for formats: it knows bytes and newlines. A tail without a newline is what a crash in mid-line leaves.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from libs.flags.errors import UserError


class Line(NamedTuple):
    """One line of such a file without its newline. number: from 1. torn: it had no newline."""

    number: int
    content: bytes
    torn: bool


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of `path`; only the last can be torn."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            yield Line(number, raw.removesuffix(b"\n"), torn=not raw.endswith(b"\n"))


class AppendFile:
    """An open line file. A line is one `write` to an O_APPEND descriptor: this process holds nothing back."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self._file = file

    @classmethod
    def open(cls, path: Path) -> AppendFile:
        """Open for appending, making the folder and the file when they are not there.

        Raises:
            UserError: the place cannot be written, or another process writes this file now.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"{path} is being written by another process: wait for that run, or choose another one"
                ) from error
            raise UserError(f"cannot lock {path}: {error.strerror}; use a file system with locks") from error
        return cls(path, file)

    @property
    def closed(self) -> bool:
        return self._file.closed

    def cut_torn_tail(self) -> bytes:
        """Remove what follows the last newline and return it (empty when the file ends in whole lines)."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        torn = content[whole:]
        if torn:
            os.ftruncate(self._file.fileno(), whole)
        return torn

    def write_line(self, content: bytes) -> None:
        """Append one line, whole or not at all.

        Raises:
            UserError: the file system refuses it, as when the disk is full.
        """
        assert b"\n" not in content, "a record is one line"
        line = content + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            # After a short write the next one fails with the reason (disk full, quota): go on until it tells.
            while written < len(line):
                line = line[written:]
                written = self._file.write(line)
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)
            raise UserError(f"cannot append to {self.path}: {error.strerror}") from error

    def sync(self) -> None:
        """Wait until the lines are on the disk, so that they survive the machine and not only the process.

        Raises:
            UserError: the file system cannot say that they are.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"cannot bring {self.path} to the disk: {error.strerror}") from error

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
