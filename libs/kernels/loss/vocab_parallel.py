"""Linear cross-entropy when every rank holds a slice of the vocabulary: two small reductions of T numbers.

Chunks of tokens as in `chunked`, whose backward this is too. How ranks talk is the caller's: a `Reducer`.
"""
# T tokens  V vocabulary of one rank  D hidden  c tokens of one chunk

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from libs.kernels.loss.chunked import accumulation_dtype, chunk_logits, chunked_backward, no_autocast


class Reducer(Protocol):
    """A group of ranks: the only thing this operator knows of communication."""

    @property
    def rank(self) -> int:
        """Of this process, which holds rows rank * V .. (rank + 1) * V of the vocabulary."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def all_reduce_(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Combine a contiguous tensor over the group in place and return it."""


class _VocabParallelNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int, chunk: int, group: Reducer
    ) -> Tensor:
        T, V = hidden_TD.shape[0], weight_VD.shape[0]
        acc, device = accumulation_dtype(hidden_TD.dtype), hidden_TD.device
        kept_T = labels_T != ignore_index
        row_T = torch.where(kept_T, labels_T.long() - group.rank * V, 0)
        held_T = kept_T & (row_T >= 0) & (row_T < V)
        target_T = torch.where(held_T, row_T, 0)
        peak_T = torch.empty(T, dtype=acc, device=device)
        sums_2T = torch.empty(2, T, dtype=acc, device=device)  # sum of exp(logit - peak), and the target's logit
        buffer_cV = torch.empty(min(chunk, T), V, dtype=acc, device=device)
        for start in range(0, T, chunk):
            part = slice(start, min(start + chunk, T))
            logits_cV = chunk_logits(hidden_TD[part], weight_VD, buffer_cV)
            sums_2T[1, part] = logits_cV.gather(1, target_T[part, None])[:, 0]
            torch.amax(logits_cV, 1, out=peak_T[part])
            torch.sum(logits_cV.sub_(peak_T[part, None]).exp_(), 1, out=sums_2T[0, part])
        top_T = group.all_reduce_(peak_T.clone(), "max")
        sums_2T[0] *= (peak_T - top_T).exp_()
        sums_2T[1].masked_fill_(~held_T, 0.0)
        total_T, picked_T = group.all_reduce_(sums_2T)
        lse_T = total_T.log() + top_T
        ctx.save_for_backward(hidden_TD, weight_VD, target_T, kept_T, lse_T, held_T)
        ctx.chunk = chunk
        nll_T: Tensor = lse_T - picked_T
        return nll_T.masked_fill_(~kept_T, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        with no_autocast(grad_T.device.type):
            return (*chunked_backward(ctx, grad_T), None, None, None, None)


def linear_cross_entropy_vocab_parallel(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int, chunk_tokens: int, group: Reducer
) -> Tensor:
    """Same result as `api.linear_cross_entropy` of the whole weight, operands already checked.

    The gradient of `hidden_TD` is this rank's share: softmax(own columns) - target, times own rows.

    Raises:
        RuntimeError: a label outside the whole vocabulary (on CUDA whenever the device gets there).
    """
    vocab = weight_VD.shape[0] * group.size
    inside_T = (labels_T == ignore_index) | ((labels_T >= 0) & (labels_T < vocab))
    # A label that no rank holds would give a plausible loss. Asserted on the device: reading it would wait for it.
    torch._assert_async(inside_T.all(), f"a label is out of bounds for a vocabulary of {vocab}")
    nll_T: Tensor = _VocabParallelNll.apply(  # type: ignore[no-untyped-call]
        hidden_TD.contiguous(), weight_VD, labels_T, ignore_index, chunk_tokens, group
    )
    return nll_T
