"""Whether FP8 parameters can be gathered here: every precondition, checked before a model exists, all failures at once.

megatron-core 0.16.1 checks almost none of them and trains in bf16 instead: its TE classes are mocks where
transformer-engine is missing, and a misspelt recipe is accepted. Not for the model that was built (see `fp8_built`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from libs.flags.catalog import CATALOG
from libs.flags.facts import Facts
from libs.parallel.fp8 import FORMATS, GATE, RECIPES, TOKEN_MULTIPLE, WIDTH_MULTIPLE, Finding, Linear, Word
from libs.parallel.fp8_probe import TE, Environment

_BLOCKWISE_CUDA = (12, 9)
_CUDNN = (9, 12)
_CAPABILITY = (9, 0)


class Plan(NamedTuple):
    """What a run would do. The three configs are megatron-core's own objects.

    word: the gate's value. linears: those that get FP8 parameters. tokens_per_gemm: rows of one matrix product, that is
    sequence (per context-parallel rank) times micro-batch.
    """

    word: Word
    transformer: Any
    ddp: Any
    optimizer: Any
    linears: Sequence[Linear]
    tokens_per_gemm: int
    tp: int
    cp: int


def findings(plan: Plan, environment: Environment) -> Iterator[Finding]:
    """Every precondition that does not hold: of device, packages, configs, shapes and checkpoint."""
    yield from _device(plan, environment)
    yield from _packages(plan, environment)
    yield from _recipe(plan)
    yield from _precision(plan)
    yield from _optimizer(plan, environment)
    yield from _overlap(plan, environment)
    yield from _excluded(plan)
    yield from _shapes(plan)


def _device(plan: Plan, env: Environment) -> Iterator[Finding]:
    if not env.cuda or env.hip:
        yield Finding(f"needs CUDA, torch has {'HIP' if env.hip else 'no device'}", "run on an H100 or H200")
    elif env.capability is None or env.capability < _CAPABILITY:
        shown = "unknown" if env.capability is None else "sm_{}{}".format(*env.capability)
        yield Finding(f"needs sm_90 or above, {env.device_name} is {shown}", "run on an H100 or H200")
    recipe = plan.transformer.fp8_recipe
    if recipe == "blockwise" and (env.toolkit is None or env.toolkit < _BLOCKWISE_CUDA):
        yield Finding(f"recipe blockwise needs CUDA 12.9 or later, torch has {_dotted(env.toolkit)}", "use tensorwise")
    if recipe in env.te_recipes:
        yield Finding(
            f"transformer-engine refuses recipe {recipe} here: {env.te_recipes[recipe]}", "use another recipe"
        )


def _packages(plan: Plan, env: Environment) -> Iterator[Finding]:
    facts = Facts(packages={name: version for name, version in env.te_versions.items() if name == TE})
    for precondition in CATALOG[GATE].preconditions:
        if precondition.name.startswith("package.") and plan.word in precondition.values:
            failure = precondition.check(plan.word, facts)
            if failure is not None:
                yield Finding(failure, f"{precondition.remedy}, or ask for on_untried_te, which is recorded")
    if len(set(env.te_versions.values())) > 1:
        shown = ", ".join(f"{name} {version}" for name, version in sorted(env.te_versions.items()))
        yield Finding(f"the parts of transformer-engine differ: {shown}", "install one version of all of them")
    if env.te_error is not None:
        yield Finding(f"transformer-engine cannot be imported: {env.te_error}", "see infra/docker/cuda.Dockerfile")
    elif not env.megatron_has_te:
        yield Finding("megatron-core did not take up transformer-engine", "import transformer_engine before megatron")
    if env.cudnn is None or env.cudnn < _CUDNN:
        yield Finding(f"needs cuDNN {_dotted(_CUDNN)} or later, found {_dotted(env.cudnn)}", "install a later cuDNN")


def _recipe(plan: Plan) -> Iterator[Finding]:
    transformer, ddp = plan.transformer, plan.ddp
    if transformer.fp8 not in FORMATS:
        yield _one_of("TransformerConfig.fp8", transformer.fp8, FORMATS)
    if transformer.fp8_recipe == "delayed":
        reason = "activation checkpointing computes each block twice, and would record every tensor's maximum twice"
        yield Finding(f"recipe delayed is not supported: {reason}", f"use {' or '.join(RECIPES)}")
    elif transformer.fp8_recipe not in RECIPES:
        yield _one_of("TransformerConfig.fp8_recipe", transformer.fp8_recipe, RECIPES)
    if plan.optimizer.fp8_recipe != transformer.fp8_recipe:
        yield _equal("OptimizerConfig.fp8_recipe", plan.optimizer.fp8_recipe, transformer.fp8_recipe)
    if transformer.fp4 is not None:
        yield _equal("TransformerConfig.fp4", transformer.fp4, None)
    # Two flags that nothing connects: the first makes FP8 parameters, the second says that they are meant.
    if transformer.fp8_param is not True:
        yield _equal("TransformerConfig.fp8_param", transformer.fp8_param, True)
    if ddp.fp8_param_gather is not True:
        yield _equal("DistributedDataParallelConfig.fp8_param_gather", ddp.fp8_param_gather, True)


def _precision(plan: Plan) -> Iterator[Finding]:
    for name, config in (("TransformerConfig", plan.transformer), ("OptimizerConfig", plan.optimizer)):
        if config.bf16 is not True:
            yield _equal(f"{name}.bf16", config.bf16, True)
        if config.params_dtype is not torch.bfloat16:
            yield _equal(f"{name}.params_dtype", config.params_dtype, torch.bfloat16)
    for name in ("use_cpu_initialization", "init_model_with_meta_device"):
        if getattr(plan.transformer, name):
            yield _equal(f"TransformerConfig.{name}", True, False)


def _optimizer(plan: Plan, env: Environment) -> Iterator[Finding]:
    optimizer = plan.optimizer
    if not plan.ddp.use_distributed_optimizer:
        yield _equal("DistributedDataParallelConfig.use_distributed_optimizer", False, True)
    if not optimizer.use_distributed_optimizer:
        yield _equal("OptimizerConfig.use_distributed_optimizer", False, True)
    if optimizer.optimizer != "adam":
        yield _equal("OptimizerConfig.optimizer", optimizer.optimizer, "adam")
    if not env.te_adam:
        yield Finding(
            "the distributed optimizer does not use TE's FusedAdam: megatron-core took up a part of transformer-engine",
            "install transformer-engine's torch extension",
        )
    if optimizer.use_precision_aware_optimizer and optimizer.main_params_dtype is not torch.float32:
        yield _equal("OptimizerConfig.main_params_dtype", optimizer.main_params_dtype, torch.float32)


def _overlap(plan: Plan, env: Environment) -> Iterator[Finding]:
    ddp, optimizer = plan.ddp, plan.optimizer
    if ddp.overlap_param_gather != optimizer.overlap_param_gather:
        yield _equal("OptimizerConfig.overlap_param_gather", optimizer.overlap_param_gather, ddp.overlap_param_gather)
    if ddp.overlap_param_gather and not ddp.overlap_grad_reduce:
        yield _equal("DistributedDataParallelConfig.overlap_grad_reduce", False, True)
    if (plan.tp > 1 or plan.cp > 1) and env.max_connections != "1":
        yield _equal("CUDA_DEVICE_MAX_CONNECTIONS (tp or cp above 1)", env.max_connections, "1")


def _excluded(plan: Plan) -> Iterator[Finding]:
    """What megatron-core has beside this engine, and what belongs to mxfp8 alone, which needs sm_100."""
    for name in ("use_megatron_fsdp", "use_custom_fsdp", "reuse_grad_buf_for_mxfp8_param_ag"):
        if getattr(plan.ddp, name):
            yield _equal(f"DistributedDataParallelConfig.{name}", True, False)
    if plan.optimizer.reuse_grad_buf_for_mxfp8_param_ag:
        yield _equal("OptimizerConfig.reuse_grad_buf_for_mxfp8_param_ag", True, False)


def _shapes(plan: Plan) -> Iterator[Finding]:
    if not plan.linears:
        yield Finding("the model has no linear that could hold FP8 parameters", "use a model built of TE linears")
    for linear in plan.linears:
        if linear.in_features % WIDTH_MULTIPLE or linear.out_features % WIDTH_MULTIPLE:
            yield Finding(
                f"{linear.name} is {linear.out_features} x {linear.in_features} on one of {plan.tp} ranks: "
                f"both must be multiples of {WIDTH_MULTIPLE}",
                "choose other widths or another tp",
            )
    if plan.tokens_per_gemm < 1 or plan.tokens_per_gemm % TOKEN_MULTIPLE:
        yield Finding(
            f"{plan.tokens_per_gemm} tokens per matrix product: must be a multiple of {TOKEN_MULTIPLE}",
            "choose another window, micro-batch or cp",
        )


def _equal(what: str, found: object, wanted: object) -> Finding:
    return Finding(f"{what} must be {wanted}, it is {found}", f"set {what.partition(' ')[0]} to {wanted}")


def _one_of(what: str, found: object, allowed: Sequence[str]) -> Finding:
    return Finding(f"{what} must be one of {', '.join(allowed)}, it is {found}", f"set {what} to {allowed[0]}")


def _dotted(version: tuple[int, int] | None) -> str:
    return "none" if version is None else ".".join(map(str, version))
