"""Linear cross-entropy for XLA devices: a loop over chunks of tokens with static shapes, recomputed backward.

Same result as `chunked`, which writes into buffers and would be unrolled chunk by chunk into an XLA graph.
"""
# T tokens  V vocabulary  D hidden  n chunks of c tokens

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnF

from libs.kernels.chunk_loop import Driver, Tensors, chunk_loop
from libs.kernels.loss.chunked import accumulation_dtype


def linear_cross_entropy_xla(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int, chunk_tokens: int, *,
    driver: Driver = "scan",
) -> Tensor:  # fmt: skip
    """Same arguments and result as `api.linear_cross_entropy`, already checked."""
    acc, T = accumulation_dtype(hidden_TD.dtype), hidden_TD.shape[0]
    chunks = -(-T // chunk_tokens)
    missing = chunks * chunk_tokens - T
    # A chunk takes every n-th token: where rows are shared out over devices, each has its part of every chunk.
    hidden_ncD = nnF.pad(hidden_TD, (0, 0, 0, missing)).view(chunk_tokens, chunks, -1).transpose(0, 1)
    labels_nc = nnF.pad(labels_T, (0, missing), value=ignore_index).view(chunk_tokens, chunks).T

    def body(constants: Tensors, carry: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
        logits_cV = x[0].to(acc) @ constants[0].T
        row_V = torch.arange(logits_cV.shape[1], device=logits_cV.device)
        picked_c = torch.where(row_V == x[1][:, None], logits_cV, 0.0).sum(1)
        return carry, (torch.where(x[1] == ignore_index, 0.0, logits_cV.logsumexp(1) - picked_c),)

    _, (nll_nc,) = chunk_loop(body, (weight_VD.to(acc),), (), (hidden_ncD, labels_nc), driver)
    return nll_nc.T.reshape(-1)[:T]
