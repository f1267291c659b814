"""Which request runs next: first come, first served; one prefill at a time, in chunks; all others decode together.

A request is admitted when the one before it has finished its prompt, so that equal prompts find its blocks, and when
every block that it can ever need is there: what runs never waits for memory, and so nothing deadlocks.
Not for running anything (`engine`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from libs.model.inference.request import Request
from libs.model.inference.resources import CapacityError

# Chunks of prefill in a row while others wait to decode: prompts get most of the time, and nobody stalls for long.
PREFILLS_PER_DECODE = 4


class Scheduler:
    """The queue, the one request in prefill, and those that decode.

    Attributes:
        waiting, prefilling, decoding: in order of submission.
    """

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self.waiting: deque[Request] = deque()
        self.prefilling: Request | None = None
        self.decoding: list[Request] = []
        self._streak = 0

    @property
    def in_flight(self) -> list[Request]:
        return [*self.decoding, *([] if self.prefilling is None else [self.prefilling])]

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.in_flight)

    def admit(self, enter: Callable[[Request], None]) -> None:
        """Start the next request if it is its turn and there is room; `enter` raises CapacityError if there is not."""
        if self.prefilling is not None or not self.waiting or len(self.decoding) >= self._max_batch:
            return
        request = self.waiting[0]
        taken = {other.row for other in self.decoding}
        request.row = min(set(range(self._max_batch)) - taken)
        try:
            enter(request)
        except CapacityError:
            if not self.decoding:
                raise
            return
        self.waiting.popleft()
        self.prefilling = request

    def next_prefill(self) -> Request | None:
        """The request whose next chunk is due; None when a round of decoding is."""
        if self.prefilling is None or (self.decoding and self._streak >= PREFILLS_PER_DECODE):
            self._streak = 0
            return None
        self._streak += 1
        return self.prefilling

    def prefilled(self, request: Request) -> None:
        """Its prompt is done."""
        assert request is self.prefilling, "only what was in prefill"
        self.prefilling = None
        self.decoding.append(request)

    def remove(self, request: Request) -> None:
        """It is over, in whatever phase."""
        if request is self.prefilling:
            self.prefilling = None
        elif request in self.decoding:
            self.decoding.remove(request)
        else:
            self.waiting.remove(request)
