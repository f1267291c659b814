"""The two small modules every block is made of, and what a forward pass tells all of them.

Not a place for blocks themselves: those are `mixer`, `attention`, `mlp` and `block`.
"""
# B sequences  S tokens  D hidden  E rotary pairs (head_dim / 2)

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libs.model.packing import PackedRows
from libs.parallel.context import ContextShard
from libs.parallel.mesh import Group, Parallel
from libs.parallel.tensor import sum_gradient

Role = Literal["input", "output"]


class ForwardContext(NamedTuple):
    """What every block of one forward pass shares.

    Attributes:
        cu_seqlens: (n + 1,) document boundaries of a packed row, None when each row is one document.
        bounds: the same as Python integers, read from the device once per pass.
        rope: cos and sin, each (S, E) or (B, S, E), of positions that restart at every document; None without
            attention.
        mimo_backend, attention_backend: resolved names, never "auto"; None where the pattern has no such
            layer.
        seq_len: S, the tokens a layer works on; between layers sequence parallelism holds fewer.
        cp: this rank's slice of the row under context parallelism; `rope` and `seq_len` are then the slice's, and the
            boundaries the whole row's.
        packed: on devices that compile for shapes, in place of `cu_seqlens` and `bounds`, which are None there.
    """

    cu_seqlens: Tensor | None
    bounds: list[int] | None
    rope: tuple[Tensor, Tensor] | None
    mimo_backend: str | None
    attention_backend: str | None
    seq_len: int
    cp: ContextShard | None = None
    packed: PackedRows | None = None

    @property
    def document_ids(self) -> Tensor | None:
        """(B, S) numbers of the documents where operators take them as a tensor of static shape."""
        return None if self.packed is None else self.packed.ids_BS

    def apart(self) -> tuple[tuple[Tensor, ...], Callable[[tuple[Tensor, ...]], ForwardContext]]:
        """The tensors that blocks read, and what makes the context again from as many others. It holds none itself: for
        loops, which must be handed every tensor. Of devices that compile for shapes only."""
        assert self.packed is not None, "static shapes"
        ids_BS, positions = self.packed
        has_rope, has_ids, rest = self.rope is not None, ids_BS is not None, self._replace(rope=None, packed=None)

        def together(tensors: tuple[Tensor, ...]) -> ForwardContext:
            left = iter(tensors)
            packed = PackedRows(next(left) if has_ids else None, next(left))
            return rest._replace(packed=packed, rope=(next(left), next(left)) if has_rope else None)

        return tuple(u for u in (ids_BS, positions, *(self.rope or ())) if u is not None), together

    def mine(self, u_BS: Tensor) -> Tensor:
        """This rank's tokens of a tensor of the whole row."""
        return u_BS if self.cp is None else self.cp.cut(u_BS)


class Projection(nn.Linear):
    """A linear map without bias, left uninitialised until `init` fills it by role.

    role: "output" for the last map of a residual block, which is scaled down by depth; "input" for all
    others. summed_over: see `RMSNorm`.
    """

    def __init__(
        self, in_features: int, out_features: int, role: Role = "input", summed_over: Group | None = None
    ) -> None:
        self.role: Role = role
        super().__init__(in_features, out_features, bias=False)
        self.summed_over = summed_over

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, sum_gradient(self.weight, self.summed_over))

    def segments(self, x: Tensor, widths: Sequence[int]) -> tuple[Any, ...]:
        """The output as consecutive tensors of these widths: what the caller of a packed projection wants."""
        return torch.split(self(x), list(widths), dim=-1)

    def reset_parameters(self) -> None:
        """Nothing: see `libs.model.init`."""


class TokenEmbedding(nn.Embedding):
    """A table of embeddings, left uninitialised until `init` fills it."""

    def reset_parameters(self) -> None:
        """Nothing: see `libs.model.init`."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in x's dtype with statistics in fp32 or better.

    summed_over: the ranks that hold this same weight and each see a part of its gradient; None when all see all.
    """

    def __init__(self, width: int, eps: float, summed_over: Group | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.summed_over = summed_over

    def forward(self, x: Tensor) -> Tensor:
        weight = sum_gradient(self.weight, self.summed_over)
        return F.rms_norm(x, self.weight.shape, weight.to(x.dtype), self.eps)


def between_layers(parallel: Parallel | None) -> Group | None:
    """Over whom weights used between layers sum their gradients: each rank sees its tokens only, if at all."""
    return parallel.tp if parallel is not None and parallel.shards_tokens else None


def at_least_fp32(tensor: Tensor) -> Tensor:
    """fp32, or fp64 unchanged."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rope_tables(positions_S: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (S, head_dim / 2), of position * theta^(-2e / head_dim) (Su et al. 2021); (B, S) gives
    (B, S, head_dim / 2)."""
    exponent_E = torch.arange(0, head_dim, 2, device=positions_S.device, dtype=dtype) / head_dim
    angle_SE = positions_S.to(dtype)[..., None] * torch.pow(theta, -exponent_E)
    return angle_SE.cos(), angle_SE.sin()


def document_bounds(tokens_BS: Tensor, cu_seqlens: Tensor | None) -> list[int] | None:
    """Boundaries as Python integers, 0 = b_0 < ... < b_n = S; None when every row is one document.

    Raises:
        ValueError: tokens that are not (B, S) with S >= 1, or boundaries that do not fit them.
    """
    if tokens_BS.dim() != 2 or tokens_BS.shape[1] == 0:
        raise ValueError(f"tokens must be (B,S) with S >= 1, got {tuple(tokens_BS.shape)}")
    if cu_seqlens is None:
        return None
    bounds = [int(bound) for bound in cu_seqlens.flatten().tolist()]
    rising = all(a < b for a, b in pairwise(bounds))
    if tokens_BS.shape[0] != 1 or len(bounds) < 2 or (bounds[0], bounds[-1]) != (0, tokens_BS.shape[1]) or not rising:
        shown = f"{bounds[:8]}{'...' if len(bounds) > 8 else ''}"
        raise ValueError(
            f"cu_seqlens must rise strictly from 0 to S with B=1: got {shown} for {tuple(tokens_BS.shape)}"
        )
    return bounds


def document_positions(seq_len: int, bounds: list[int] | None, device: torch.device) -> Tensor:
    """(S,) position of each token inside its own document."""
    positions_S = torch.arange(seq_len, device=device)
    if bounds is None:
        return positions_S
    edges = torch.tensor(bounds, device=device)
    return positions_S - edges[:-1].repeat_interleave(edges.diff(), output_size=seq_len)
