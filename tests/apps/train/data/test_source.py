"""Which files are found and which repository each belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.train.data.source import discover
from libs.flags.errors import UserError


def lay(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("x")
    return root


def packages(root: Path, layout: str = "auto") -> dict[str, str]:
    return {file.path: file.package for file in discover(root, layout).files}


def test_only_cpp_files_in_visible_directories(tmp_path: Path) -> None:
    root = lay(
        tmp_path / "r", "a.h", "b.CPP", "c.c", "d.py", "e.cu", ".git/f.h", "g/.cache/h.h", "g/i.ipp", "h", "j.h.in"
    )  # fmt: skip
    assert list(packages(root)) == ["r/a.h", "r/b.CPP", "r/e.cu", "r/g/i.ipp"]


def test_a_collection_of_repositories_is_told_from_one(tmp_path: Path) -> None:
    many = lay(tmp_path / "many", "x/a.h", "x/src/b.cc", "y/c.h", "notes.txt")
    assert packages(many) == {"x/a.h": "x", "x/src/b.cc": "x", "y/c.h": "y"}
    assert set(packages(many, "repository").values()) == {"many"}
    for number, mark in enumerate((".git/HEAD", "CMakeLists.txt", "README.md", "LICENSE", "top.h", "src/z.cc")):
        one = lay(tmp_path / f"one{number}", "x/a.h", "y/c.h", mark)
        assert set(packages(one).values()) == {f"one{number}"}
    assert set(packages(tmp_path / "one0", "repositories").values()) == {"x", "y"}


def test_a_link_to_a_directory_is_not_entered(tmp_path: Path) -> None:
    root = lay(tmp_path / "r", "a/b.h")
    (root / "a" / "loop").symlink_to(root)
    assert list(packages(root)) == ["r/a/b.h"]


def test_licences_come_from_each_repository(tmp_path: Path) -> None:
    many = lay(tmp_path / "many", "x/a.h", "y/c.h")
    (many / "x" / "COPYING").write_text("Boost Software License")
    assert discover(many, "auto").licences == {"x": "Boost Software License"}


def test_the_installed_packages_have_cpp_of_several_repositories() -> None:
    corpus = discover(None, "auto")
    names = {file.package for file in corpus.files}
    assert {"torch", "numpy", "fmt", "pybind11"} <= names  # the last two live inside torch
    assert corpus.licences["fmt"] == "MIT"
    assert all(file.path.startswith(file.package + "/") for file in corpus.files)
    paths = [file.path for file in corpus.files]
    assert paths == sorted(set(paths))


def test_what_cannot_be_a_source_is_refused(tmp_path: Path) -> None:
    lay(tmp_path, "file.h", "no/readme.txt")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("file.h", "not a directory"),
        ("gone", "not a directory"),
        ("empty", "empty"),
        ("no", "no C"),
    ):
        with pytest.raises(UserError, match=message):
            discover(tmp_path / name, "auto")


def test_two_files_never_share_a_path(tmp_path: Path) -> None:
    root = lay(tmp_path / "foo", "x.h", "foo/y.h", "bar/z.h")
    ordinary = {"foo/x.h": "foo", "foo/y.h": "foo", "bar/z.h": "bar"}
    assert packages(root, "repositories") == ordinary
    lay(root, "foo/x.h")
    with pytest.raises(UserError, match=r"foo/x\.h and .*foo/foo/x\.h would both be called foo/x\.h"):
        discover(root, "repositories")
    assert set(packages(root, "repository")) == {"foo/x.h", "foo/foo/x.h", "foo/foo/y.h", "foo/bar/z.h"}
