"""A tiny corpus built with the real pipeline, a recipe for it, and a clean process around every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.train.__main__ import main
from libs.flags.errors import run_entry
from libs.flags.runlog import read_events
from tests.support.tiny_run import build_corpus, write_recipe

Train = Callable[..., int]
Events = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory, bytes as tokens."""
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> Path:
    return write_recipe(corpus, tmp_path / "tiny.toml")


@pytest.fixture(autouse=True)
def _clean_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No FATHOM_ variables from outside, a directory of its own, and torch and signals as they were."""
    for name in [name for name in os.environ if name.upper().startswith("FATHOM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.fixture
def train() -> Train:
    """`fathom train WORDS` in this process; the exit status."""

    def run(*words: object) -> int:
        return run_entry(main, [str(word) for word in words])

    return run


@pytest.fixture
def events() -> Events:
    """Events of a run's log, by name if one is given."""

    def read(run_dir: Path, name: str | None = None) -> list[dict[str, Any]]:
        return [e for e in read_events(run_dir) if name is None or e["event"] == name]

    return read
