"""A small data directory written by hand, so that reading is tested without the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.data_dir import write_data_dir

Make = Callable[..., Path]


def random_texts(sizes: list[int], draw: np.random.Generator) -> list[tuple[str, bytes]]:
    return [(f"p/{i}.h", bytes(draw.integers(97, 123, size, dtype=np.uint8))) for i, size in enumerate(sizes)]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(train=[sizes], valid=[sizes], seed=0)` -> directory with documents of random letters, of so many bytes."""
    made = 0

    def run(train: list[int], valid: list[int] | None = None, seed: int = 0) -> Path:
        nonlocal made
        made += 1
        sizes = {"train": train, "valid": valid if valid is not None else [50]}
        draw = np.random.default_rng(seed)
        texts = {split: random_texts(of_split, draw) for split, of_split in sizes.items()}
        return write_data_dir(tmp_path / f"data{made}", texts)

    return run
