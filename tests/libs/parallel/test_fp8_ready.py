"""FP8 parameters: every precondition fails on its own and all are listed; megatron-core itself accepts them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from libs.flags.errors import ExitStatus, GateRefused, run_entry
from libs.parallel.fp8 import Linear, refuse
from libs.parallel.fp8_probe import probe
from libs.parallel.fp8_ready import Plan, findings
from tests.support.h200 import BARE, H200


def plan(
    *,
    transformer: dict[str, Any] | None = None,
    ddp: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **rest: Any,
) -> Plan:
    """A plan that is ready on H200, with changes to megatron-core's own config objects."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    fp8 = {"fp8": "hybrid", "fp8_recipe": "blockwise", "fp8_param": True}
    low = {"bf16": True, "params_dtype": torch.bfloat16}
    gather = {"use_distributed_optimizer": True, "overlap_param_gather": True}
    given: dict[str, Any] = {
        "word": "on",
        "transformer": TransformerConfig(**(shape | fp8 | low | (transformer or {}))),
        "ddp": DistributedDataParallelConfig(
            **(gather | {"overlap_grad_reduce": True, "fp8_param_gather": True} | (ddp or {}))
        ),
        "optimizer": OptimizerConfig(**(gather | low | {"fp8_recipe": "blockwise"} | (optimizer or {}))),
        "linears": (Linear("layers.0.mlp.linear_fc1.weight", 64, 256),),
        "tokens_per_gemm": 8192,
        "tp": 2,
        "cp": 1,
    }
    return Plan(**(given | rest))


def test_a_plan_that_is_ready_passes() -> None:
    assert list(findings(plan(), H200)) == []
    refuse((), "on")


Case = tuple[str, Callable[[], Plan], dict[str, Any], str]
# One thing wrong each: megatron-core takes all of these configs, and trains.
CASES: list[Case] = [
    ("no cuda", plan, {"cuda": False}, "needs CUDA, torch has no device"),
    ("hip", plan, {"hip": True}, "needs CUDA, torch has HIP"),
    ("ada", plan, {"capability": (8, 9)}, "NVIDIA H200 is sm_89"),
    ("toolkit", plan, {"toolkit": (12, 8)}, "needs CUDA 12.9 or later, torch has 12.8"),
    ("te says no", plan, {"te_recipes": {"blockwise": "no cublas"}}, "refuses recipe blockwise here: no cublas"),
    ("te old", plan, {"te_versions": {"transformer-engine": "2.8.0"}}, ">=2.9,<2.12, found 2.8.0"),
    ("te late", plan, {"te_versions": {"transformer-engine": "2.20.2"}}, ">=2.9,<2.12, found 2.20.2"),
    ("te absent", plan, {"te_versions": {}}, "which is not installed"),
    (
        "te mixed",
        plan,
        {"te_versions": {"transformer-engine": "2.11.0", "transformer-engine-cu13": "2.10.0"}},
        "parts of transformer-engine differ",
    ),
    ("te broken", plan, {"te_error": "RuntimeError: cudnn shared object not found"}, "cudnn shared object not found"),
    ("no te in mcore", plan, {"megatron_has_te": False}, "did not take up"),
    ("cudnn", plan, {"cudnn": (9, 8)}, "needs cuDNN 9.12 or later, found 9.8"),
    ("adam", plan, {"te_adam": False}, "TE's FusedAdam"),
    ("connections", plan, {"max_connections": None}, "CUDA_DEVICE_MAX_CONNECTIONS"),
    ("format typo", lambda: plan(transformer={"fp8": "e4m3fn"}), {}, "one of e4m3, hybrid, it is e4m3fn"),
    (
        "recipe typo",
        lambda: plan(transformer={"fp8_recipe": "blokwise"}, optimizer={"fp8_recipe": "blokwise"}),
        {},
        "one of tensorwise, blockwise, it is blokwise",
    ),
    (
        "mxfp8",
        lambda: plan(transformer={"fp8_recipe": "mxfp8"}, optimizer={"fp8_recipe": "mxfp8"}),
        {},
        "it is mxfp8",
    ),
    ("recipes differ", lambda: plan(optimizer={"fp8_recipe": "delayed"}), {}, "must be blockwise, it is delayed"),
    (
        "delayed",
        lambda: plan(transformer={"fp8_recipe": "delayed"}, optimizer={"fp8_recipe": "delayed"}),
        {},
        "recipe delayed is not supported: activation checkpointing computes each block twice",
    ),
    ("no fp8_param", lambda: plan(transformer={"fp8_param": False}), {}, "fp8_param must be True"),
    ("not meant", lambda: plan(ddp={"fp8_param_gather": False}), {}, "fp8_param_gather must be True, it is False"),
    ("fp32", lambda: plan(transformer={"params_dtype": torch.float32}), {}, "TransformerConfig.params_dtype must be"),
    ("fp32 state", lambda: plan(optimizer={"params_dtype": torch.float32}), {}, "OptimizerConfig.params_dtype must"),
    ("not bf16", lambda: plan(optimizer={"bf16": False}), {}, "OptimizerConfig.bf16 must be True"),
    ("on cpu", lambda: plan(transformer={"use_cpu_initialization": True}), {}, "use_cpu_initialization must be False"),
    ("meta", lambda: plan(transformer={"init_model_with_meta_device": True}), {}, "init_model_with_meta_device"),
    ("sgd", lambda: plan(optimizer={"optimizer": "sgd"}), {}, "OptimizerConfig.optimizer must be adam, it is sgd"),
    (
        "overlap differs",
        lambda: plan(optimizer={"overlap_param_gather": False}),
        {},
        "OptimizerConfig.overlap_param_gather must be True, it is False",
    ),
    ("overlap alone", lambda: plan(ddp={"overlap_grad_reduce": False}), {}, "overlap_grad_reduce must be True"),
    (
        "dist opt",
        lambda: plan(ddp={"use_distributed_optimizer": False}),
        {},
        "DistributedDataParallelConfig.use_distributed_optimizer must be True",
    ),
    (
        "mxfp8 buffer",
        lambda: plan(ddp={"reuse_grad_buf_for_mxfp8_param_ag": True}),
        {},
        "reuse_grad_buf_for_mxfp8_param_ag must be False",
    ),
    ("fsdp", lambda: plan(ddp={"use_megatron_fsdp": True}), {}, "use_megatron_fsdp must be False"),
    ("no linears", lambda: plan(linears=()), {}, "no linear that could hold FP8"),
    ("width", lambda: plan(linears=(Linear("in_proj.weight", 64, 1032),)), {}, "in_proj.weight is 1032 x 64"),
    ("tokens", lambda: plan(tokens_per_gemm=8190), {}, "8190 tokens per matrix product"),
]


