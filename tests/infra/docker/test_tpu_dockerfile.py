"""The TPU image installs by the lane's own script, from what it copies."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "infra" / "docker" / "tpu.Dockerfile").read_text(encoding="utf-8")


def test_it_pins_nothing_of_its_own() -> None:
    assert "infra/tpu/setup.sh .venv-tpu" in TEXT
    assert re.findall(r"(torch|jax|libtpu)\w*==", TEXT) == []
    assert "FROM python:3.11" in TEXT


def test_what_it_copies_is_there_and_comes_before_it_is_used() -> None:
    copied = [source for line in re.findall(r"^COPY (.+)$", TEXT, re.MULTILINE) for source in line.split()[:-1]]
    assert copied
    assert all((ROOT / source).exists() for source in copied)
    assert TEXT.index("COPY infra infra") < TEXT.index("infra/tpu/setup.sh .venv-tpu")
    needed = {"binutils", "gcc", "libgomp1"}  # readelf and gcc for the stubs, libgomp for torch
    assert needed <= set(re.findall(r"[\w.-]+", TEXT))


@pytest.mark.parametrize("name", ["cuda", "tpu"])
def test_every_file_that_the_package_names_is_in_the_image(name: str) -> None:
    """A build of the package reads its README and its licence."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "infra" / "docker" / f"{name}.Dockerfile").read_text(encoding="utf-8")
    copied = {source for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for source in line.split()}
    assert {"pyproject.toml", project["readme"], *project["license-files"]} <= copied
