"""Linear cross-entropy over chunks of tokens: one buffer of chunk x V logits, written again and again.

Backward recomputes each chunk's logits from the saved log-sum-exp, which costs one extra matrix product and
is what keeps T x V out of memory. Gradients are exact for any per-token grad_output. Not differentiable
twice.
"""
# T tokens  V vocabulary  D hidden  c tokens of one chunk

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of one chunk: a cache's worth on a CPU, enough rows to fill the matrix units on an accelerator.
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27, "xla": 2**27}


def default_chunk_tokens(vocab: int, device_type: str) -> int:
    """Tokens per chunk, a power of two in [16, 8192], so that chunk * vocab stays near a budget."""
    budget = _CHUNK_ELEMENTS.get(device_type, _CHUNK_ELEMENTS["cpu"])
    return max(16, min(8192, 1 << (max(budget // vocab, 1).bit_length() - 1)))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """The operands' dtypes were chosen by the caller; the meta device knows no autocast."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def chunk_logits(hidden_cD: Tensor, weight_VD: Tensor, buffer_cV: Tensor) -> Tensor:
    """hidden @ weight^T in the accumulation dtype, into the buffer."""
    out_cV = buffer_cV[: hidden_cD.shape[0]]
    if hidden_cD.dtype == out_cV.dtype:
        return torch.mm(hidden_cD, weight_VD.T, out=out_cV)
    return out_cV.copy_(torch.mm(hidden_cD, weight_VD.T))


class _ChunkedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int, chunk: int
    ) -> Tensor:
        acc, T, V = accumulation_dtype(hidden_TD.dtype), hidden_TD.shape[0], weight_VD.shape[0]
        kept_T = labels_T != ignore_index
        target_T = torch.where(kept_T, labels_T, 0).long()
        lse_T = torch.empty(T, dtype=acc, device=hidden_TD.device)
        nll_T = torch.empty_like(lse_T)
        buffer_cV = torch.empty(min(chunk, T), V, dtype=acc, device=hidden_TD.device)
        for start in range(0, T, chunk):
            part = slice(start, min(start + chunk, T))
            logits_cV = chunk_logits(hidden_TD[part], weight_VD, buffer_cV)
            picked_c = logits_cV.gather(1, target_T[part, None])[:, 0]
            peak_c = logits_cV.amax(1)
            total_c = logits_cV.sub_(peak_c[:, None]).exp_().sum(1)
            torch.add(total_c.log_(), peak_c, out=lse_T[part])
            torch.sub(lse_T[part], picked_c, out=nll_T[part])
        ctx.save_for_backward(hidden_TD, weight_VD, target_T, kept_T, lse_T, None)
        ctx.chunk = chunk
        return nll_T.masked_fill_(~kept_T, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        with no_autocast(grad_T.device.type):
            return (*chunked_backward(ctx, grad_T), None, None, None)


def chunked_backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden (T, D) and weight (V, D), None where not needed.

    Saved: hidden, weight, target (T,) row of `weight`, kept (T,) not ignored, lse (T,), and held (T,): whether the
    target is among the rows of `weight`, None when it always is.
    """
    hidden_TD, weight_VD, target_T, kept_T, lse_T, held_T = ctx.saved_tensors
    acc, dtype = lse_T.dtype, hidden_TD.dtype
    T, V = hidden_TD.shape[0], weight_VD.shape[0]
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    scale_T = torch.where(kept_T, grad_T.to(acc), 0.0)
    hit_T = scale_T if held_T is None else torch.where(held_T, scale_T, 0.0)
    grad_hidden_TD = torch.empty_like(hidden_TD) if need_hidden else None
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=acc) if need_weight else None
    buffer_cV = torch.empty(min(ctx.chunk, T), V, dtype=acc, device=hidden_TD.device)
    for start in range(0, T, ctx.chunk):
        part = slice(start, min(start + ctx.chunk, T))
        grad_cV = chunk_logits(hidden_TD[part], weight_VD, buffer_cV)
        grad_cV.sub_(lse_T[part, None]).exp_().mul_(scale_T[part, None])
        grad_cV.scatter_add_(1, target_T[part, None], -hit_T[part, None])
        grad_cV = grad_cV.to(dtype)
        if grad_hidden_TD is not None:
            torch.mm(grad_cV, weight_VD, out=grad_hidden_TD[part])
        if grad_weight_VD is not None and dtype == acc:
            grad_weight_VD.addmm_(grad_cV.T, hidden_TD[part])
        elif grad_weight_VD is not None:
            grad_weight_VD += torch.mm(grad_cV.T, hidden_TD[part])
    weight_grad = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
    return grad_hidden_TD, weight_grad


def linear_cross_entropy_chunked(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int, chunk_tokens: int
) -> Tensor:
    """Same result as `api.linear_cross_entropy`, operands already checked."""
    nll_T: Tensor = _ChunkedNll.apply(  # type: ignore[no-untyped-call]
        hidden_TD.contiguous(), weight_VD, labels_T, ignore_index, chunk_tokens
    )
    return nll_T