@pytest.mark.parametrize(("make", "change", "said"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_each_precondition_fails_alone(make: Callable[[], Plan], change: dict[str, Any], said: str) -> None:
    found = list(findings(make(), H200._replace(**change)))
    assert len(found) == 1, found
    assert said in found[0].failure
    assert found[0].remedy


def test_a_config_that_cannot_be_made_wrong_twice() -> None:
    """fp4 is refused by megatron-core as well, and so is another precision of main values: set on a finished object."""
    made = plan()
    made.transformer.fp4 = "e2m1"
    assert [f.failure for f in findings(made, H200)] == ["TransformerConfig.fp4 must be None, it is e2m1"]
    made = plan()
    made.optimizer.use_precision_aware_optimizer = True
    made.optimizer.main_params_dtype = torch.float16
    assert ["main_params_dtype must be torch.float32" in f.failure for f in findings(made, H200)] == [True]


def test_a_later_transformer_engine_needs_its_own_value() -> None:
    later = H200._replace(te_versions={"transformer-engine": "2.20.2", "transformer-engine-torch": "2.20.2"})
    assert [*findings(plan(word="on_untried_te"), later)] == []
    assert [*findings(plan(word="on_untried_te"), H200)] == []
    (found,) = findings(plan(word="on_untried_te"), H200._replace(te_versions={"transformer-engine": "2.8"}))
    assert ">=2.9, found 2.8" in found.failure
    (found,) = findings(plan(), later)
    assert "on_untried_te" in found.remedy


def test_everything_that_is_missing_is_in_one_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = plan(
        transformer={"fp8": "e4m3fn", "fp8_recipe": "blokwise", "params_dtype": torch.float32},
        ddp={"fp8_param_gather": False, "use_distributed_optimizer": False},
        linears=(),
    )

    def main(_argv: object) -> int:
        refuse([*findings(wrong, BARE)], "on")
        return 0

    assert run_entry(main, []) == ExitStatus.GATE_REFUSED
    said = capsys.readouterr().err
    assert "FATHOM_FP8_PARAM_GATHER=on (gate fp8_param_gather) refused" in said
    for part in (
        "needs CUDA", "not installed", "cannot be imported", "cuDNN", "e4m3fn", "blokwise", "params_dtype",
        "fp8_param_gather must be", "use_distributed_optimizer must be", "FusedAdam",
        "CUDA_DEVICE_MAX_CONNECTIONS", "no linear",
    ):  # fmt: skip
        assert part in said, part
    with pytest.raises(GateRefused) as caught:
        refuse([*findings(wrong, BARE)], "on")
    assert len(caught.value.refusals) == 1
    assert len(caught.value.refusals[0].failures) == len(list(findings(wrong, BARE))) >= 12


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA is told")
def test_probing_a_machine_without_cuda_is_refused_not_broken() -> None:
    here = probe()
    assert not here.cuda
    assert here.te_error is not None
    assert "transformer_engine" in here.te_error
    with pytest.raises(GateRefused, match="cannot be imported: ModuleNotFoundError"):
        refuse([*findings(plan(), here)], "on")
