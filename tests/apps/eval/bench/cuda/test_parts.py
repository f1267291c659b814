"""Parts that need no GPU: the plan, the floors' arithmetic, the record of the device, the kernels to build ahead."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from apps.eval.bench.cuda import builds, device, floors
from apps.eval.bench.cuda import plan as plans
from apps.eval.bench.cuda.calls import bf16_operands, require_upstream
from apps.eval.bench.operands import Shape
from libs.flags.errors import UserError
from libs.kernels.mimo.sm90.gates import KernelGates, Psiv

CPU = torch.device("cpu")


def test_the_eleven_shapes_are_those_of_the_tile_table() -> None:
    from libs.kernels.mimo.sm90.tiles import SHAPES

    assert [tuple(case) for case in plans.ELEVEN] == [tuple(shape) for shape in SHAPES]
    assert plans.REFERENCE in plans.ELEVEN


@pytest.mark.parametrize("base", list(plans.BASES))
def test_every_setting_that_is_timed_is_checked(base: str) -> None:
    plan = plans.full_plan(rounds=7, seed=0, base=base)
    assert {s.gates for s in plan.settings} == {s.gates for case, s in plan.checks if case == plans.REFERENCE}
    lanes = set(plans.BASES.values())
    assert {(case, s.gates) for case, s in plan.checks} >= {(case, gates) for case in plans.ELEVEN for gates in lanes}
    assert {s.gates.psiv for s in plan.settings} == set(get_args(Psiv))
    staged = [s for s in plan.settings if s.gates.psiv != "off"]
    assert all((s.gates.tma, s.gates.warp_specialization) == (plans.BASES[base].tma,
               plans.BASES[base].warp_specialization) for s in staged)  # fmt: skip
    assert any(s.gates == KernelGates("all", "all", "on") for s in plan.settings)
    names = [s.name for s in plan.settings]
    assert len(set(names)) == len(names)
    assert {tuple(point) for point in plan.points} == {(b, s) for b in (1, 8) for s in (8192, 65536)}


def test_an_unknown_base_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'tma_ws'"):
        plans.settings_on("tma_wz")


@pytest.mark.parametrize("shape", [Shape(S=32), Shape(S=48, B=2, H=4, G=2, N=32, P=16, R=2, divisor=2)])
def test_bytes_are_those_of_the_operands(shape: Shape) -> None:
    operands = bf16_operands(shape, seed=0, device=CPU)
    result = operands.v_BSHP.numel() * 2
    assert floors.input_bytes(shape) == operands.n_bytes()
    assert floors.moved_bytes(shape, training=False) == operands.n_bytes() + result
    assert floors.moved_bytes(shape, training=True) == 3 * operands.n_bytes() + 2 * result


def test_floors_at_the_reference_shape() -> None:
    shape = Shape(S=8192)
    assert floors.moved_bytes(shape, training=False) == pytest.approx(69.2e6, rel=0.01)
    assert floors.needed_flops(shape, training=False) == pytest.approx(17.18e9, rel=0.001)
    assert floors.needed_flops(shape, training=True) == 3 * floors.needed_flops(shape, training=False)


def test_floor_runners_do_their_work() -> None:
    product = floors.gemm_runner(8, CPU)()
    assert isinstance(product, torch.Tensor)
    assert (product.shape, product.dtype) == ((8, 8), torch.bfloat16)
    copied = floors.copy_runner(100, CPU)()
    assert isinstance(copied, torch.Tensor)
    assert copied.numel() == 100


def test_without_cuda_the_refusal_says_why_and_where_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"no CUDA device here.*infra/gpu/README\.md"):
        device.require_cuda()


def test_another_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = SimpleNamespace(name="A100", major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: ampere)
    with pytest.raises(UserError, match=r"A100 has compute capability 8\.0; .*sm_90a"):
        device.require_cuda()


def test_the_record_of_a_gpu_says_null_for_what_cannot_be_read() -> None:
    def answer(command: Sequence[str]) -> str:
        assert "--id=GPU-1" in command
        return "580.1, 1980, 3201, [N/A], 700.00, 33\n"

    h200 = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=150 << 30)
    record = device.gpu_record(h200, device.smi_state("GPU-1", answer))
    assert (record.driver, record.sm_clock_mhz, record.max_sm_clock_mhz, record.power_limit_w) == (
        "580.1", 1980, None, 700,
    )  # fmt: skip
    assert device.gpu_record(h200, {}).driver is None


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("nvidia-smi"),
        subprocess.CalledProcessError(9, "nvidia-smi"),
        subprocess.TimeoutExpired("x", 1),
    ],
)
def test_no_answer_of_nvidia_smi_is_no_state(error: Exception) -> None:
    def fail(command: Sequence[str]) -> str:
        raise error

    assert device.smi_state("0", fail) == {}
    assert device.smi_state("0", lambda command: "No devices were found") == {}


def test_upstream_that_is_not_installed_is_refused() -> None:
    with pytest.raises(UserError, match="mamba_ssm: the package is not installed"):
        require_upstream("mamba_ssm")
    with pytest.raises(UserError, match="unknown contender"):
        require_upstream("mamba")


def test_kernels_are_built_ahead_for_what_will_be_called() -> None:
    plan = plans.full_plan(rounds=1, seed=0)
    jobs = builds.jobs_of(plan, 132)
    assert len(set(jobs)) == len(jobs)
    assert all(job.S % (job.case.C * job.splits) == 0 for job in jobs)
    whole = {job.kernel for job in jobs if job.splits == 1}
    assert whole == {"fwd", "bwd_fwd", "bwd_bwd"}
    split = [job for job in jobs if job.splits > 1]
    assert {job.kernel for job in split} == whole | {"states", "combine", "bwd_states", "bwd_combine"}
    # One sequence of 16 heads needs 9 splits for 132 multiprocessors; 4096 chunks become 4104.
    assert {(job.splits, job.S) for job in split if (job.B, job.S) > (1, 60000)} >= {(9, 4104 * 16)}


def _checked_kernels() -> set[tuple[object, ...]]:
    plan = plans.full_plan(rounds=1, seed=0)
    return {(job.kernel, job.gates.mode("fwd")) for job in builds.jobs_of(plan, 132)}


def test_every_mode_of_every_kernel_is_among_them() -> None:
    assert {mode for _, mode in _checked_kernels()} == {"plain", "tma", "ws"}
