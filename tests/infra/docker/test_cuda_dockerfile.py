"""The pins of the image: torch is the project's, Transformer Engine one that the FP8 gate takes, nothing floats."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from libs.flags.catalog import CATALOG
from libs.flags.facts import Facts

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = (ROOT / "infra" / "docker" / "cuda.Dockerfile").read_text(encoding="utf-8")
ARGUMENTS = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))
INSTRUCTIONS = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))


def test_torch_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"torch=={ARGUMENTS['TORCH_VERSION']}" in project["dependencies"]
    assert project["requires-python"].startswith(">=3.11")
    assert "uv venv --python 3.11" in DOCKERFILE


def test_the_gate_takes_this_transformer_engine_without_an_override() -> None:
    facts = Facts(packages={"transformer-engine": ARGUMENTS["TE_VERSION"]})
    (needed,) = (p for p in CATALOG["fp8_param_gather"].preconditions if p.name == "package.transformer-engine")
    assert needed.check("on", facts) is None


def test_the_extension_is_compiled_against_the_torch_that_is_installed() -> None:
    (build,) = (line for line in INSTRUCTIONS.splitlines() if "transformer_engine_torch==" in line)
    for word in ("NVTE_PYTORCH_FORCE_BUILD=TRUE", "--no-build-isolation", "--no-binary", "$TE_VERSION"):
        assert word in build, word
    assert INSTRUCTIONS.index("torch==$TORCH_VERSION") < INSTRUCTIONS.index(build)


def test_images_and_packages_are_pinned() -> None:
    images = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert images
    assert all(re.search(r":\d+\.\d+\.\d+", image) for image in images), images
    for line in INSTRUCTIONS.splitlines():
        if "uv pip install" in line and "--editable" not in line:
            assert re.findall(r'"([^"]+)"', line), line
            for package in re.findall(r'"([A-Za-z_]\w*[^"$]*(?:\$\w+)?)"', line):
                assert "==" in package or package == "packaging>=25", package


def test_what_is_copied_exists() -> None:
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
