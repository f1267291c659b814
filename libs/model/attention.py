"""The attention layer: projections, rotary positions that restart at every document, and its decode state.

Not the operator itself (libs.kernels.attention), and not paged decode: the state here grows by copying.
"""
# B sequences  S tokens  T cached tokens  H query heads  G key/value heads  D hidden  K head width  E rotary
# pairs

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from libs.kernels.attention import attention
from libs.model.config import AttentionConfig
from libs.model.layers import ForwardContext, Projection
from libs.model.sharding import local_attention
from libs.parallel.context import attention_context
from libs.parallel.mesh import Parallel


class KvState(NamedTuple):
    """Keys (rotated) and values of the tokens so far, each (B, T, G, K)."""

    k: Tensor
    v: Tensor


def rotate(x_BSHK: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (e, e + K/2): (a, b) -> (a cos - b sin, a sin + b cos), keeping the dtype."""
    cos_S1E, sin_S1E = (table_SE.unsqueeze(-2) for table_SE in rope)
    a, b = x_BSHK.chunk(2, dim=-1)
    return torch.cat([a * cos_S1E - b * sin_S1E, a * sin_S1E + b * cos_S1E], dim=-1).to(x_BSHK.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention, no biases. A tensor-parallel rank holds heads of its own: a partial sum."""

    def __init__(self, hidden_size: int, config: AttentionConfig, parallel: Parallel | None = None) -> None:
        super().__init__()
        if parallel is not None:
            config = local_attention(config, parallel.tp.size)
        self.nheads, self.kv_heads, self.head_dim = config.nheads, config.kv_heads, config.head_dim
        self.qkv = Projection(hidden_size, (config.nheads + 2 * config.kv_heads) * config.head_dim)
        self.out = Projection(config.nheads * config.head_dim, hidden_size, role="output")

    def project(self, x_BSD: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, S, H, K), keys and values (B, S, G, K); queries and keys rotated to their positions."""
        assert context.rope is not None, "a pattern with '*' computes rotary tables once per pass"
        heads = self.nheads + self.kv_heads
        packed = self.qkv(x_BSD).unflatten(-1, (heads + self.kv_heads, self.head_dim))
        # Queries and keys rotate together: one pass over memory instead of two.
        qk = rotate(packed[:, :, :heads], context.rope)
        return qk[:, :, : self.nheads], qk[:, :, self.nheads :], packed[:, :, heads:]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext, causal: bool = True) -> Tensor:
        """(B, S, H, K) before the output projection; with more keys than queries these are the last tokens."""
        assert context.attention_backend is not None, "a pattern with '*' resolves its backend"
        if context.cp is not None:
            return attention_context(q, k, v, shard=context.cp, backend=context.attention_backend)
        return attention(
            q, k, v, cu_seqlens=context.bounds, causal=causal, backend=context.attention_backend,
            document_ids=context.document_ids,
        )  # fmt: skip

    def output(self, y_BSHK: Tensor) -> Tensor:
        """The output projection (B, S, D) of what `attend` gave."""
        out_BSD: Tensor = self.out(y_BSHK.flatten(2))
        return out_BSD

    def forward(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        return self.output(self.attend(*self.project(x_BSD, context), context))

    def prefill(self, x_BSD: Tensor, context: ForwardContext, state: KvState | None = None) -> tuple[Tensor, KvState]:
        """As forward, after the tokens of an earlier `state` if one is given (`context` then counts from there)."""
        q, k, v = self.project(x_BSD, context)
        if state is not None:
            k, v = torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1)
        return self.output(self.attend(q, k, v, context)), KvState(k, v)

    def step(self, x_B1D: Tensor, context: ForwardContext, state: KvState) -> tuple[Tensor, KvState]:
        q, k, v = self.project(x_B1D, context)
        state = KvState(torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1))
        return self.output(self.attend(q, state.k, state.v, context, causal=False)), state
