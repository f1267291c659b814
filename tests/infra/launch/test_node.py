"""infra.launch.node with torchrun's own agent and small processes in place of ranks: status, restarts, SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.launch.node import worker_arguments

ROOT = Path(__file__).resolve().parents[3]
NODE = [sys.executable, "-m", "infra.launch.node", "--nproc", "2", "--module", "tests.infra.launch.stub_worker"]
SETTINGS = ["--recipe", "cpu_demo", "--optim.lr", "1e-3"]


def start(run_dir: Path, plan: list[str], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*NODE, "--run-dir", str(run_dir), *options, "--", *SETTINGS],
        cwd=ROOT,
        env=os.environ | {"STUB_PLAN": json.dumps(plan), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def attempts(run_dir: Path, rank: int) -> list[list[str]]:
    return [json.loads(line) for line in (run_dir / f"attempts-{rank}").read_text().splitlines()]


def test_a_run_that_has_begun_is_resumed_with_its_own_settings(tmp_path: Path) -> None:
    assert worker_arguments(tmp_path, SETTINGS) == ["--run-dir", str(tmp_path), *SETTINGS]
    (tmp_path / "config.json").touch()
    assert worker_arguments(tmp_path, SETTINGS) == ["--resume", str(tmp_path)]


def test_a_crash_is_resumed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    node = start(run_dir, ["crash", "0"])
    said = node.communicate(timeout=120)[1]
    assert node.returncode == 0, said
    assert "rank 1 ended first, with status 137" in said
    assert "a rank failed with status 137; 3 restarts left" in said
    first, second = attempts(run_dir, 0)
    assert first == ["--run-dir", str(run_dir), *SETTINGS]
    assert second == ["--resume", str(run_dir)]


@pytest.mark.parametrize("status", [78])
def test_a_refusal_is_the_nodes_own_status_and_not_tried_again(tmp_path: Path, status: int) -> None:
    run_dir = tmp_path / "run"
    node = start(run_dir, [str(status), "0"])
    said = node.communicate(timeout=120)[1]
    assert node.returncode == status, said
    assert len(attempts(run_dir, 0)) == 1


def test_sigterm_reaches_every_rank_once_and_the_node_ends_with_75(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    node = start(run_dir, ["wait", "0"])
    deadline = time.monotonic() + 60
    while not all((run_dir / f"ready-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    node.send_signal(signal.SIGTERM)
    said = node.communicate(timeout=60)[1]
    assert node.returncode == 75, said
    for rank in range(2):
        # One for the request; torchrun's agent may add its own when the other rank has left a moment earlier.
        assert (run_dir / f"signals-{rank}").read_text().splitlines()[0] == str(int(signal.SIGTERM))
        assert len(attempts(run_dir, rank)) == 1


def test_it_says_what_it_needs(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "infra.launch.node", "--run-dir", str(tmp_path), "--nproc", "-1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--nproc -1" in done.stderr
