"""A tiny corpus built with the real pipeline, a recipe for it, and a clean process around every test."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.train.__main__ import main
from apps.train.data.__main__ import main as data_main
from libs.flags.errors import run_entry
from libs.flags.runlog import read_events

# A step of this model takes milliseconds, and it has every kind of layer and one MTP depth.
RECIPE = """
[model]
preset = "cpu_tiny"
vocab_size = 272
[data]
dir = "{data}"
window = 64
windows_per_batch = 2
valid_tokens = 1500
valid_document_tokens = 1024
[optim]
lr = 1e-2
[schedule]
warmup_steps = 3
decay_steps = 3
[train]
steps = 8
device = "cpu"
precision = "fp32"
threads = 1
eval_every = 4
[checkpoint]
every = 100
[log]
every = 1
tensorboard = false
"""

Train = Callable[..., int]
Events = Callable[..., list[dict[str, Any]]]


def write_sources(folder: Path, *, files: int = 60, seed: int = 0) -> None:
    """C++ files of different functions that call each other, enough for a few windows."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(files):
        names = [f"{draw.choice('abcdefgh')}{draw.randrange(10**6)}" for _ in range(4)]
        body = "\n".join(
            f"int {name}(int left, long {draw.choice('pqrs')}{k}) {{\n"
            f"    return left * {draw.randrange(10**6)} + {names[k - 1]}(left, {draw.randrange(10**6)});\n}}"
            for k, name in enumerate(names)
        )
        (folder / f"unit_{number}.cpp").write_text(f"// {names[0]}\n#include <vector>\n{body}\n")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory, bytes as tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    write_sources(folder / "src")
    out = folder / "data"
    words = ["build", "--source", str(folder / "src"), "--out", str(out), "--tokenizer", "bytes"]
    assert data_main([*words, "--quiet", "--window", "64", "--workers", "1", "--valid-share", "0.2"]) == 0
    return out


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(data=corpus))
    return path


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
