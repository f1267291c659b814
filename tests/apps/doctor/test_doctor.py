"""What the doctor says of machines that are not this one; and of this one, through the real program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from apps.doctor import __main__ as program
from apps.doctor import selftests
from apps.doctor.__main__ import main
from apps.doctor.lanes import Diagnosis, Lane, diagnose
from apps.doctor.machine import Gpu, Machine, probe
from apps.doctor.selftests import SelfTest, run_selftests
from apps.doctor.versions import RULES, TORCH, TORCH_TPU, XLA, known_bad

ROOT = Path(__file__).resolve().parents[3]
GOOD = {
    "torch": "2.13.0+cpu", "megatron-core": "0.16.1", "pydantic": "2.11.7", "numpy": "2.2.0", "jinja2": "3.1.6",
    "tilelang": "0.1.15", "liger-kernel": "0.8.5", "transformer-engine": "2.11.0",
    "starlette": "1.10.0", "uvicorn": "0.54.0",
}  # fmt: skip
LAPTOP = Machine(
    python="3.11.7", cpu="a CPU", cores=8, packages=GOOD, torch_error=None, cuda=None, gloo=True, gpus=(),
    xla_error="torch_xla is not installed", compiler="/usr/bin/cc", nvcc="/usr/bin/nvcc",
)  # fmt: skip
H200 = LAPTOP._replace(cuda="13.0", gpus=(Gpu("NVIDIA H200", (9, 0), 1 << 37),))
PASSED = [SelfTest("the scan", True, "agrees", 0.1)]


def _lanes(machine: Machine, tests: list[SelfTest] = PASSED) -> dict[str, Lane]:
    return {lane.name: lane for lane in diagnose(machine, tests).lanes}


def _works(machine: Machine, tests: list[SelfTest] = PASSED) -> list[str]:
    return [name for name, lane in _lanes(machine, tests).items() if lane.works]


def _without(*names: str) -> dict[str, str]:
    return {name: version for name, version in GOOD.items() if name not in names}


def test_which_lanes_work() -> None:
    assert _works(LAPTOP) == ["CPU", "several CPU processes"]
    assert _works(H200) == ["CPU", "several CPU processes", "CUDA, Hopper"]
    node = H200._replace(gpus=H200.gpus * 8)
    assert _works(node) == ["CPU", "several CPU processes", "CUDA, Hopper", "CUDA, Hopper, 8 GPUs"]
    tpu = LAPTOP._replace(packages=GOOD | {"torch": TORCH_TPU, "torch-xla": XLA}, xla_error=None)
    assert _works(tpu) == ["several CPU processes", "TPU"]


@pytest.mark.parametrize(
    ("changed", "lane", "said"),
    [
        ({"torch_error": "ImportError: no"}, "CPU", "torch cannot be imported: ImportError: no"),
        ({"packages": _without("megatron-core")}, "CPU", "megatron-core is not installed"),
        ({"packages": GOOD | {"numpy": "1.26.4"}}, "CPU", "numpy 1.26.4: shards"),
        ({"packages": GOOD | {"torch": "2.12.1"}}, "CPU", "torch 2.12.1: the project is tested with 2.13.0"),
        ({"python": "3.12.1"}, "CPU", "python 3.12.1"),
        ({"gloo": False}, "several CPU processes", "no gloo"),
        ({"gpus": ()}, "CUDA, Hopper", "sees no GPU"),
        ({"cuda": None, "gpus": ()}, "CUDA, Hopper", "built without CUDA"),
        ({"gpus": (Gpu("A100", (8, 0), 1),)}, "CUDA, Hopper", "no GPU of sm_90 (H100, H200, GH200) among A100 (sm_80)"),
        ({"gpus": (Gpu("B200", (10, 0), 1),)}, "CUDA, Hopper", "the kernels are built for sm_90a"),
        ({"packages": _without("tilelang")}, "CUDA, Hopper", "tilelang is not installed"),
        ({"packages": GOOD | {"tilelang": "0.1.16"}}, "CUDA, Hopper", "tilelang 0.1.16: the Hopper kernels"),
        ({"packages": GOOD | {"tilelang": "0.1.14"}}, "CUDA, Hopper", "install 'tilelang==0.1.15'"),
        ({"nvcc": None}, "CUDA, Hopper", "no nvcc"),
        ({"compiler": None}, "CUDA, Hopper", "no C compiler"),
        ({}, "CUDA, Hopper, 8 GPUs", "1 of 8 GPUs"),
        ({"gpus": ()}, "CUDA, Hopper, 8 GPUs", "sees no GPU"),
        ({}, "TPU", "torch_xla is not installed"),
        ({"packages": GOOD | {"torch-xla": "2.9.0"}}, "TPU", "torch_xla 2.9.0 is built against the torch of its own"),
        ({"packages": GOOD | {"torch-xla": "2.9.0"}}, "CPU", "torch_xla 2.9.0 is built against"),
    ],
)
def test_what_keeps_a_lane_from_working(changed: dict[str, object], lane: str, said: str) -> None:
    found = _lanes(H200._replace(**changed))[lane]  # type: ignore[arg-type]
    assert not found.works
    assert said in "\n".join(found.missing)
    assert found.command


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"packages": GOOD | {"liger-kernel": "0.8.2"}}, "liger-kernel 0.8.2: before 0.8.3"),
        ({"packages": _without("liger-kernel")}, "gate fused_linear_ce will refuse"),
        ({"packages": GOOD | {"transformer-engine": "2.12.0"}}, "on_untried_te"),
        ({"packages": GOOD | {"transformer-engine": "2.8.1"}}, "transformer-engine 2.8.1"),
    ],
)
def test_what_only_limits_a_lane(changed: dict[str, object], said: str) -> None:
    lane = _lanes(H200._replace(**changed))["CUDA, Hopper"]  # type: ignore[arg-type]
    assert lane.works
    assert said in "\n".join(lane.limits)


def test_one_command_for_each_lane() -> None:
    """What installs what is missing; where a device is missing, on which machine; and no path that is not there."""
    commands = {name: lane.command for name, lane in _lanes(LAPTOP).items()}
    assert commands["CPU"] == "fathom train --recipe cpu_demo"
    assert commands["CUDA, Hopper"].startswith("on a machine with such GPUs: docker build")
    assert _lanes(H200._replace(packages=_without("tilelang")))["CUDA, Hopper"].command.startswith("docker build")
    assert _lanes(H200)["CUDA, Hopper, 8 GPUs"].command.startswith("on a machine with such GPUs: ")
    everything = [lane.command for machine in (LAPTOP, H200, H200._replace(gpus=H200.gpus * 8))
                  for lane in _lanes(machine).values()]  # fmt: skip
    for path in re.findall(r"infra/[\w/.]+\w", " ".join(everything)):
        assert (ROOT / path).is_file(), path
    for recipe in re.findall(r"--recipe (\w+)", " ".join(everything)):
        assert (ROOT / "apps" / "train" / "recipes" / f"{recipe}.toml").is_file(), recipe


def test_limits_of_the_cpu() -> None:
    lanes = _lanes(LAPTOP._replace(packages=_without("jinja2", "uvicorn"), compiler=None, cores=1))
    assert len(lanes["CPU"].limits) == 3
    assert "processes take turns" in lanes["several CPU processes"].limits[0]


def test_a_failed_selftest_is_no_lane() -> None:
    failed = [SelfTest("the scan", False, "error 0.1", 0.1)]
    assert _works(H200, failed) == []
    assert "self-test of the scan: error 0.1" in _lanes(H200, failed)["CPU"].missing


def test_good_versions_are_good() -> None:
    assert known_bad("3.11.7", GOOD) == []
    assert known_bad("3.11.7", {"torch": "2.9.0+cpu", "torch-xla": "2.9.0"}) == []
    assert {bad.package for bad in known_bad("3.11.7", {"torch": "2.13.0", "torch-xla": "2.9.0"})} == {"torch"}


def test_the_pins_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"torch=={TORCH}"' in text
    assert f'"torch=={TORCH_TPU}", "torch_xla=={XLA}"' in text
    for package in ("tilelang", "liger-kernel", "megatron-core"):
        (rule,) = [rule for rule in RULES if rule.package == package]
        if package != "megatron-core":
            assert rule.install.strip("'") in text
        assert known_bad("3.11.7", {package: GOOD[package]}) == []


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """The tests run here, so the CPU lane works, and the kernels agree with their references."""
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    assert [test["passed"] for test in found["selftests"]] == [True, True, True]
    assert found["lanes"][0]["works"] is True
    assert found["machine"]["packages"]["torch"].startswith(TORCH)


def test_a_machine_without_a_lane(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = LAPTOP._replace(torch_error="ImportError: libfoo.so")
    monkeypatch.setattr(program, "probe", lambda: broken)
    monkeypatch.setattr(program, "run_selftests", lambda: PASSED)
    assert main([]) == 1
    out = capsys.readouterr().out
    assert "CPU: does not work here" in out
    assert "to make it work: make setup" in out
    assert "libfoo.so" in out


def test_selftests_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftests, "_TOLERANCE", 0.0)
    by_name = {test.what.split(",")[0]: test for test in run_selftests()}
    assert not by_name["the loss"].passed
    assert "relative error" in by_name["the loss"].detail

    def missing() -> str | None:
        raise ImportError("no module named kernels")

    monkeypatch.setattr(selftests, "_scan", missing)
    assert "no module named kernels" in run_selftests()[0].detail


def test_probe_answers() -> None:
    found = probe()
    assert found.torch_error is None
    assert found.gloo
    assert isinstance(diagnose(found, PASSED), Diagnosis)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('driver too old\\nand more')", "RuntimeError: driver too old"),
        ("raise OSError('libfoo.so: cannot open')", "OSError: libfoo.so"),
        ("raise ImportError('no _C')", "ImportError: no _C"),
        ("", "AttributeError: module 'torch' has no attribute 'cuda'"),
    ],
)
def test_a_torch_that_cannot_be_imported(tmp_path: Path, source: str, said: str) -> None:
    """Or of which only the folder is left: the doctor says so, in a real process."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(source)
    command = [sys.executable, "-c", "import sys; from apps.cli import main; sys.exit(main())", "doctor", "--json"]
    paths = os.pathsep.join(map(str, (tmp_path, ROOT)))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["machine"]["torch_error"].startswith(said)
    assert found["lanes"][0]["missing"][0].startswith(f"torch cannot be imported: {said}")
    assert not any(test["passed"] for test in found["selftests"])
