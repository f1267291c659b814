"""A corpus and a recipe so small that a whole training run takes a second."""

from __future__ import annotations

import random
from pathlib import Path

from apps.train.data.__main__ import main as data_main

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


def build_corpus(folder: Path) -> Path:
    """A data directory made by the real pipeline, bytes as tokens."""
    write_sources(folder / "src")
    out = folder / "data"
    words = ["build", "--source", str(folder / "src"), "--out", str(out), "--tokenizer", "bytes"]
    assert data_main([*words, "--quiet", "--window", "64", "--workers", "1", "--valid-share", "0.2"]) == 0
    return out


def write_recipe(corpus: Path, path: Path) -> Path:
    path.write_text(RECIPE.format(data=corpus))
    return path
