"""Whether the figures that a receipt states follow from its samples: made again, and compared.

Not for what the figures are (receipt.py and the receipts of each benchmark).
"""

from __future__ import annotations

import math

from pydantic import BaseModel

# For another order of a sum, or another rounding of a logarithm; the second of differences that are nearly zero.
_RELATIVE, _ABSOLUTE = 1e-9, 1e-12


def require_same(name: str, stated: BaseModel, actual: BaseModel) -> None:
    """Every field the same, numbers but for rounding.

    Raises:
        ValueError: with the fields that differ, as they are and as they follow.
    """
    said, gives = stated.model_dump(), actual.model_dump()
    wrong = [field for field in said if not _same(said[field], gives[field])]
    if wrong:
        states, follow = (", ".join(f"{field} {of[field]}" for field in wrong) for of in (said, gives))
        raise ValueError(f"{name}: states {states}; its samples give {follow}")


def require_reason(stated: str, actual: str) -> None:
    """Raises ValueError when a decision's reason is not what the samples say."""
    if stated != actual:
        raise ValueError(f"reason {stated!r}, but its samples say {actual!r}")


def _same(stated: object, actual: object) -> bool:
    if isinstance(stated, dict) and isinstance(actual, dict):
        return stated.keys() == actual.keys() and all(_same(stated[key], actual[key]) for key in stated)
    if isinstance(stated, float) and isinstance(actual, float):
        return math.isclose(stated, actual, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
    return stated == actual
