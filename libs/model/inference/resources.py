"""What the memory managers have in common: the error for "no room", and a guard against accidental copies.

Not for the managers themselves (`state_slots`, `kv_blocks`).
"""

from __future__ import annotations

from typing import NoReturn


class CapacityError(RuntimeError):
    """No room for what was asked: nothing was changed, and it may fit once something else is released.

    Attributes:
        what: of which there is too little. needed, available: in units of it.
    """

    def __init__(self, what: str, *, needed: int, available: int) -> None:
        self.what, self.needed, self.available = what, needed, available
        super().__init__(f"not enough {what}: needed {needed}, available {available}")


class EngineStopped(RuntimeError):
    """An error in the middle of a pass: what was in flight may be half moved, so nothing more is computed from it."""


class NotCopyable:
    """Two managers over the same memory would each believe to own it, so copying and pickling raise TypeError."""

    def _refuse(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} owns device memory and cannot be copied or pickled; pass it on instead")

    def __copy__(self) -> NoReturn:
        self._refuse()

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse()
