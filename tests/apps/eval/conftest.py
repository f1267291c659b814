"""Fixtures over small_run: a data directory for the session, a fresh run for each test that wants one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.apps.eval.small_run import RUN_ID, build_data_dir, make_run


@pytest.fixture(autouse=True)
def _one_thread_without_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gate of the caller's environment, and one thread: the sums of the suite are compared exactly."""
    for name in [name for name in os.environ if name.upper().startswith("FATHOM_")]:
        monkeypatch.delenv(name)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve held-out documents of 40 to 3000 bytes."""
    valid = [40, 300, 500, 700, 900, 1100, 1300, 1500, 1700, 2000, 2500, 3000]
    return build_data_dir(tmp_path_factory.mktemp("corpus") / "data", {"train": [600] * 5, "valid": valid})


@pytest.fixture
def run_dir(tmp_path: Path, data_dir: Path) -> Path:
    path = tmp_path / "runs" / RUN_ID
    path.mkdir(parents=True)
    return make_run(path, data_dir)
