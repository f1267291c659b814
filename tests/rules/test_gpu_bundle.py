"""infra/gpu carries what the project needs: its lock satisfies pyproject.toml, and its README states its figures."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "infra" / "gpu"
LINE = re.compile(r"(?P<name>[\w.-]+)==(?P<version>\S+) --hash=sha256:(?P<hash>[0-9a-f]{64})  # (?P<bytes>\d+) bytes")


class Wheel(NamedTuple):
    version: str
    n_bytes: int


def wheels() -> dict[str, Wheel]:
    lines = (GPU / "wheels.lock").read_text(encoding="utf-8").splitlines()
    found = [LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(found)
    return {canonicalize_name(m["name"]): Wheel(m["version"], int(m["bytes"])) for m in found if m}


def wanted() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["cuda"]
    lines += project["build-system"]["requires"]
    own = (GPU / "requirements.in").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in [*lines, *own] if line and not line.startswith("#")]


@pytest.mark.parametrize("requirement", wanted(), ids=str)
def test_the_lock_satisfies_what_is_declared(requirement: Requirement) -> None:
    carried = wheels().get(canonicalize_name(requirement.name))
    assert carried is not None, f"{requirement} is not in infra/gpu/wheels.lock; infra/gpu/prepare.sh OUT --relock"
    assert requirement.specifier.contains(carried.version)


def test_torch_is_a_cuda_build() -> None:
    carried = wheels()
    assert carried["torch"].n_bytes > 400e6
    assert carried["nvidia-cuda-runtime"].version.startswith("13.0.")


def test_the_readme_states_the_sizes_of_the_lock() -> None:
    text = (GPU / "README.md").read_text(encoding="utf-8")
    carried = wheels()
    assert f"| all {len(carried)} | | {sum(wheel.n_bytes for wheel in carried.values()):,} |" in text
    for name, wheel in carried.items():
        if wheel.n_bytes > 30e6:
            assert f"| {name} | {wheel.version} | {wheel.n_bytes:,} |" in text


@pytest.mark.parametrize("script", ["prepare.sh", "run.sh"])
def test_scripts_are_well_formed(script: str) -> None:
    subprocess.run(["sh", "-n", str(GPU / script)], check=True)
    assert (GPU / script).stat().st_mode & 0o111


def test_a_machine_that_lacks_something_is_told_so(tmp_path: Path) -> None:
    """Before anything is unpacked."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "no-such-python"}
    command = ["sh", str(GPU / "run.sh"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "error: 'no-such-python' is not on this machine; PYTHON=... names a Python 3.11" in done.stderr
    usage = subprocess.run(["sh", str(GPU / "prepare.sh")], capture_output=True, text=True)
    assert usage.returncode != 0
    assert "OUT [--relock]" in usage.stderr
