"""Fixtures over small_run: a data directory for the session, a fresh run for each test that wants one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from apps.train.data.__main__ import main as data_main
from tests.apps.eval.small_run import RUN_ID, build_data_dir, make_run

INCLUDE = Path(torch.__file__).parent / "include"


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


@pytest.fixture(scope="session")
def cpp_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real C++ through the real pipeline: pybind11's headers held out, some of torch's to learn words from."""
    root = tmp_path_factory.mktemp("cpp")
    for package, folder in (("held", INCLUDE / "pybind11"), ("learnt", INCLUDE / "c10" / "core")):
        (root / "src" / package).mkdir(parents=True)
        for file in sorted(folder.glob("*.h")):
            shutil.copy(file, root / "src" / package / file.name)
    words = ["build", "--source", str(root / "src"), "--out", str(root / "data"), "--tokenizer", "bpe:1024"]
    words += ["--valid-packages", "held", "--window", "64", "--workers", "1", "--quiet", "--layout", "repositories"]
    assert data_main(words) == 0
    return root / "data"
