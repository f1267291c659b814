"""The launch of the TPU lane: the JobSet against the published models and our exit statuses, the script's two ways."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import yaml
from kubeflow_trainer_api import models

from libs.flags.errors import ExitStatus

ROOT = Path(__file__).resolve().parents[3]
TPU = ROOT / "infra" / "launch" / "tpu"


def manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((TPU / "jobset.yaml").read_text(encoding="utf-8"))
    return loaded


def test_the_manifest_fits_the_published_schemas() -> None:
    document = manifest()
    assert models.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(document)).to_dict() == document


def test_it_answers_every_exit_status_as_the_gpu_one_does() -> None:
    ours = manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]
    other = yaml.safe_load((ROOT / "infra" / "launch" / "kubernetes" / "jobset.yaml").read_text(encoding="utf-8"))
    theirs = other["spec"]["replicatedJobs"][0]["template"]["spec"]
    for key in ("podFailurePolicy", "podReplacementPolicy", "backoffLimit", "parallelism", "completions"):
        assert ours[key] == theirs[key]
    refused = {int(status) for status in (ExitStatus.USAGE, ExitStatus.NONFINITE, ExitStatus.GATE_REFUSED)}
    assert set(ours["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]) == refused


def test_its_command_is_one_that_exists() -> None:
    (container,) = manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    script, _run_dir, *settings = container["command"]
    assert (ROOT / script).stat().st_mode & 0o111
    recipe = settings[settings.index("--recipe") + 1]
    text = (ROOT / "apps" / "train" / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8")
    assert f"fsdp = {container['resources']['limits']['google.com/tpu']}" in text


def launch(run_dir: Path, program: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PROGRAM": str(program)}
    command = ["bash", str(TPU / "vm.sh"), str(run_dir), *settings]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_script_begins_a_run_and_then_goes_on_with_it(tmp_path: Path) -> None:
    program = tmp_path / "fathom"
    program.write_text('#!/bin/sh\necho "$@"\nexit 75\n')
    program.chmod(0o755)
    run_dir = tmp_path / "run"
    first = launch(run_dir, program, "--recipe", "v6e_4k_hybrid")
    assert (first.returncode, first.stdout.split()) == (
        75, ["train", "--run-dir", str(run_dir), "--recipe", "v6e_4k_hybrid"]
    )  # fmt: skip
    run_dir.mkdir()
    (run_dir / "config.json").write_text("{}")
    again = launch(run_dir, program, "--recipe", "v6e_4k_hybrid")
    assert (again.returncode, again.stdout.split()) == (75, ["train", "--resume", str(run_dir)])


def test_an_environment_that_is_missing_is_named(tmp_path: Path) -> None:
    done = launch(tmp_path / "run", tmp_path / "nothing")
    assert done.returncode == 2
    assert "make setup-tpu" in done.stderr
