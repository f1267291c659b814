"""Marked blocks of a text file: what stands between two marks is made from the code, the rest is written by people.

Not for what stands in them (gates.py, recipes.py, records.py, steps.py, commands.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from libs.flags.errors import UserError
from libs.flags.whole_file import write_whole

COMMAND = "fathom docs"


class Block(NamedTuple):
    """One block. file: from the root of the repository. make: from the root to the lines between the marks."""

    file: str
    name: str
    make: Callable[[Path], str]


def marks(name: str) -> tuple[str, str]:
    """The line before a block and the line after it."""
    return f"<!-- {name}: `{COMMAND}` renews what is between these two marks -->", f"<!-- end of {name} -->"


def renewed(text: str, name: str, content: str) -> str:
    """`text` with the block `name` replaced.

    Raises:
        UserError: it has not exactly one pair of marks, or they stand the wrong way round.
    """
    begin, end = marks(name)
    lines = text.split("\n")
    if lines.count(begin) != 1 or lines.count(end) != 1 or lines.index(begin) > lines.index(end):
        raise UserError(f"there must be one line {begin} and after it one line {end}")
    first, last = lines.index(begin), lines.index(end)
    return "\n".join([*lines[: first + 1], *content.split("\n"), *lines[last:]])


def stale(blocks: Iterable[Block], root: Path) -> dict[Path, str]:
    """The new text of every file in which a block is not what the code makes it.

    Raises:
        UserError: a file cannot be read or has no place for its block; which, and which block.
    """
    before: dict[Path, str] = {}
    after: dict[Path, str] = {}
    for block in blocks:
        path = root / block.file
        if path not in before:
            before[path] = after[path] = read_text(path)
        try:
            after[path] = renewed(after[path], block.name, block.make(root))
        except UserError as error:
            raise UserError(f"{block.file}, block {block.name}: {error}") from error
    return {path: text for path, text in after.items() if text != before[path]}


def read_text(path: Path) -> str:
    """The whole file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; {COMMAND} works in a checkout of the repository"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from error


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    try:
        write_whole(path, text.encode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped, a line break becomes a space."""
    heads = list(columns)
    return "\n".join(_line(cells) for cells in (heads, ["---"] * len(heads), *rows))


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
