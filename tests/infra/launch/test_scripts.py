"""The shell scripts, run with small programs in place of python and Slurm."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from libs.flags.errors import ExitStatus

LAUNCH = Path(__file__).resolve().parents[3] / "infra" / "launch"
TORCHRUN, SLURM = LAUNCH / "torchrun.sh", LAUNCH / "slurm.sbatch"


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which `python` and `scontrol` note what they are called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    python = f"""#!/usr/bin/env bash
echo "$CUDA_DEVICE_MAX_CONNECTIONS $*" >>{tmp_path}/python
trap 'sleep 0.3; exit 75' TERM
for _ in $(seq "${{TENTHS:-0}}"); do sleep 0.1; done
exit "${{STATUS:-0}}"
"""
    for name, text in (("python", python), ("scontrol", f'#!/usr/bin/env bash\necho "$*" >>{tmp_path}/scontrol\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    given = {name: value for name, value in os.environ.items() if name not in ("NPROC", "STATUS", "TENTHS")}
    return given | {"PATH": path, "SLURM_JOB_ID": "417", "SLURM_SUBMIT_DIR": str(LAUNCH.parents[1])}


def called(tmp_path: Path, name: str) -> list[str]:
    file = tmp_path / name
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("script", [TORCHRUN, SLURM], ids=lambda p: p.name)
def test_scripts_parse_and_can_be_executed(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_torchrun_passes_everything_on(tmp_path: Path, programs: dict[str, str]) -> None:
    environ = programs | {"NPROC": "2", "STATUS": "78"}
    words = [TORCHRUN, "runs/a b", "--recipe", "cpu_demo_tp2"]
    done = subprocess.run(words, env=environ, cwd=tmp_path, check=False)
    assert done.returncode == ExitStatus.GATE_REFUSED
    command = "-m infra.launch.node --run-dir runs/a b --nproc 2 -- --recipe cpu_demo_tp2"
    assert called(tmp_path, "python") == [f"1 {command}"]
    assert subprocess.run([TORCHRUN], capture_output=True, check=False).returncode == ExitStatus.USAGE


@pytest.mark.parametrize("status", [0, 1, 2, 70, 75, 78, 137])
def test_slurm_requeues_exactly_what_was_interrupted(tmp_path: Path, programs: dict[str, str], status: int) -> None:
    done = subprocess.run([SLURM, "--recipe", "x"], env=programs | {"STATUS": str(status)}, check=False)
    assert done.returncode == status
    assert called(tmp_path, "scontrol") == (["requeue 417"] if status == ExitStatus.REQUEUE else [])
    (command,) = called(tmp_path, "python")
    assert command.endswith("--run-dir runs/slurm-417 -- --recipe x")


def test_slurm_hands_sigterm_on_and_waits_for_the_save(tmp_path: Path, programs: dict[str, str]) -> None:
    job = subprocess.Popen([SLURM, "--recipe", "x"], env=programs | {"TENTHS": "300"})
    deadline = time.monotonic() + 30
    while not called(tmp_path, "python"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == ExitStatus.REQUEUE
    assert called(tmp_path, "scontrol") == ["requeue 417"]


def test_slurm_asks_for_what_the_script_relies_on() -> None:
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SLURM.read_text(encoding="utf-8"), re.MULTILINE))
    assert options["nodes"] == options["ntasks"] == "1"
    assert re.fullmatch(r"B:TERM@\d+", options["signal"]), "only the batch shell is told, and in time"
    assert "requeue" in options
    assert options["open-mode"] == "append"
