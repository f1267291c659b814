"""Quantised tensors of the double, and what megatron-core's distributed optimizer does to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

E4M3_MAX = 448.0
BLOCK_LEN = 16  # 128 in the original: small, so that the tests' small weights have several blocks


class Quantizer:
    """block_len None: one scale for the tensor (Float8CurrentScalingQuantizer); else for each square block."""

    def __init__(self, block_len: int | None, power_2: bool) -> None:
        self.block_len, self.power_2 = block_len, power_2

    def copy(self) -> Quantizer:
        return Quantizer(self.block_len, self.power_2)

    def grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """How many blocks there are down and across."""
        if self.block_len is None:
            return 1, 1
        return -(-shape[0] // self.block_len), -(-shape[1] // self.block_len)

    def block_of(self, shape: Sequence[int], start: int, stop: int) -> Tensor:
        """The number of the block that each entry of a flat range is in."""
        if self.block_len is None:
            return torch.zeros(stop - start, dtype=torch.int64)
        at = torch.arange(start, stop)
        across = self.grid(shape)[1]
        return at // shape[1] // self.block_len * across + at % shape[1] // self.block_len

    def scale(self, amax: Tensor) -> Tensor:
        scale = torch.where(amax > 0, E4M3_MAX / amax, 1.0)
        return torch.exp2(torch.floor(torch.log2(scale))) if self.power_2 else scale

    def partial_amax(self, values: Tensor, shape: Sequence[int], start: int) -> Tensor:
        rows, columns = self.grid(shape)
        flat = values.flatten().float().abs()
        blocks = self.block_of(shape, start, start + flat.numel())
        return torch.zeros(rows * columns).scatter_reduce_(0, blocks, flat, "amax")

    def partial_cast(self, values: Tensor, shape: Sequence[int], start: int, scale: Tensor, out: Tensor) -> None:
        flat = values.flatten().float()
        scaled = flat * scale[self.block_of(shape, start, start + flat.numel())]
        out.copy_(scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8))

    def __call__(self, tensor: Tensor) -> Any:
        kind = Float8Tensor if self.block_len is None else Float8BlockwiseQTensor
        data = torch.empty(tensor.shape, dtype=torch.uint8)
        scale = self.scale(self.partial_amax(tensor, tensor.shape, 0))
        self.partial_cast(tensor, tensor.shape, 0, scale, data.view(-1))
        made = kind(tensor.shape, tensor.dtype, data, scale.reciprocal(), self, requires_grad=tensor.requires_grad)
        made._create_transpose()
        return made


class QuantizedTensor(torch.Tensor):
    """Bytes and scales behind the face of a bf16 tensor; most operations see the dequantised values."""

    _bytes_name = "_data"

    @staticmethod
    def __new__(
        cls: Any, shape: Any, dtype: torch.dtype, data: Tensor, scale_inv: Tensor, quantizer: Any, *,
        transpose: tuple[Tensor, Tensor] | None = None, requires_grad: bool = False,
    ) -> Any:  # fmt: skip
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, requires_grad=requires_grad)
        made.bytes, made._scale_inv, made._quantizer = data, scale_inv, quantizer.copy()
        made._transpose = transpose
        return made

    @property
    def bytes(self) -> Tensor:
        found: Tensor = getattr(self, self._bytes_name)
        return found

    @bytes.setter
    def bytes(self, data: Tensor) -> None:
        setattr(self, self._bytes_name, data)

    def _get_quantizer(self) -> Any:
        return self._quantizer

    def _create_transpose(self) -> None:
        """Of the bytes as they are now, with the scales as they are now: (entries, scale of each)."""
        blocks = self._quantizer.block_of(self.shape, 0, self.numel()).view(self.shape)
        self._transpose = (self.bytes.t().contiguous(), self._scale_inv[blocks].t().contiguous())

    def dequantize(self, *, dtype: torch.dtype | None = None) -> Tensor:
        blocks = self._quantizer.block_of(self.shape, 0, self.numel()).view(self.shape)
        values = self.bytes.view(torch.float8_e4m3fn).float() * self._scale_inv[blocks]
        return values.to(dtype or self.dtype)

    def float(self) -> Tensor:
        return self.dequantize(dtype=torch.float32)

    def like(self) -> Any:
        return type(self)(
            self.shape, self.dtype, self.bytes, self._scale_inv, self._quantizer, transpose=self._transpose
        )

    def expand_as(self, other: Tensor) -> Tensor:
        if other is self:  # how DistributedDataParallel finds where gradients arrive
            out: Tensor = _Identity.apply(self)  # type: ignore[no-untyped-call]
            return out
        return super().expand_as(other)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0].like()
        assert not func._schema.is_mutable, f"{func} on a quantised tensor"
        assert func is not torch.ops.aten.view.default, "no view of a quantised tensor"

        def plain(value: Any) -> Any:
            return value.dequantize() if isinstance(value, QuantizedTensor) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl


class Float8Tensor(QuantizedTensor):
    """Recipe tensorwise."""


class Float8BlockwiseQTensor(QuantizedTensor):
    """Recipe blockwise."""

    _bytes_name = "_rowwise_data"


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Any:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def replace_raw_data(tensor: Any, new_raw_data: Tensor) -> None:
    """Into megatron-core's buffer; values are kept."""
    assert tensor.bytes.dtype == new_raw_data.dtype, "The data types of raw data don't match"
    new_raw_data.detach().copy_(tensor.bytes)
    tensor.bytes = new_raw_data


def cast_master_weights_to_fp8(
    model_weights: Any, master_weights: Any, start_offsets: Any, group: Any, fsdp_shard_model_weights: Any = None,
    manual_post_all_gather_processing: bool = False,
) -> None:  # fmt: skip
    """Each rank writes the bytes of its shards, with scales from the largest entries on all ranks."""
    assert fsdp_shard_model_weights is None
    for weight in model_weights:
        if hasattr(weight, "clear_high_precision_init_val"):
            weight.clear_high_precision_init_val()
    masters = [None if m is None else m.to(w.dtype) for m, w in zip(master_weights, model_weights, strict=True)]
    sizes = [w._scale_inv.numel() for w in model_weights]
    packed = torch.zeros(sum(sizes))
    amaxes = packed.split(sizes)
    for weight, master, start, amax in zip(model_weights, masters, start_offsets, amaxes, strict=True):
        if master is not None:
            amax.copy_(weight._quantizer.partial_amax(master, weight.shape, start))
    dist.all_reduce(packed, dist.ReduceOp.MAX, group=group)
    for weight, master, start, amax in zip(model_weights, masters, start_offsets, amaxes, strict=True):
        scale = weight._quantizer.scale(amax)
        weight._scale_inv.copy_(scale.reciprocal())
        if not manual_post_all_gather_processing:
            weight._transpose = None
        if master is not None:
            mine = weight.bytes.view(-1)[start : start + master.numel()]
            weight._quantizer.partial_cast(master, weight.shape, start, scale, mine)


def post_all_gather_processing(model_weights: Any) -> None:
    """Renew the transposed copies."""
    for weight in model_weights if isinstance(model_weights, list) else [model_weights]:
        if isinstance(weight, QuantizedTensor):
            weight._create_transpose()
