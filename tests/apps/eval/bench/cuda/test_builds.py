"""What is compiled ahead is what a call launches, and a second process finds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.eval.bench.cuda import accuracy, builds
from apps.eval.bench.cuda import plan as plans
from apps.eval.bench.cuda.calls import bf16_operands, op_call, training_runner
from libs.kernels.mimo.sm90 import bwd_launch, forward
from libs.kernels.mimo.sm90.kernel_set import mode_of, spec_of

CPU = torch.device("cpu")
CASE = plans.Case(64, 64, 4, 16)
# Chosen by the tile table on a GPU, and by nothing on the CPU.
RESOURCES = {"stages", "min_blocks", "share_x", "threads"}
NAMES = {"make_forward": "fwd", "make_states": "states", "make_combine": "combine"}


def variant(kernel: str, mode: str, spec: Any) -> tuple[Any, ...]:
    fields = {key: value for key, value in spec._asdict().items() if key not in RESOURCES}
    if kernel == "bwd_combine":
        fields = {key: fields[key] for key in ("B", "H", "N", "P", "splits")}
    return kernel, mode, tuple(sorted(fields.items()))


@pytest.mark.parametrize("setting", plans.settings_on("tma"), ids=lambda setting: setting.name)
def test_jobs_are_the_launches_of_a_call(setting: plans.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are replaced by a recorder: only which ones are asked for matters here."""
    launched: set[tuple[Any, ...]] = set()

    def record(make: Any, spec: Any, mode: str, tensors: Sequence[Tensor], *_: object) -> None:
        launched.add(variant(NAMES.get(make.__name__, make.__name__), mode, spec))
        for tensor in tensors[-2:]:
            tensor.zero_()

    monkeypatch.setattr(forward, "launch", record)
    monkeypatch.setattr(bwd_launch, "launch", record)
    shape = CASE.at(100)._replace(H=2)
    operands = bf16_operands(shape, seed=0, device=CPU)
    grad_out = accuracy.output_gradient(shape, seed=0, device=CPU)

    def call(given: Any) -> Tensor:
        return op_call(given, shape, CASE.C, setting.gates)

    training_runner(call, operands, grad_out)()
    small = plans.CudaPlan(((CASE, setting),), 100, (), (), 1, 1, 1, 1, 0, None, None)
    monkeypatch.setattr(plans.Case, "at", lambda case, tokens: shape)
    jobs = builds.jobs_of(small, 132)
    wanted = {
        variant(job.kernel, mode_of(job.kernel, job.gates), spec_of(job.kernel, job.gates, builds.problem_of(job)))
        for job in jobs
    }
    # The kernel set describes 16 heads.
    wanted = {(k, m, tuple((n, 2 if n == "H" else v) for n, v in fields)) for k, m, fields in wanted}
    assert launched == wanted


def test_a_shape_outside_the_table_is_reported_not_raised() -> None:
    odd = plans.Case(48, 64, 4, 16)
    setting = plans.settings_on("off")[0]
    plan = plans.CudaPlan(((odd, setting),), 64, (), (), 1, 1, 1, 1, 0, None, None)
    (job, *_), error = builds.jobs_of(plan, 132), builds._build(builds.jobs_of(plan, 132)[0])
    assert job.case == odd
    assert error is not None
    assert error.startswith("fwd at (48, 64, 4, 16): no Hopper kernel")


@pytest.mark.slow
def test_a_kernel_is_built_in_another_process() -> None:
    setting = plans.settings_on("off")[0]
    plan = plans.CudaPlan(((plans.Case(16, 64, 4, 8), setting),), 16, (), (), 1, 1, 1, 1, 0, None, None)
    jobs = [job for job in builds.jobs_of(plan, 132) if job.kernel == "fwd"]
    seen: list[str] = []
    built = builds.build_ahead(jobs, 1, on_built=seen.append)
    assert (built.kernels, built.failed, len(seen)) == (1, (), 1)
