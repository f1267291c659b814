"""The double's modules under transformer-engine's names, before megatron-core is imported."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from tests.support.te_double import modules, tensors

VERSION = "2.11.0"


class NotInTheDouble:
    """A base for megatron-core's wrappers of what the tests do not use."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the double of transformer-engine has no such class")


def install() -> None:
    """For the life of the process, which must be the test's own.

    Raises:
        RuntimeError: CUDA is here, or megatron-core or the real transformer-engine was imported before.
    """
    if torch.cuda.is_available():
        raise RuntimeError("CUDA is here: test transformer-engine itself, not a double")
    early = [name for name in sys.modules if name.partition(".")[0] in ("transformer_engine", "megatron")]
    if early:
        raise RuntimeError(f"too late for the double: {early[0]} is imported")
    parts = {name: getattr(modules, name) for name in ("Linear", "autocast", "quantized_model_init")}
    unused = ("LayerNormLinear", "GroupedLinear", "DotProductAttention", "LayerNorm", "RMSNorm")
    able = dict.fromkeys(("is_fp8_available", "is_fp8_block_scaling_available"), lambda **_: (True, ""))
    root = _module("transformer_engine", __version__=VERSION)
    root.common = _module("transformer_engine.common")  # type: ignore[attr-defined]
    recipes = ("Format", "Recipe", "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling")
    root.common.recipe = _module("transformer_engine.common.recipe", **{n: getattr(modules, n) for n in recipes})
    te = root.pytorch = _module(  # type: ignore[attr-defined]
        "transformer_engine.pytorch", **parts, **dict.fromkeys(unused, NotInTheDouble), **able
    )
    te.ops = _module("transformer_engine.pytorch.ops", Sequential=NotInTheDouble, FusibleOperation=NotInTheDouble)
    recompute = ("CudaRNGStatesTracker", "activation_recompute_forward")
    te.distributed = _module("transformer_engine.pytorch.distributed", **dict.fromkeys(recompute, NotInTheDouble))
    _module("transformer_engine.pytorch.fp8", FP8GlobalStateManager=modules.State, fp8_autocast=modules.autocast)
    routing = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
    _module("transformer_engine.pytorch.router", **dict.fromkeys(routing, NotInTheDouble))
    _module(
        "transformer_engine.pytorch.optimizers",
        FusedAdam=modules.FusedAdam,
        FusedSGD=torch.optim.SGD,
        multi_tensor_applier=modules.MultiTensorApply(2048),
        multi_tensor_l2norm=modules.multi_tensor_l2norm,
        multi_tensor_scale=modules.multi_tensor_scale,
    )
    _module("transformer_engine.pytorch.tensor", QuantizedTensor=tensors.QuantizedTensor)
    _module("transformer_engine.pytorch.tensor.float8_tensor", Float8Tensor=tensors.Float8Tensor)
    blockwise = {"Float8BlockwiseQTensor": tensors.Float8BlockwiseQTensor}
    _module("transformer_engine.pytorch.tensor.float8_blockwise_tensor", **blockwise)
    shards = ("replace_raw_data", "cast_master_weights_to_fp8", "post_all_gather_processing")
    _module("transformer_engine.pytorch.tensor.utils", **{name: getattr(tensors, name) for name in shards})
    _module("transformer_engine_torch")
    # Where megatron-core and libs.parallel.fp8_probe ask which Adam this is.
    modules.FusedAdam.__module__ = "transformer_engine.pytorch.optimizers.fused_adam"


def _module(name: str, **content: Any) -> Any:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, is_package=True)
    made.__path__ = []
    for key, value in content.items():
        setattr(made, key, value)
    sys.modules[name] = made
    return made
