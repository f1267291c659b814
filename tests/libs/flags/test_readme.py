"""libs/flags/README.md names every event and every file; `fathom docs` makes its table of gates."""

from __future__ import annotations

from pathlib import Path

from libs.flags.events import EVENTS

README = Path(__file__).resolve().parents[3] / "libs" / "flags" / "README.md"


def test_every_event_is_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    missing = [name for name in EVENTS if f"`{name}`" not in text]
    assert not missing


def test_every_file_is_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    names = [path.stem for path in README.parent.glob("*.py") if not path.stem.startswith("__")]
    assert [name for name in names if f"`{name}`" not in text] == []
