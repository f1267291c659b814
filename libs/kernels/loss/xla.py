"""Linear cross-entropy for XLA devices: a loop over chunks of tokens with static shapes, recomputed backward.

Same result as `chunked`, which writes into buffers and would be unrolled chunk by chunk into an XLA graph.
"""
# T tokens  V vocabulary  D hidden  p parts of the mesh's rows  n chunks of c tokens of a part

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnF

from libs.kernels.chunk_loop import Driver, Tensors, chunk_loop, row_parts
from libs.kernels.loss.chunked import accumulation_dtype


def linear_cross_entropy_xla(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int, chunk_tokens: int, *,
    driver: Driver = "scan",
) -> Tensor:  # fmt: skip
    """Same arguments and result as `api.linear_cross_entropy`, already checked.

    Where a mesh shares out rows, a chunk has `chunk_tokens` of each part, and the weight a copy for each.
    """
    acc, T = accumulation_dtype(hidden_TD.dtype), hidden_TD.shape[0]
    parts = row_parts(driver)
    parts = parts if T % parts == 0 else 1
    chunk_tokens = min(chunk_tokens, max(1, T // parts))
    chunks = -(-T // (parts * chunk_tokens))
    missing = chunks * chunk_tokens - T // parts
    hidden_pnD = nnF.pad(hidden_TD.view(parts, T // parts, -1), (0, 0, 0, missing))
    labels_pn = nnF.pad(labels_T.view(parts, -1), (0, missing), value=ignore_index)
    hidden_npcD = hidden_pnD.view(parts, chunks, chunk_tokens, -1).transpose(0, 1)
    labels_npc = labels_pn.view(parts, chunks, chunk_tokens).transpose(0, 1)

    def body(constants: Tensors, carry: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
        logits_pcV = x[0].to(acc) @ constants[0].transpose(1, 2)
        row_V = torch.arange(logits_pcV.shape[-1], device=logits_pcV.device)
        picked_pc = torch.where(row_V == x[1][..., None], logits_pcV, 0.0).sum(-1)
        return carry, (torch.where(x[1] == ignore_index, 0.0, logits_pcV.logsumexp(-1) - picked_pc),)

    weight_pVD = weight_VD.to(acc).expand(parts, -1, -1)
    _, (nll_npc,) = chunk_loop(body, (weight_pVD,), (), (hidden_npcD, labels_npc), driver)
    return nll_npc.transpose(0, 1).reshape(parts, -1)[:, : T // parts].reshape(T)
