"""Whole or not at all; and a place is tried without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.flags.whole_file import try_folder, write_whole


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_place_is_tried_without_a_trace(tmp_path: Path) -> None:
    try_folder(tmp_path / "not" / "there")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises((NotADirectoryError, FileNotFoundError, PermissionError)):
            try_folder(place)
