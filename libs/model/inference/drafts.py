"""Drafts by the model's multi-token-prediction depths, over a window of the trunk's last hidden states.

Depth k joins the hidden state of depth k - 1 at a token with the embedding of the token k further on (`mtp`); the last
depth serves for every further draft. A draft may be anything, since the trunk verifies it, so the depths see only the
window and keep no keys or states of their own: nothing of theirs has to be rolled back.
"""
# M slots  W window  D hidden

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from libs.model.hybrid import HybridLM
from libs.model.mtp import MtpDepth

# Hidden states that a draft sees. Attention of a depth over more would draft a little better and cost more.
DRAFT_WINDOW = 32


class Drafter:
    """Per slot the hidden states (before the final norm) of the last completed tokens."""

    def __init__(self, model: HybridLM, max_batch: int) -> None:
        self._model = model
        self._depths = [depth for depth in model.mtp if isinstance(depth, MtpDepth)]
        assert self._depths, "a model without depths drafts nothing"
        weight = model.head_weight
        shape = (max_batch, DRAFT_WINDOW, model.config.hidden_size)
        self._hidden_MWD = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self._filled = [0] * max_batch

    @property
    def nbytes(self) -> int:
        return self._hidden_MWD.untyped_storage().nbytes()

    def clear(self, row: int) -> None:
        """Another request begins in this row."""
        self._filled[row] = 0

    def extend(self, row: int, hidden_SD: Tensor) -> None:
        """Hidden states of the next completed tokens of the request in this row."""
        old_D = self._hidden_MWD[row, : self._filled[row]]
        joined_SD = torch.cat([old_D, hidden_SD])[-DRAFT_WINDOW:]
        self._hidden_MWD[row, : len(joined_SD)] = joined_SD
        self._filled[row] = len(joined_SD)

    @torch.no_grad()
    def propose(self, row: int, text: Sequence[int], length: int) -> list[int]:
        """The `length` most likely tokens after `text`, whose last token alone has no hidden state yet."""
        n = self._filled[row]
        if n == 0:
            return []
        hidden_1ND, drafts = self._hidden_MWD[row, None, :n], list[int]()
        first = len(text) - 1 - n
        for ahead in range(1, length + 1):
            depth = self._depths[min(ahead, len(self._depths)) - 1]
            known = [*text, *drafts][first + ahead : first + ahead + n]
            tokens_1N = torch.tensor([known], device=hidden_1ND.device)
            context = self._model.pass_context(tokens_1N, None, offset=first)
            hidden_1ND = depth.join(hidden_1ND, self._model.embed(tokens_1N))
            for block in depth.blocks:
                hidden_1ND = block(hidden_1ND, context)
            logits_V = F.linear(depth.final_norm(hidden_1ND[0, -1]), self._model.head_weight)
            drafts.append(int(logits_V.argmax()))
        return drafts
