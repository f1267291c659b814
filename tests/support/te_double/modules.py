"""Linear, contexts, recipes and FusedAdam of the double."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.support.te_double.tensors import BLOCK_LEN, QuantizedTensor, Quantizer


class Format(Enum):
    E4M3 = 1
    HYBRID = 2


class Recipe:
    """block_len: of weights."""

    block_len: int | None = None

    def __init__(self, fp8_format: Format = Format.HYBRID) -> None:
        self.fp8_format = fp8_format

    def quantizer(self) -> Quantizer:
        return Quantizer(self.block_len, self.block_len is not None)


class DelayedScaling(Recipe):
    def quantizer(self) -> Quantizer:
        raise AssertionError("the double has no delayed scaling")


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    block_len = BLOCK_LEN


class State:
    """Of the contexts: what FP8GlobalStateManager holds."""

    recipe: Recipe | None = None
    weights: Recipe | None = None
    keep_initial = False


@contextmanager
def autocast(
    enabled: bool = True, calibrating: bool = False, recipe: Recipe | None = None, amax_reduction_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:  # fmt: skip
    before, State.recipe = State.recipe, recipe if enabled else None
    try:
        yield
    finally:
        State.recipe = before


@contextmanager
def quantized_model_init(
    enabled: bool = True, recipe: Recipe | None = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    before = State.weights, State.keep_initial
    State.weights, State.keep_initial = (recipe if enabled else None), preserve_high_precision_init_val
    try:
        yield
    finally:
        State.weights, State.keep_initial = before


class Linear(nn.Module):
    def __init__(
        self, in_features: int, out_features: int, bias: bool = True,
        init_method: Callable[[Tensor], Any] | None = None, params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
    ) -> None:  # fmt: skip
        super().__init__()
        assert init_method is not None
        assert not bias
        self.in_features, self.out_features = in_features, out_features
        parameter: Any = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        init_method(parameter)
        self.init_method = init_method  # as the original, which keeps it for deferred initialisation
        initial = parameter.detach().cpu()
        if State.weights is not None:
            assert torch.is_grad_enabled(), "the transposed copy is left out without gradients"
            with torch.no_grad():
                parameter = nn.Parameter(State.weights.quantizer()(parameter))
            if State.keep_initial:
                _keep(parameter, initial)
        # As the original: whatever the parallelism of the model.
        parameter.tensor_model_parallel = True
        self.weight = parameter

    def forward(self, inp: Tensor) -> Tensor:
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inp.dtype
        if not torch.is_autocast_enabled("cpu"):
            assert inp.dtype == self.weight.dtype, "Data types for parameters must match outside of autocasted region."
        recipe = State.recipe
        assert recipe is not None, "You are using quantized weights without quantized compute."
        assert self.weight._quantizer.block_len == recipe.block_len, "weights of another recipe"
        rows = inp.numel() // inp.shape[-1]
        assert rows % 8 == 0, "FP8 execution requires the product of all dimensions except the last"
        assert inp.shape[-1] % 16 == 0, "and the last dimension"
        out: Tensor = _Linear.apply(self.weight, inp, low, recipe.fp8_format)  # type: ignore[no-untyped-call]
        return out


def _keep(parameter: Any, initial: Tensor) -> None:
    def get(self: Any) -> Any:
        return getattr(self, "_high_precision_init_val", None)

    def clear(self: Any) -> None:
        if hasattr(self, "_high_precision_init_val"):
            del self._high_precision_init_val

    parameter._high_precision_init_val = initial
    parameter.get_high_precision_init_val = MethodType(get, parameter)
    parameter.clear_high_precision_init_val = MethodType(clear, parameter)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To FP8 with one scale for the tensor, and back."""
    most = torch.finfo(dtype).max
    scale = most / x.abs().max().clamp(min=1e-30).float()
    return (x.float() * scale).clamp(-most, most).to(dtype).float() / scale


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any, inp: Tensor, low: torch.dtype, fmt: Format) -> Tensor:
        rounded = _rounded(inp.to(low), torch.float8_e4m3fn)
        ctx.save_for_backward(rounded, weight)
        ctx.low, ctx.inp_dtype = low, inp.dtype
        ctx.gradient = torch.float8_e4m3fn if fmt is Format.E4M3 else torch.float8_e5m2
        return (rounded @ weight.dequantize(dtype=torch.float32).t()).to(low)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rounded, weight = ctx.saved_tensors
        assert isinstance(weight, QuantizedTensor)
        grad = _rounded(grads[0].to(ctx.low), ctx.gradient).flatten(0, -2)
        if weight._transpose is None:
            weight._create_transpose()
        data, scale_inv = weight._transpose
        transposed = data.view(torch.float8_e4m3fn).float() * scale_inv
        d_inp = (grad @ transposed.t()).to(ctx.low).view(rounded.shape).to(ctx.inp_dtype)
        return (grad.t() @ rounded.flatten(0, -2)).to(ctx.low), d_inp, None, None


class FusedAdam(torch.optim.Optimizer):
    """AdamW over fp32 shards; the step is counted in each group."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, amsgrad: bool = False, *, bias_correction: bool = True, adam_w_mode: bool = True,
    ) -> None:  # fmt: skip
        assert adam_w_mode
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {name: torch.zeros_like(p.detach()) for name in ("exp_avg", "exp_avg_sq")}
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
                change = state["exp_avg"] / (1 - beta1**step) / denominator + group["weight_decay"] * p
                p.sub_(group["lr"] * change)


class MultiTensorApply(NamedTuple):
    """multi_tensor_applier(op, overflow buffer, lists, ...)."""

    chunk_size: int

    def __call__(self, op: Any, noop_flag_buffer: Any, tensor_lists: Any, *args: Any) -> Any:
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(chunk_size: int, noop: Any, lists: Any, per_tensor: bool = False) -> Any:
    return torch.stack([t.float().norm() for t in lists[0]]).norm().view(1), None


def multi_tensor_scale(chunk_size: int, noop: Any, lists: Any, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
