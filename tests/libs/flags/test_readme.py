"""libs/flags/README.md names every event; its table of gates is made by `fathom docs` (tests/rules/test_docs.py)."""

from __future__ import annotations

from pathlib import Path

from libs.flags.events import EVENTS

README = Path(__file__).resolve().parents[3] / "libs" / "flags" / "README.md"


def test_every_event_is_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    missing = [name for name in EVENTS if f"`{name}`" not in text]
    assert not missing
