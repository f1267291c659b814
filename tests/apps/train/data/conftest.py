"""C++ sources made up for the tests: several small repositories whose files include and call each other."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from libs.flags.errors import run_entry


def write_repository(root: Path, *, modules: int = 5, seed: int = 0, licence: str | None = None) -> None:
    """`modules` pairs of header and source; module k calls functions of modules below it."""
    draw = random.Random(f"{root.name}:{seed}")
    (root / "include").mkdir(parents=True)
    (root / "src").mkdir()
    if licence is not None:
        (root / "LICENSE").write_text(licence)
    for k in range(modules):
        words = [f"{draw.choice('abcdefgh')}{draw.randrange(10**5)}" for _ in range(6)]
        n = root.name
        (root / "include" / f"m{k}.h").write_text(
            f"#pragma once\n#include <vector>\nnamespace {n} {{\n// {' '.join(words)}\n"
            f"class Box{k} {{\n public:\n  int Get{k}(int {words[0]}) const;\n"
            f"  int kept_{words[1]} = {draw.randrange(99)};\n}};\n"
            f"int Start{k}(int first, int second = {draw.randrange(99)});\n}}  // namespace {n}\n"
        )
        below = draw.randrange(k) if k else None
        call = f"Start{below}({words[2]}) + " if below is not None else ""
        include = f'#include "../include/m{below}.h"\n' if below is not None else ""
        (root / "src" / f"m{k}.cc").write_text(
            f'#include "../include/m{k}.h"\n{include}\nnamespace {n} {{\n\n'
            f"int Box{k}::Get{k}(int {words[3]}) const {{\n  // {words[4]}\n"
            f"  return {words[3]} * {draw.randrange(999)};\n}}\n\n"
            f"int Start{k}(int {words[2]}, int second) {{\n  Box{k} box;\n"
            f"  for (int i = 0; i < second; ++i) {{\n"
            f"    {words[2]} += {call}box.Get{k}(i + {draw.randrange(999)});\n  }}\n"
            f"  return {words[2]} - {draw.randrange(999)};\n}}\n\n}}  // namespace {n}\n"
        )


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    """A directory with six repositories."""
    root = tmp_path / "repositories"
    for number, name in enumerate(("ant", "bee", "cow", "dog", "elk", "fox")):
        write_repository(root / name, modules=5 + number, licence="MIT License\n" if number % 2 else None)
    return root


Fathom = Callable[..., int]


@pytest.fixture
def fathom_data() -> Fathom:
    """`fathom data WORDS` in this process; the exit status."""
    from apps.train.data.__main__ import main

    def run(*words: object) -> int:
        return run_entry(main, [str(word) for word in words])

    return run


@pytest.fixture
def build(fathom_data: Fathom) -> Fathom:
    """`fathom data build --source A --out B WORDS` with options that suit small sources."""

    def run(source: Path, out: Path, *words: object) -> int:
        small = ["--tokenizer", "bytes", "--window", "64", "--workers", "1", "--quiet"]
        return fathom_data("build", "--source", source, "--out", out, *small, *words)

    return run
