"""Activation checkpointing for XLA: a block's forward runs again in backward, behind a barrier that keeps XLA from
finding out that it is the same computation and saving it after all.

Elsewhere torch's own checkpoint does this; torch_xla's forgets that autocast was on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def recompute_on_xla(block: Callable[[Tensor, Any], Tensor], x: Tensor, context: Any) -> Tensor:
    """block(x, context), keeping only x until backward. Parameters of the block get their gradients there."""
    out: Tensor = _Recomputed.apply(block, context, x)  # type: ignore[no-untyped-call]
    return out


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: Callable[[Tensor, Any], Tensor], context: Any, x: Tensor) -> Tensor:
        kind = x.device.type
        ctx.block, ctx.context = block, context
        ctx.autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        ctx.save_for_backward(x)
        return block(x, context)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, None, Tensor]:
        # torch_xla is an optional dependency.
        import torch_xla.core.xla_model as xm

        (saved,) = ctx.saved_tensors
        # Copies, since the barrier writes in place. It ties x to the gradient: nothing runs before that is there.
        x, d_out = saved.detach().clone(), d_out.clone()
        xm.optimization_barrier_([x, d_out])
        x.requires_grad_()
        with torch.enable_grad(), torch.autocast(x.device.type, **ctx.autocast):
            out = ctx.block(x, ctx.context)
        torch.autograd.backward(out, d_out)
        assert x.grad is not None, "a residual block passes its input through"
        return None, None, x.grad
