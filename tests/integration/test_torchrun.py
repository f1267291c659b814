"""The command of the README, by torchrun itself: its restarts too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from libs.flags.runlog import read_events

ROOT = Path(__file__).resolve().parents[2]
# What torchrun starts on each rank: `fathom train`, but rank 1 of the first attempt dies in its third step.
DIES_ONCE = """
import os
from apps.train.__main__ import main
from libs.flags.errors import run_entry
from tests.support import job_faults
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    job_faults.dies(int(os.environ["RANK"]))
raise SystemExit(run_entry(main))
"""


@pytest.mark.slow
def test_restarted_by_torchrun_it_goes_on(recipe: Path, tmp_path: Path) -> None:
    """No --run-dir: the name of the job leads the second attempt to the run of the first."""
    script = tmp_path / "dies_once.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{DIES_ONCE}")
    words = ["--recipe", recipe, "--log.runs_dir", tmp_path / "runs", "--checkpoint.every", "2", "--parallel.tp", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", script, *words, "--parallel.timeout_s", "20"]
    ended = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    (run,) = [path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]
    events = list(read_events(run))
    assert [event["attempt"] for event in events if event["event"] == "run.start"] == [0, 1]
    assert [event["step"] for event in events if event["event"] == "checkpoint.restore"] == [2]
    assert events[-1]["exit_code"] == 0
