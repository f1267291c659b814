"""The package's front door names what the README's map promises, and importing it pulls in no application."""

from __future__ import annotations

from pathlib import Path

import libs.model


def test_every_public_name_exists() -> None:
    assert all(hasattr(libs.model, name) for name in libs.model.__all__)
    assert sorted(libs.model.__all__) == sorted(set(libs.model.__all__))


def test_the_readme_maps_every_file() -> None:
    folder = Path(libs.model.__file__).parent
    text = (folder / "README.md").read_text(encoding="utf-8")
    missing = [path.stem for path in folder.glob("*.py") if path.stem != "__init__" and f"`{path.stem}`" not in text]
    assert not missing
