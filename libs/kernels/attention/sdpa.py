"""Attention through torch's fused SDPA, one call per packed document: no mask is built and no masked score
computed.

One call per document beats one call with a block mask as soon as a window holds two documents, because the
work is quadratic in the length of each call. Not for thousands of tiny documents on a GPU: each call is one
launch.
"""
# B sequences  S query tokens  T key tokens  H query heads  G key/value heads  D head width

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_sdpa(
    q_BSHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, bounds: list[int] | None, causal: bool, scale: float
) -> Tensor:
    """Same arguments and result as `api.attention`, already checked."""
    q_BHSD, k_BGTD, v_BGTD = (tensor.transpose(1, 2) for tensor in (q_BSHD, k_BTGD, v_BTGD))
    grouped = q_BHSD.shape[1] != k_BGTD.shape[1]

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    if bounds is None or len(bounds) == 2:
        return one(q_BHSD, k_BGTD, v_BGTD)
    lengths = [b - a for a, b in pairwise(bounds)]
    parts = (torch.split(tensor, lengths, dim=2) for tensor in (q_BHSD, k_BGTD, v_BGTD))
    return torch.cat([one(*piece) for piece in zip(*parts, strict=True)], dim=1)
