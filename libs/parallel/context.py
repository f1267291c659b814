"""Context parallelism: one sequence cut into contiguous slices, one per rank, and what has to cross the cuts.

The scan hands over its state (O(state) numbers, whatever the length); attention gathers keys and values. Not for the
mathematics of the hand-over (libs.kernels.mimo.handover), nor for cutting layers (`tensor`, `sequence`).
"""
# B sequences  S tokens of this rank's slice  T tokens of the whole row  H heads  G groups  R rank  N state
# P head width  A rotary angles  D attention head width

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from libs.flags.errors import UserError
from libs.kernels.attention import attention
from libs.kernels.mimo import Dims, MimoInputs, MimoState, mamba3_mimo
from libs.kernels.mimo.handover import SliceSummary, fold, summarize
from libs.kernels.mimo.shapes import check_inputs
from libs.parallel.mesh import Group


def slice_offsets(total: int, size: int, *, multiple: int = 1) -> tuple[int, ...]:
    """size + 1 rising offsets that cut `total` tokens into contiguous slices of about equal length.

    Args:
        multiple: inner cuts fall on multiples of it (a chunk size keeps the chunk grid of one rank).

    Raises:
        UserError: there are not enough tokens for every rank to get some.
    """
    units = -(-total // multiple)
    if units < size:
        raise UserError(
            f"context parallel size {size}: {total} tokens are only {units} blocks of {multiple}, and every rank "
            f"needs one; use at most {max(units, 1)} ranks or at least {(size - 1) * multiple + 1} tokens"
        )
    return tuple(min(total, multiple * (units * rank // size)) for rank in range(size + 1))


@dataclass(frozen=True, eq=False)
class ContextShard:
    """This rank's place in one row of tokens. The same on every rank of the group but for `group.rank`.

    Attributes:
        group: the context-parallel group.
        offsets: size + 1 rising offsets into the row; rank r holds tokens [offsets[r], offsets[r + 1]).
        bounds: document boundaries of the whole row, 0 = b_0 < ... < b_n = T (then B is 1); None when every row is one
            document.
    """

    group: Group
    offsets: tuple[int, ...]
    bounds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        total, cuts = self.offsets[-1], self.offsets
        assert len(cuts) == self.group.size + 1, f"{len(cuts) - 1} slices for {self.group.size} ranks"
        assert cuts[0] == 0, "the first slice starts at token 0"
        assert all(a < b for a, b in itertools.pairwise(cuts)), f"a slice is empty: {cuts}"
        if self.bounds is not None:
            assert (self.bounds[0], self.bounds[-1]) == (0, total), "boundaries must span the whole row"

    @property
    def start(self) -> int:
        """First token of this rank."""
        return self.offsets[self.group.rank]

    @property
    def stop(self) -> int:
        """One past the last token of this rank."""
        return self.offsets[self.group.rank + 1]

    @property
    def longest(self) -> int:
        """Tokens of the longest slice."""
        return max(b - a for a, b in itertools.pairwise(self.offsets))

    def cut(self, u: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a tensor of the whole row (a view)."""
        assert u.shape[dim] == self.offsets[-1], f"{u.shape[dim]} tokens along {dim}, the row has {self.offsets[-1]}"
        return u.narrow(dim, self.start, self.stop - self.start)

    def starts_document(self, rank: int) -> bool:
        """Does the slice of `rank` begin with the first token of a document?"""
        return self.offsets[rank] in (self.bounds or (0,))

    def inner(self, rank: int) -> tuple[int, ...]:
        """Document starts strictly inside the slice of `rank`, counted from its own first token."""
        first, end = self.offsets[rank], self.offsets[rank + 1]
        return tuple(bound - first for bound in self.bounds or () if first < bound < end)

    def passes(self, rank: int) -> bool:
        """Does what enters the slice of `rank` also leave it: no document starts in it?"""
        return not self.starts_document(rank) and not self.inner(rank)

    @property
    def crossing(self) -> bool:
        """Does any document of the row lie on two ranks? If not, nothing has to be exchanged; all ranks know it."""
        return not all(self.starts_document(rank) for rank in range(self.group.size))

    @property
    def document_start(self) -> int:
        """Offset in the row of the first token of the document that this rank's first token belongs to."""
        return max(bound for bound in self.bounds or (0,) if bound <= self.start)

    def local_bounds(self) -> list[int]:
        """Boundaries of the (parts of) documents in this slice, from 0 to its length."""
        return [0, *self.inner(self.group.rank), self.stop - self.start]


class _HandOver(torch.autograd.Function):
    """All ranks' summaries -> the state that enters this rank's slice; one all-gather, and back one reduce-scatter.

    One Function and not a gather followed by torch operations: every rank then takes part in the backward exchange,
    also the first one, whose entering state depends on nobody.
    """

    @staticmethod
    def forward(ctx: Any, shard: ContextShard, dims: Dims, divisor: int, psi: Tensor, *parts: Tensor) -> Any:
        rows = shard.group.all_gather(torch.cat([part.flatten() for part in parts]))
        ctx.shard, ctx.dims, ctx.divisor = shard, dims, divisor
        ctx.save_for_backward(rows, psi)
        return tuple(part.contiguous() for part in _entering(shard, dims, divisor, rows, psi))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_state: Tensor) -> tuple[Any, ...]:
        rows, psi = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            state = _entering(ctx.shard, ctx.dims, ctx.divisor, rows, psi)
        pairs = [(part, d) for part, d in zip(state, d_state, strict=True) if part.requires_grad]
        d_rows, d_psi = torch.zeros_like(rows), torch.zeros_like(psi)
        if pairs:
            outputs, d_outputs = zip(*pairs, strict=True)
            d_rows, d_psi = torch.autograd.grad(outputs, (rows, psi), d_outputs, materialize_grads=True)
        d_mine = ctx.shard.group.reduce_scatter(d_rows)
        return (None, None, None, d_psi, *_unpack(d_mine, ctx.dims))


def _unpack(flat: Tensor, dims: Dims) -> SliceSummary:
    shapes = SliceSummary.shapes(dims)
    parts = torch.split(flat, [torch.Size(shape).numel() for shape in shapes])
    return SliceSummary(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))


def _entering(shard: ContextShard, dims: Dims, divisor: int, rows: Tensor, psi: Tensor) -> MimoState:
    """The state entering this rank's slice: zero where a document starts with it."""
    zero = MimoState.zeros(dims.B, dims.H, dims.P, dims.N, dims.R, dims.A, rows.device, rows.dtype)
    rank = shard.group.rank
    if shard.starts_document(rank):
        return zero
    summaries = [_unpack(row, dims) for row in rows[:rank]]
    # Also in backward, which may run under autocast: it would round the state to bf16.
    with torch.autocast(rows.device.type, enabled=False):
        return fold(zero, summaries, [shard.passes(before) for before in range(rank)], psi, divisor)


_TOKEN_AXIS = {"q": 1, "k": 1, "v": 1, "angles": 1, "z": 1, "adt": 2, "dt": 2, "trap": 2}


def _split_tokens(inputs: MimoInputs, lengths: Sequence[int]) -> list[MimoInputs]:
    """The operands cut along tokens; parameters are passed through."""
    pieces = {
        name: torch.split(tensor, list(lengths), axis)
        for name, axis in _TOKEN_AXIS.items()
        if (tensor := getattr(inputs, name)) is not None
    }
    return [inputs._replace(**{name: cut[i] for name, cut in pieces.items()}) for i in range(len(lengths))]


def mamba3_mimo_context(
    Q: Tensor, K: Tensor, V: Tensor, ADT: Tensor, DT: Tensor, Trap: Tensor, Q_bias: Tensor, K_bias: Tensor,
    MIMO_V: Tensor, MIMO_Z: Tensor | None, MIMO_Out: Tensor | None, Angles: Tensor, D: Tensor | None,
    Z: Tensor | None, chunk_size: int, rotary_dim_divisor: int, dtype: torch.dtype | None, *,
    shard: ContextShard, norm_weight: Tensor | None = None, norm_eps: float = 1e-5, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """`libs.kernels.mimo.mamba3_mimo` of a whole row, of which every rank holds one slice of the tokens.

    Two passes: each rank summarises its slice as if nothing came before (`handover.summarize`), the summaries are
    exchanged in one all-gather of O(state), and the ordinary scan runs from the state that really enters. Backward
    exchanges the gradients of the summaries in one reduce-scatter of the same size.

    Args:
        Q .. Z: operands as in `mamba3_mimo`, of this rank's tokens only; parameters are the same on every rank, and
            their gradients are this rank's share: the sum over the group is the whole gradient.
        shard: where the slice lies, and the document boundaries of the whole row.

    Returns:
        (B,S,H,P), or (B,S,R,H,P) when MIMO_Out is None: the outputs of this rank's tokens.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run here.
    """
    inputs = MimoInputs(
        q=Q, k=K, v=V, adt=ADT, dt=DT, trap=Trap, q_bias=Q_bias, k_bias=K_bias, mimo_v=MIMO_V, angles=Angles,
        mimo_z=MIMO_Z, mimo_out=MIMO_Out, d=D, z=Z, norm_weight=norm_weight,
    )  # fmt: skip
    dims = check_inputs(inputs, rotary_dim_divisor)
    _check_slice(dims.B, dims.S, shard)

    def scan(part: MimoInputs, bounds: Sequence[int], state: MimoState | None) -> Tensor:
        edges = torch.tensor(bounds, dtype=torch.int32, device=V.device) if len(bounds) > 2 else None
        return mamba3_mimo(
            part.q, part.k, part.v, part.adt, part.dt, part.trap, part.q_bias, part.k_bias, part.mimo_v, part.mimo_z,
            part.mimo_out, part.angles, part.d, part.z, chunk_size, rotary_dim_divisor, dtype, False, edges,
            initial_state=state, norm_weight=part.norm_weight, norm_eps=norm_eps, backend=backend,
        )  # fmt: skip

    bounds = shard.local_bounds()
    if not shard.crossing:
        return scan(inputs, bounds, None)
    entering = _exchange(inputs, dims, rotary_dim_divisor, bounds, shard)
    if len(bounds) == 2:
        return scan(inputs, bounds, entering)
    # Only the first document can be continued; the others are an ordinary packed row.
    head, rest = _split_tokens(inputs, [bounds[1], bounds[-1] - bounds[1]])
    later = [bound - bounds[1] for bound in bounds[1:]]
    return torch.cat([scan(head, (0, bounds[1]), entering), scan(rest, later, None)], dim=1)


def _exchange(inputs: MimoInputs, dims: Dims, divisor: int, bounds: Sequence[int], shard: ContextShard) -> MimoState:
    """The state entering this slice. Only the slice's last document is summarised: nothing else leaves it."""
    last = _split_tokens(inputs, [bounds[-2], bounds[-1] - bounds[-2]])[1]
    # As in the scan itself: autocast would round the state to bf16.
    with torch.autocast(inputs.v.device.type, enabled=False):
        summary = summarize(last, dims._replace(S=bounds[-1] - bounds[-2]), divisor)
        parts = _HandOver.apply(shard, dims, divisor, inputs.mimo_v, *summary)  # type: ignore[no-untyped-call]
    return MimoState(*parts)


def _check_slice(rows: int, tokens: int, shard: ContextShard) -> None:
    if tokens != shard.stop - shard.start:
        raise ValueError(
            f"rank {shard.group.rank} of {shard.group.size} holds tokens {shard.start} to {shard.stop} of the row, "
            f"got {tokens} tokens"
        )
    if shard.bounds is not None and rows != 1:
        raise ValueError(f"document boundaries pack documents into one row: B must be 1, got B={rows}")


class _GatherRow(torch.autograd.Function):
    """(B,S,...) of every rank -> (B,T,...) of the whole row; backward sums every rank's gradient of my tokens."""

    @staticmethod
    def forward(ctx: Any, shard: ContextShard, u: Tensor) -> Tensor:
        ctx.shard = shard
        padded = u.new_zeros(u.shape[0], shard.longest, *u.shape[2:])
        padded[:, : u.shape[1]] = u
        rows = shard.group.all_gather(padded)
        lengths = [b - a for a, b in itertools.pairwise(shard.offsets)]
        return torch.cat([row[:, :length] for row, length in zip(rows, lengths, strict=True)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_whole: Tensor) -> tuple[None, Tensor]:
        shard: ContextShard = ctx.shard
        rows = d_whole.new_zeros(shard.group.size, d_whole.shape[0], shard.longest, *d_whole.shape[2:])
        for row, (first, end) in zip(rows, itertools.pairwise(shard.offsets), strict=True):
            row[:, : end - first] = d_whole[:, first:end]
        return None, shard.group.reduce_scatter(rows)[:, : shard.stop - shard.start]


def gather_row(u_BSx: Tensor, shard: ContextShard) -> Tensor:
    """(B,T,...): the whole row from every rank's slice, on every rank. Differentiable."""
    whole: Tensor = _GatherRow.apply(shard, u_BSx)  # type: ignore[no-untyped-call]
    return whole


def attention_context(
    q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, shard: ContextShard, scale: float | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Causal `libs.kernels.attention.attention` of a whole row, of which every rank holds one slice of the tokens.

    Keys and values are gathered in one exchange (2 T G D numbers), their gradients reduce-scattered in one. A query
    sees its own document only. Under contiguous slices the last rank has the most keys to look at.

    Args:
        q_BSHD, k_BSGD, v_BSGD: of this rank's tokens, rotary positions already applied; positions count from the
            start of the document, wherever it lies.

    Returns:
        (B,S,H,D) in q's dtype.
    """
    _check_slice(q_BSHD.shape[0], q_BSHD.shape[1], shard)
    bounds = shard.local_bounds()
    if not shard.crossing:
        return attention(q_BSHD, k_BSGD, v_BSGD, cu_seqlens=_packed(bounds), scale=scale, backend=backend)
    width = k_BSGD.shape[-1]
    whole_BT = gather_row(torch.cat([k_BSGD, v_BSGD], dim=-1), shard)
    # All ranks read their keys from the gathered row, the first one too: all must take part in the way back.
    seen = whole_BT[:, shard.document_start : shard.start + bounds[1]]
    head = attention(q_BSHD[:, : bounds[1]], seen[..., :width], seen[..., width:], scale=scale, backend=backend)
    if len(bounds) == 2:
        return head
    later = [bound - bounds[1] for bound in bounds[1:]]
    q, k, v = (u[:, bounds[1] :] for u in (q_BSHD, k_BSGD, v_BSGD))
    return torch.cat([head, attention(q, k, v, cu_seqlens=_packed(later), scale=scale, backend=backend)], dim=1)


def _packed(bounds: list[int]) -> list[int] | None:
    """Boundaries for an operator that wants B = 1 with them: None for a single document."""
    return bounds if len(bounds) > 2 else None
