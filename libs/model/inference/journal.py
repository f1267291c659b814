"""Changes to plain dicts and lists that can be taken back: what makes an operation on the KV blocks all or nothing.

Each change is recorded before it is made, and taking it back assigns the old value, so an exception between the two is
harmless. Not for tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
_ABSENT = object()


class Journal:
    """Records changes since the last `atomically`."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, Any, Any]] = []

    def atomically(self, work: Callable[[], T]) -> T:
        """Run `work`; whatever it raises, every recorded change is taken back first."""
        self._undo.clear()
        try:
            return work()
        except BaseException:
            self._take_back()
            raise

    def put(self, mapping: dict[Any, Any], key: Any, value: Any) -> None:
        """mapping[key] = value"""
        self._undo.append((mapping, key, mapping.get(key, _ABSENT)))
        mapping[key] = value

    def drop(self, mapping: dict[Any, Any], key: Any) -> None:
        """del mapping[key]"""
        self._undo.append((mapping, key, mapping[key]))
        del mapping[key]

    def replace_tail(self, items: list[Any], start: int, tail: Sequence[Any]) -> None:
        """items[start:] = tail"""
        self._undo.append((items, start, items[start:]))
        items[start:] = tail

    def _take_back(self) -> None:
        for container, key, old in reversed(self._undo):
            if isinstance(container, list):
                container[key:] = old
            elif old is _ABSENT:
                container.pop(key, None)
            else:
                container[key] = old
