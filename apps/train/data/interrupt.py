"""Keeps a Ctrl-C or SIGTERM from getting lost while libraries are imported.

For `fathom data build`. Not for training, which finishes a step first (apps.train.signals).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_back() -> Iterator[None]:
    """A signal that comes inside takes effect when the block ends: Megatron imports optional parts under a bare
    `except:`, which takes a KeyboardInterrupt for a part that is not there.

    Raises:
        KeyboardInterrupt: at the end, when there was one.
    """
    came: list[int] = []
    before = {number: signal.signal(number, lambda came_in, _: came.append(came_in)) for number in _NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            raise KeyboardInterrupt
