"""Packed documents as tensors whose shapes do not depend on how many documents there are: for devices that compile.

Elsewhere boundaries are integers on the host (`layers.document_bounds`): backends cut rows there instead of masking.
"""
# B rows  S tokens

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Device types whose programs are compiled for shapes.
STATIC_DEVICES = frozenset({"xla"})


class PackedRows(NamedTuple):
    """Which document each token is in, and where in it.

    ids_BS: int32, rising along a row; None when every row is one document. positions: int32, (B,S) or (S,).
    """

    ids_BS: Tensor | None
    positions: Tensor

    def to(self, device: torch.device) -> PackedRows:
        """The same on a device."""
        return PackedRows(None if self.ids_BS is None else self.ids_BS.to(device), self.positions.to(device))

    def within(self, ahead: int) -> Tensor:
        """(B,S) or (S,) bool: is token i + ahead still in the document of token i?"""
        seq_len = self.positions.shape[-1]
        if self.ids_BS is None:
            return self.positions + ahead < seq_len
        kept = max(seq_len - ahead, 0)
        same = self.ids_BS[:, :kept] == self.ids_BS[:, seq_len - kept :]
        return torch.cat([same, torch.zeros_like(self.ids_BS[:, kept:], dtype=torch.bool)], dim=1)


def packed_rows(rows: int, seq_len: int, cu_seqlens: Tensor | None) -> PackedRows:
    """Of `rows` rows of `seq_len` tokens, on the CPU.

    Args:
        cu_seqlens: (n + 1,) boundaries counted over all rows laid end to end; every row begins a document.

    Raises:
        ValueError: boundaries that do not rise strictly from 0 to rows * seq_len, or not through every row's start.
    """
    if cu_seqlens is None:
        return PackedRows(None, torch.arange(seq_len, dtype=torch.int32))
    edges, total = cu_seqlens.detach().cpu().to(torch.int64).flatten(), rows * seq_len
    bounds = [int(edge) for edge in edges]
    rising = all(a < b for a, b in pairwise(bounds))
    if len(bounds) < 2 or (bounds[0], bounds[-1]) != (0, total) or not rising:
        shown = f"{bounds[:8]}{'...' if len(bounds) > 8 else ''}"
        raise ValueError(f"cu_seqlens must rise strictly from 0 to {total} ({rows} rows of {seq_len}), got {shown}")
    if crossed := sorted(set(range(0, total, seq_len)) - set(bounds)):
        raise ValueError(f"cu_seqlens: a document crosses from one row into the next at token {crossed[0]}")
    token = torch.arange(total)
    ids = torch.bucketize(token, edges[1:-1], right=True)
    positions = token - edges[ids]
    return PackedRows(ids.to(torch.int32).view(rows, seq_len), positions.to(torch.int32).view(rows, seq_len))
