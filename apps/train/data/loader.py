# B batch (always 1), T tokens of this rank's windows
"""Batches for training in a seeded order with a global cursor, the same for any number of ranks.

For the training loop. Not for packing (see `libs.model.text.shards`), and no background threads: a window is
a few memory-mapped reads (`apps.train.prefetch` has one, for devices that never wait).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field

from libs.flags.errors import UserError
from libs.model.text.shards import PackedDataset, Window, seeded_permutation


class Cursor(BaseModel):
    """Where the next batch begins, for all ranks together.

    epoch: passes completed. index: windows of this epoch's order already delivered. token_offset: tokens of
    this epoch already delivered, always index * window; it is stored to be checked, because the same index
    means another place when the window has changed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = Field(default=0, ge=0)
    index: int = Field(default=0, ge=0)
    token_offset: int = Field(default=0, ge=0)


class Batch(NamedTuple):
    """One rank's part of a batch.

    tokens, labels: (1, T) int64 tensors on the CPU, T = windows of this rank x window; labels -100 where
    there is nothing to predict. cu_seqlens: (n+1,) int32, documents never cross windows. n_bytes: bytes that
    the labels stand for. cursor_after: where the next batch begins (the same on every rank). window_ids:
    dataset indices. moved: tokens and labels where the model takes them from, if they are there already.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    n_bytes: int
    cursor_after: Cursor
    window_ids: tuple[int, ...]
    moved: tuple[torch.Tensor, torch.Tensor] | None = None


class BatchLoader:
    """Endless batches of `windows_per_batch` windows over all ranks together; a batch may span two epochs.

    Rank r of w takes the r-th of w equal consecutive parts of each batch, so that the batch, and with it the
    training run, is the same for every w.

    Raises:
        UserError: windows_per_batch not divisible by world_size, or a cursor of another packing.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        windows_per_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        cursor: Cursor | None = None,
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        if windows_per_batch < 1 or windows_per_batch % world_size:
            raise UserError(
                f"{windows_per_batch} windows per batch cannot be shared by {world_size} ranks; "
                f"use a positive multiple of {world_size}"
            )
        self.dataset, self.windows_per_batch, self.seed = dataset, windows_per_batch, seed
        self.rank, self.world_size = rank, world_size
        self._cursor = self._checked(cursor if cursor is not None else Cursor())
        self._order = lru_cache(maxsize=2)(self._order_of)

    @property
    def cursor(self) -> Cursor:
        """Where the next batch begins."""
        return self._cursor

    def close(self) -> None:
        """Nothing is held between batches."""

    def next_batch(self) -> Batch:
        """The next batch; moves the cursor."""
        n = len(self.dataset)
        first = self._cursor.epoch * n + self._cursor.index
        share = self.windows_per_batch // self.world_size
        mine = range(first + self.rank * share, first + (self.rank + 1) * share)
        ids = tuple(int(self._order(position // n)[position % n]) for position in mine)
        epoch, index = divmod(first + self.windows_per_batch, n)
        after = Cursor(epoch=epoch, index=index, token_offset=index * self.dataset.window)
        batch = self._collate([self.dataset[i] for i in ids], after, ids)
        self._cursor = after
        return batch

    def _collate(self, windows: list[Window], after: Cursor, ids: tuple[int, ...]) -> Batch:
        tokens = np.concatenate([window.tokens for window in windows])
        labels = np.concatenate([window.labels for window in windows])
        width = self.dataset.window
        bounds = [window.cu_seqlens[:-1] + i * width for i, window in enumerate(windows)]
        cu_seqlens = np.concatenate([*bounds, [len(windows) * width]]).astype(np.int32)
        n_bytes = int(self.dataset.tokenizer.token_bytes[labels[labels >= 0]].sum(dtype=np.int64))
        return Batch(
            tokens=torch.from_numpy(tokens)[None],
            labels=torch.from_numpy(labels)[None],
            cu_seqlens=torch.from_numpy(cu_seqlens),
            n_bytes=n_bytes,
            cursor_after=after,
            window_ids=ids,
        )

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        return seeded_permutation(len(self.dataset), self.seed, epoch)

    def _checked(self, cursor: Cursor) -> Cursor:
        n, width = len(self.dataset), self.dataset.window
        if cursor.index >= n or cursor.token_offset != cursor.index * width:
            raise UserError(
                f"cursor {cursor.model_dump()} does not fit this packing ({n} windows of {width} tokens per "
                f"epoch); resume with the data, window and seed the run began with"
            )
        return cursor
