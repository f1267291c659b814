"""What a build may replace, when it is up to date, and that nothing is lost at the moment of the swap."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apps.train.data import store as store_module
from libs.model.text.shards import DataDir

Fathom = Callable[..., int]
Shown = pytest.CaptureFixture[str]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_place_that_is_not_ours_is_never_replaced(
    repositories: Path, tmp_path: Path, build: Fathom, capsys: Shown
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for out in ("mine", "file"):
        assert build(repositories, tmp_path / out, "--force") == 2
    assert "choose another directory" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert build(repositories, tmp_path / "empty") == 0


@pytest.mark.parametrize("words", [[], ["--force"]])
@pytest.mark.parametrize("held", ["src/thesis.txt", "train.bin/thesis.txt", "thesis.txt", None])
def test_a_manifest_alone_does_not_make_a_build(
    repositories: Path, tmp_path: Path, build: Fathom, capsys: Shown, held: str | None, words: list[str]
) -> None:
    app = tmp_path / "webapp"
    thesis = app / (held or "manifest.json")
    thesis.parent.mkdir(parents=True)
    (app / "manifest.json").write_text('{"name": "x"}')
    thesis.write_text("years of work")
    assert build(repositories, app, *words) == 2
    error = capsys.readouterr().err
    assert f"holds {'manifest.json only' if held is None else 'other files: ' + held.split('/')[0]}" in error
    assert error.count("\n") == 1
    assert thesis.read_text() == "years of work"


def test_what_comes_to_the_place_meanwhile_is_not_replaced(
    repositories: Path, tmp_path: Path, build: Fathom, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store_module.store

    def meanwhile(*arguments: Any) -> Any:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
        return real(*arguments)

    monkeypatch.setattr(store_module, "store", meanwhile)
    assert build(repositories, tmp_path / "out", "--force") == 2
    assert "holds other files: thesis.txt" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["thesis.txt"]
    assert names(tmp_path) == ["out", "repositories"]


def lose(out: Path) -> None:
    (out / "train.bin").unlink()


def cut(out: Path) -> None:
    (out / "valid.idx").write_bytes((out / "valid.idx").read_bytes()[:-1])


def spoil(out: Path) -> None:
    (out / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"), [(lose, "train.bin is missing"), (cut, "valid.idx has"), (spoil, "corrupt data directory")]
)
def test_a_damaged_build_is_not_up_to_date_and_force_replaces_it(
    repositories: Path, tmp_path: Path, build: Fathom, capsys: Shown, damage: Callable[[Path], None], message: str
) -> None:
    out = tmp_path / "out"
    assert build(repositories, out) == 0
    whole = contents(out)
    damage(out)
    damaged = contents(out)
    assert build(repositories, out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "give --force to replace it" in error
    assert error.count("\n") == 1
    assert contents(out) == damaged
    assert build(repositories, out, "--force") == 0
    assert contents(out) == whole


def test_up_to_date_means_that_the_window_fits(
    repositories: Path, tmp_path: Path, build: Fathom, capsys: Shown
) -> None:
    out = tmp_path / "out"
    assert build(repositories, out) == 0
    (out / "notes.txt").write_text("about these data")
    assert build(repositories, out, "--window", 10_000_000) == 2
    assert "corpus too small" in capsys.readouterr().err
    fewest = min(stats.tokens for stats in DataDir.open(out).manifest.splits.values())
    assert build(repositories, out, "--window", fewest + 1) == 2
    assert build(repositories, out, "--window", fewest) == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("there", [False, True])
def test_a_link_stays_a_link_and_what_it_points_at_is_replaced(
    repositories: Path, tmp_path: Path, build: Fathom, there: bool
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    link = tmp_path / "links" / "data"
    link.parent.mkdir()
    link.symlink_to(disk / "data")
    if there:
        assert build(repositories, disk / "data") == 0
    assert build(repositories, link, "--force", "--seed", 1) == 0
    assert link.is_symlink()
    assert DataDir.open(disk / "data").manifest.options["seed"] == 1
    assert (names(disk), names(link.parent)) == (["data"], ["data"])


@pytest.mark.parametrize("name", ["out", "[o]ut*"])
def test_a_build_killed_between_its_two_renames_has_its_predecessor_put_back(
    repositories: Path, tmp_path: Path, build: Fathom, capsys: Shown, name: str
) -> None:
    place = tmp_path / "place"
    out = place / name
    assert build(repositories, out) == 0
    before, dead = contents(out), dead_process()
    for other in (f".out2.replaced-{dead}", f".{name}.replaced-1", f".{name}.replaced-x"):
        (place / other).mkdir()
        (place / other / "thesis.txt").write_text("not of this build, or of a running one")
    kept = names(place)
    (place / f".{name}.partial-{dead}").mkdir()
    out.rename(place / f".{name}.replaced-{dead}")
    assert build(repositories, out) == 0
    assert "up to date" in capsys.readouterr().out
    assert contents(out) == before
    out.rename(place / f".{name}.replaced-{dead}")
    assert build(repositories, out, "--seed", 1) == 2
    assert contents(out) == before
    (place / f".{name}.replaced-{dead}").mkdir()
    assert build(repositories, out, "--seed", 1, "--force") == 0
    assert names(place) == kept


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_swap_that_fails_half_way_is_undone(
    repositories: Path, tmp_path: Path, build: Fathom, capsys: Shown, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    out = tmp_path / "out"
    assert build(repositories, out) == 0
    before, real = contents(out), Path.rename

    def failing(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            if interrupted:
                signal.raise_signal(signal.SIGINT)
            raise OSError("no room for another name")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    assert build(repositories, out, "--force", "--seed", 1) == (130 if interrupted else 2)
    assert ("is as it was" if interrupted else "nothing was changed") in capsys.readouterr().err
    assert contents(out) == before
    assert names(tmp_path) == ["out", "repositories"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_during_the_swap_comes_too_late(
    repositories: Path, tmp_path: Path, build: Fathom, capsys: Shown, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = tmp_path / "out"
    assert build(repositories, out) == 0
    real = Path.rename

    def signalled(path: Path, target: Path) -> Path:
        renamed = real(path, target)
        signal.raise_signal(number)
        return renamed

    monkeypatch.setattr(Path, "rename", signalled)
    assert build(repositories, out, "--force", "--seed", 1) == 130
    assert f"interrupted: {out} holds the new build" in capsys.readouterr().err
    assert DataDir.open(out).manifest.options["seed"] == 1
    assert names(tmp_path) == ["out", "repositories"]
