"""The lane's environment has the versions that the code asks for, and whatever the project declares besides torch."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from libs.parallel.xla.pins import PINS

ROOT = Path(__file__).resolve().parents[3]
TPU = ROOT / "infra" / "tpu"


def read(name: str) -> dict[str, Requirement]:
    lines = (TPU / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in found}


def test_pins_are_what_the_code_asks_for() -> None:
    heavy = read("requirements.txt")
    for name, version in PINS.items():
        assert str(heavy[name.replace("_", "-")].specifier) == f"=={version}"
    assert all(str(requirement.specifier).startswith("==") for requirement in heavy.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {
        Requirement(line).name: str(Requirement(line).specifier) for line in project["optional-dependencies"]["tpu"]
    }
    assert extra == {name: f"=={PINS[name]}" for name in extra}
    assert {"torch", "torch_xla"} <= extra.keys()


def test_everything_the_project_declares_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    light = read("requirements-light.txt")
    for line in project["dependencies"]:
        wanted = Requirement(line)
        if wanted.name in ("torch", "megatron-core"):
            continue
        assert str(light[wanted.name.lower()].specifier) == str(wanted.specifier), line


def test_the_script_is_well_formed_and_refuses_another_python(tmp_path: Path) -> None:
    script = TPU / "setup.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111
    other = tmp_path / "python3.12"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(other)}
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "venv")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert "is not Python 3.11" in done.stderr
    assert not (tmp_path / "venv").exists()
