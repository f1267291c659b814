"""The oracle of linear cross-entropy: log_softmax over whole logits, by autograd. Holds T x V."""
# T tokens  V vocabulary  D hidden

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy_reference(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int) -> Tensor:
    """Same result as `api.linear_cross_entropy`, operands already checked."""
    acc = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    log_probs_TV = (hidden_TD.to(acc) @ weight_VD.to(acc).T).log_softmax(-1)
    kept_T = labels_T != ignore_index
    picked_T = log_probs_TV.gather(1, torch.where(kept_T, labels_T, 0).long()[:, None])[:, 0]
    return torch.where(kept_T, -picked_T, 0.0)
