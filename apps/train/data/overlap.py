"""How much of the held-out text the training text has too, in n-grams.

For the record kept with a data directory; near-duplicates are gone by then (see `duplicates`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apps.train.data.duplicates import NGRAM, NGRAM_ONE_IN, Hashes
from libs.model.text.manifest import Overlap


def overlap(train: Sequence[Hashes], valid: Sequence[Hashes], valid_paths: Sequence[str]) -> Overlap:
    """How much of the held-out text's 13-grams the training text has."""
    known = np.unique(np.concatenate(train)) if train else np.empty(0, dtype=np.uint64)
    total = shared = 0
    over_half: list[str] = []
    for path, ngrams in zip(valid_paths, valid, strict=True):
        hits = int(np.isin(ngrams, known, assume_unique=True).sum())
        total, shared = total + int(ngrams.size), shared + hits
        if ngrams.size and hits * 2 > ngrams.size:
            over_half.append(path)
    return Overlap(
        n=NGRAM,
        one_in=NGRAM_ONE_IN,
        valid_ngrams=total,
        shared=shared,
        share=shared / total if total else 0.0,
        files_over_half=tuple(over_half),
    )
