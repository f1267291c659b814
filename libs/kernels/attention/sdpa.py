"""Attention through torch's fused SDPA, one call per packed document: no mask is built and no masked score
computed.

One call per document beats one call with a block mask as soon as a window holds two documents, because the
work is quadratic in the length of each call. Not for thousands of tiny documents on a GPU: each call is one
launch. Only queries that continue a document (fewer queries than keys) need a mask, made for a block of them at a time.
"""
# B sequences  S query tokens  T key tokens  H query heads  G key/value heads  D head width

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries per call when they are fewer than the keys: bounds the mask at this many rows.
QUERY_BLOCK = 1024


def attention_sdpa(
    q_BSHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, bounds: list[int] | None, causal: bool, scale: float
) -> Tensor:
    """Same arguments and result as `api.attention`, already checked."""
    q_BHSD, k_BGTD, v_BGTD = (tensor.transpose(1, 2) for tensor in (q_BSHD, k_BTGD, v_BTGD))
    grouped = q_BHSD.shape[1] != k_BGTD.shape[1]
    if causal and q_BHSD.shape[2] != k_BGTD.shape[2]:
        return _continued(q_BHSD, k_BGTD, v_BGTD, scale, grouped)

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    if bounds is None or len(bounds) == 2:
        return one(q_BHSD, k_BGTD, v_BGTD)
    lengths = [b - a for a, b in pairwise(bounds)]
    parts = (torch.split(tensor, lengths, dim=2) for tensor in (q_BHSD, k_BGTD, v_BGTD))
    return torch.cat([one(*piece) for piece in zip(*parts, strict=True)], dim=1)


def _continued(q_BHSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float, grouped: bool) -> Tensor:
    """Causal attention of the last S of T tokens. torch's `is_causal` counts from the first key, so it does not fit."""
    S, T = q_BHSD.shape[2], k_BGTD.shape[2]
    outputs = []
    for first in range(0, S, QUERY_BLOCK):
        end = min(first + QUERY_BLOCK, S)
        keys = T - S + end
        visible = torch.ones(end - first, keys, dtype=torch.bool, device=q_BHSD.device).tril(T - S + first)
        outputs.append(
            F.scaled_dot_product_attention(
                q_BHSD[:, :, first:end], k_BGTD[:, :, :keys], v_BGTD[:, :, :keys], attn_mask=visible, scale=scale,
                enable_gqa=grouped,
            )
        )  # fmt: skip
    return torch.cat(outputs, dim=2).transpose(1, 2)
