"""The order is one for any number of ranks, every window comes once per epoch, and every cursor resumes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apps.train.data.loader import Batch, BatchLoader, Cursor
from libs.flags.errors import UserError
from libs.model.text.shards import DataDir, PackedDataset


@pytest.fixture
def dataset(repositories: Path, tmp_path: Path, build: object) -> PackedDataset:
    assert callable(build)
    assert build(repositories, tmp_path / "out", "--max-bytes", 9_000, "--mix", "file=1") == 0
    return PackedDataset(DataDir.open(tmp_path / "out"), "train", 500, 0)


def batches(loader: BatchLoader, count: int) -> list[Batch]:
    return [loader.next_batch() for _ in range(count)]


def assert_equal(got: Batch, want: Batch) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_each_epoch_has_every_window_once_in_its_own_order(dataset: PackedDataset) -> None:
    n = len(dataset)
    assert n > 8
    order = [b.window_ids[0] for b in batches(BatchLoader(dataset, windows_per_batch=1, seed=0), 2 * n)]
    assert sorted(order[:n]) == sorted(order[n:]) == list(range(n))
    assert order[:n] != order[n:]
    assert order[:n] != list(range(n))
    other = [b.window_ids[0] for b in batches(BatchLoader(dataset, windows_per_batch=1, seed=1), n)]
    assert other != order[:n]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_together_see_what_one_rank_sees(dataset: PackedDataset, world_size: int) -> None:
    one = BatchLoader(dataset, windows_per_batch=6, seed=3)
    ranks = [
        BatchLoader(dataset, windows_per_batch=6, seed=3, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for _ in range(len(dataset)):
        whole, parts = one.next_batch(), [rank.next_batch() for rank in ranks]
        assert torch.equal(torch.cat([part.tokens for part in parts], dim=1), whole.tokens)
        assert torch.equal(torch.cat([part.labels for part in parts], dim=1), whole.labels)
        assert sum(part.n_bytes for part in parts) == whole.n_bytes
        assert {part.cursor_after for part in parts} == {whole.cursor_after}


def test_resuming_at_every_cursor_continues_the_unbroken_order(dataset: PackedDataset) -> None:
    loader = BatchLoader(dataset, windows_per_batch=2, seed=5)
    unbroken = batches(loader, len(dataset) + 3)  # over the end of an epoch, in the middle of a batch too
    assert unbroken[-1].cursor_after.epoch >= 1
    for i, batch in enumerate(unbroken[:-1]):
        cursor = Cursor.model_validate_json(batch.cursor_after.model_dump_json())
        resumed = BatchLoader(dataset, windows_per_batch=2, seed=5, cursor=cursor)
        assert_equal(resumed.next_batch(), unbroken[i + 1])
        assert resumed.cursor == unbroken[i + 1].cursor_after


def test_the_batch_is_its_windows(dataset: PackedDataset) -> None:
    batch = BatchLoader(dataset, windows_per_batch=3, seed=0).next_batch()
    width = dataset.window
    assert (batch.tokens.shape, batch.tokens.dtype) == ((1, 3 * width), torch.int64)
    bounds: list[int] = []
    bytes_of = dataset.tokenizer.token_bytes
    n_bytes = 0
    for i, index in enumerate(batch.window_ids):
        window = dataset[index]
        assert batch.tokens[0, i * width : (i + 1) * width].tolist() == window.tokens.tolist()
        assert batch.labels[0, i * width : (i + 1) * width].tolist() == window.labels.tolist()
        bounds += [int(b) + i * width for b in window.cu_seqlens[:-1]]
        n_bytes += sum(int(bytes_of[label]) for label in window.labels if label >= 0)
    assert batch.cu_seqlens.tolist() == [*bounds, 3 * width]
    assert (batch.cu_seqlens.dtype, batch.n_bytes) == (torch.int32, n_bytes)


def test_what_cannot_be_shared_or_resumed_is_refused(dataset: PackedDataset) -> None:
    with pytest.raises(UserError, match="multiple of 2"):
        BatchLoader(dataset, windows_per_batch=3, seed=0, rank=0, world_size=2)
    for cursor in (Cursor(index=1, token_offset=499), Cursor(index=len(dataset), token_offset=500 * len(dataset))):
        with pytest.raises(UserError, match="does not fit this packing"):
            BatchLoader(dataset, windows_per_batch=1, seed=0, cursor=cursor)
