"""Prefetching changes when batches are drawn, never which: the cursor is of what was handed out, a fault reaches the
one who waits for its batch, and the thread ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from apps.train.data.loader import Batch, BatchLoader, Cursor
from apps.train.prefetch import AHEAD, Prefetcher
from libs.model.text.shards import DataDir, PackedDataset


@pytest.fixture(scope="module")
def dataset(corpus: Path) -> PackedDataset:
    return PackedDataset(DataDir.open(corpus), "train", 64, 0)


def loader(dataset: PackedDataset, cursor: Cursor | None = None) -> BatchLoader:
    return BatchLoader(dataset, windows_per_batch=3, seed=5, cursor=cursor)


@pytest.fixture
def ahead(dataset: PackedDataset) -> Iterator[Prefetcher]:
    made = Prefetcher(loader(dataset), lambda batch: batch)
    yield made
    made.close()


def settled(drawn: list[Batch], count: int) -> int:
    """How many were drawn, once at least `count` were and the thread has had time for more."""
    end = time.monotonic() + 10
    while len(drawn) < count and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(0.05)
    return len(drawn)


def test_batches_and_cursors_are_those_of_the_loader(dataset: PackedDataset, ahead: Prefetcher) -> None:
    plain = loader(dataset)
    assert ahead.cursor == plain.cursor == Cursor()
    assert ahead.dataset is dataset
    for _ in range(2 * len(dataset) // 3):  # into the second epoch
        got, want = ahead.next_batch(), plain.next_batch()
        assert torch.equal(got.tokens, want.tokens)
        assert got.window_ids == want.window_ids
        assert ahead.cursor == plain.cursor
    assert ahead.cursor.epoch >= 1


def test_draws_ahead_in_a_thread_up_to_its_bound(dataset: PackedDataset) -> None:
    drawn: list[Batch] = []
    threads = set()

    def prepare(batch: Batch) -> Batch:
        drawn.append(batch)
        threads.add(threading.current_thread())
        return batch

    made = Prefetcher(loader(dataset), prepare)
    assert drawn == []
    for taken in range(1, 4):
        made.next_batch()
        assert settled(drawn, taken + AHEAD) == taken + AHEAD
    assert threading.current_thread() not in threads
    made.close()
    assert not any(thread.is_alive() for thread in threads)


def test_a_run_cut_between_two_batches_goes_on_with_the_next_one(dataset: PackedDataset) -> None:
    """What the thread has drawn and nobody has trained on comes again."""
    plain = loader(dataset)
    want = [plain.next_batch().window_ids for _ in range(9)]
    drawn: list[Batch] = []
    made = Prefetcher(loader(dataset), lambda batch: drawn.append(batch) or batch)  # type: ignore[func-returns-value]
    got = [made.next_batch().window_ids for _ in range(4)]
    assert settled(drawn, 4 + AHEAD) > 4
    saved = made.cursor
    made.close()
    assert made.cursor == saved
    assert saved == drawn[3].cursor_after != drawn[-1].cursor_after
    again = Prefetcher(loader(dataset, saved), lambda batch: batch)
    got += [again.next_batch().window_ids for _ in range(5)]
    again.close()
    assert got == want


def test_what_the_thread_raises_comes_with_the_batch_it_would_have_been(dataset: PackedDataset) -> None:
    class Torn(OSError):
        pass

    plain = loader(dataset)
    first, second = plain.next_batch(), plain.next_batch()

    def prepare(batch: Batch) -> Batch:
        if batch.window_ids == second.window_ids:
            raise Torn("a page of the corpus")
        return batch

    made = Prefetcher(loader(dataset), prepare)
    assert made.next_batch().window_ids == first.window_ids
    with pytest.raises(Torn, match="a page of the corpus"):
        made.next_batch()
    assert made.cursor == first.cursor_after
    made.close()
