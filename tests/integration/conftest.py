"""One tiny corpus for all whole-job tests, and a job runner whose folders do not collide."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.job import Ended, Job, start_job
from tests.support.tiny_run import build_corpus, write_recipe

Start = Callable[..., Job]
RunJob = Callable[..., Ended]


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cpu_tiny with two of everything that tp = 2 cuts."""
    folder = tmp_path_factory.mktemp("integration")
    path = write_recipe(build_corpus(folder), folder / "tiny.toml")
    path.write_text(path.read_text() + "\n[model.mixer]\nngroups = 2\n")
    return path


@pytest.fixture
def start(tmp_path: Path) -> Start:
    numbers = itertools.count()

    def begin(*words: object, ranks: int = 2, **options: Any) -> Job:
        return start_job(words, ranks, tmp_path / f"output{next(numbers)}", **options)

    return begin


@pytest.fixture
def run_job(start: Start) -> RunJob:
    """`fathom train WORDS` on some ranks, to the end."""

    def run(*words: object, seconds: float = 120, patience: float | None = None, **options: Any) -> Ended:
        return start(*words, **options).wait(seconds, patience)

    return run
