"""The next batches, drawn and moved to the device by a thread while the device works on this one.

For devices whose program waits for nothing else (XLA). Not for the order of batches: that is `data.loader`'s, and a run
reads the same ones with and without this. torch_xla's own loader cuts the program at every batch, which would split a
step with several micro-batches, and knows no cursor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from apps.train.data.loader import Batch, BatchLoader, Cursor
from libs.model.text.shards import PackedDataset

# Batches drawn ahead: one while another is trained on, and one evens out slow reads.
AHEAD: Final = 2


class Prefetcher:
    """A loader around a loader. Its cursor is that of the batches it has handed out, whatever the thread has drawn: a
    checkpoint holds no batch that was not trained on.

    What the thread raises is raised by the `next_batch` that would have returned that batch.
    """

    def __init__(self, loader: BatchLoader, prepare: Callable[[Batch], Batch], *, ahead: int = AHEAD) -> None:
        """prepare: runs in the thread. ahead: how many batches are drawn beside the one handed out last."""
        assert ahead >= 1, "nothing is prefetched"
        self._loader, self._prepare, self._ahead = loader, prepare, ahead
        self._cursor = loader.cursor
        self._drawn: deque[Future[Batch]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")

    @property
    def dataset(self) -> PackedDataset:
        return self._loader.dataset

    @property
    def cursor(self) -> Cursor:
        """Where the batch begins that `next_batch` hands out next."""
        return self._cursor

    def next_batch(self) -> Batch:
        """The next batch, prepared; waits for it if need be, and has others drawn meanwhile."""
        while len(self._drawn) <= self._ahead:
            self._drawn.append(self._thread.submit(self._draw))
        batch = self._drawn.popleft().result()
        self._cursor = batch.cursor_after
        return batch

    def close(self) -> None:
        """Stop the thread and wait for it. What it has drawn is dropped; the cursor stays."""
        self._thread.shutdown(cancel_futures=True)
        self._drawn.clear()

    def _draw(self) -> Batch:
        return self._prepare(self._loader.next_batch())
