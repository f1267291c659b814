"""The document bootstrap of a ratio of sums: for every error bar of an evaluation.

Not for times, whose paired interval is in `libs.flags.paired`; not a general statistics library.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from libs.flags.paired import Interval

_ROWS_AT_ONCE = 64  # resamples held at once: bounds the memory at 64 x documents weights


def bootstrap_ratio(
    numerators_D: NDArray[np.float64],
    denominators_D: NDArray[np.float64],
    *,
    seed: int,
    resamples: int = 1000,
) -> Interval | None:
    """95 % percentile bootstrap of `sum(numerators) / sum(denominators)`, resampling documents.

    The document is the unit: tokens of one document are far from independent, so resampling tokens would give
    an interval that is much too narrow. The caller passes documents in a fixed order, so that the same seed
    gives the same interval.

    Returns:
        None with fewer than two documents: one document says nothing about the spread between documents.
    """
    n_documents = len(numerators_D)
    if n_documents < 2:
        return None
    rng = np.random.default_rng(seed)
    ratios: list[NDArray[np.float64]] = []
    for start in range(0, resamples, _ROWS_AT_ONCE):
        rows = min(_ROWS_AT_ONCE, resamples - start)
        weights = rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=rows)
        ratios.append((weights @ numerators_D) / (weights @ denominators_D))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return Interval(float(low), float(high))
