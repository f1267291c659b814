"""Marks that cannot be used, and what is outside of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.docs.blocks import Block, marks, renewed, stale, table
from libs.flags.errors import UserError

BEGIN, END = marks("x")


def test_only_what_is_between_the_marks_changes() -> None:
    text = f"before\n{BEGIN}\nold\nolder\n{END}\nafter, {BEGIN}\n"
    assert renewed(text, "x", "new") == f"before\n{BEGIN}\nnew\n{END}\nafter, {BEGIN}\n"
    assert renewed(renewed(text, "x", "new"), "x", "old\nolder") == text


@pytest.mark.parametrize("text", ["no marks", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_marks_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"README.md, block x: there must be one line"):
        stale([Block("README.md", "x", lambda _: "new")], tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="works in a checkout"):
        stale([Block("README.md", "x", lambda _: "new")], tmp_path)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"README\.md is not UTF-8: .* at byte 3"):
        stale([Block("README.md", "x", lambda _: "new")], tmp_path)


def test_two_blocks_of_one_file(tmp_path: Path) -> None:
    both = [line for name in ("x", "y") for line in (*marks(name),)]
    (tmp_path / "a.md").write_text("\n".join(both), encoding="utf-8")
    (text,) = stale([Block("a.md", name, lambda root: root.name) for name in ("x", "y")], tmp_path).values()
    assert text.split("\n") == [both[0], tmp_path.name, both[1], both[2], tmp_path.name, both[3]]


def test_a_cell_cannot_break_its_row() -> None:
    assert table(("a", "b"), [("1|2", "3\n4")]) == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 4 |"
