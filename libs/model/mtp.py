"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): depth k predicts the token k + 1
ahead.

Depth k joins the previous depth's hidden state at i with the embedding of token i + k; embedding and output
head are the trunk's. Nothing crosses a document boundary: neither an input embedding nor a target.
"""
# B sequences  S tokens  D hidden

from __future__ import annotations

import torch
from torch import Tensor, nn

from libs.model.block import ResidualBlock
from libs.model.config import ModelConfig
from libs.model.layers import Projection, RMSNorm, between_layers
from libs.model.pattern import LayerKind
from libs.parallel.mesh import Parallel

IGNORE = -100


class MtpDepth(nn.Module):
    """One depth: join [norm(hidden), norm(next embedding)], then its own blocks and final norm.

    The blocks are run by the caller, which owns activation checkpointing. `join_proj` works between layers: every
    tensor-parallel rank holds it whole, and under sequence parallelism joins its own tokens.
    """

    def __init__(self, config: ModelConfig, kinds: tuple[LayerKind, ...], parallel: Parallel | None = None) -> None:
        super().__init__()
        tokens = between_layers(parallel)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps, tokens)
        self.embedding_norm = RMSNorm(config.hidden_size, config.norm_eps, tokens)
        self.join_proj = Projection(2 * config.hidden_size, config.hidden_size, summed_over=tokens)
        self.blocks = nn.ModuleList(ResidualBlock(config, kind, parallel) for kind in kinds)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, tokens)

    def join(self, hidden_BSD: Tensor, embedding_BSD: Tensor) -> Tensor:
        """hidden at i, embedding of token i + k -> input of this depth's blocks."""
        pair = torch.cat([self.hidden_norm(hidden_BSD), self.embedding_norm(embedding_BSD)], dim=-1)
        out: Tensor = self.join_proj(pair)
        return out


def within_document(seq_len: int, ahead: int, bounds: list[int] | None, device: torch.device) -> Tensor:
    """(S,) bool: is token i + ahead still in the document of token i?"""
    edges = torch.tensor([seq_len] if bounds is None else bounds[1:], device=device)
    position_S = torch.arange(seq_len, device=device)
    end_S = edges[torch.searchsorted(edges, position_S, right=True)]
    return position_S + ahead < end_S


def shift(values_BS: Tensor, ahead: int, inside_S: Tensor, fill: int) -> Tensor:
    """values[:, i + ahead] at i, and `fill` where that lies outside the document."""
    shifted_BS = torch.full_like(values_BS, fill)
    kept = max(values_BS.shape[1] - ahead, 0)
    shifted_BS[:, :kept] = values_BS[:, ahead:]
    return torch.where(inside_S, shifted_BS, fill)
