"""The oracle of attention: every score and every mask written out. fp64-capable; O(S*T) memory."""
# B sequences  S query tokens  T key tokens  H query heads  G key/value heads  D head width

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(
    q_BSHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, bounds: list[int] | None, causal: bool, scale: float
) -> Tensor:
    """Same arguments and result as `api.attention`, already checked; accumulates in fp32 (fp64 for fp64)."""
    acc = torch.float64 if q_BSHD.dtype == torch.float64 else torch.float32
    S, H = q_BSHD.shape[1:3]
    T, G = k_BTGD.shape[1:3]
    k_BTHD = k_BTGD.repeat_interleave(H // G, dim=2).to(acc)
    v_BTHD = v_BTGD.repeat_interleave(H // G, dim=2).to(acc)
    scores_BHST = torch.einsum("bshd,bthd->bhst", q_BSHD.to(acc), k_BTHD) * scale
    visible_ST = torch.ones(S, T, dtype=torch.bool, device=q_BSHD.device)
    if causal:
        visible_ST = visible_ST.tril(T - S)  # the queries are the last S of the tokens
    if bounds is not None:
        lengths = torch.tensor(bounds, device=q_BSHD.device).diff()
        document_S = torch.arange(len(lengths), device=q_BSHD.device).repeat_interleave(lengths)
        visible_ST = visible_ST & (document_S[:, None] == document_S[None, :])
    weights_BHST = scores_BHST.masked_fill(~visible_ST, float("-inf")).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights_BHST, v_BTHD).to(q_BSHD.dtype)
