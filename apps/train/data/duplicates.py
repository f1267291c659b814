"""Near-duplicate removal by MinHash, and the n-gram hashes for the overlap of held-out and training text.

On lexical tokens without comments, so a shared licence header counts for nothing. Not for exact duplicates (see
`curate`). Worker processes import this, so it must not import torch.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

SHINGLE = 5
NGRAM = 13
NGRAM_ONE_IN = 4
_PERMUTATIONS = 128
_LEAST_SHINGLES = 8
_BLOCK = 16_384
_TOKEN = re.compile(rb"[A-Za-z_]\w*|\d+|[^\s\w]")
_COMMENT = re.compile(rb"//[^\n]*|/\*.*?\*/", re.DOTALL)

Hashes = npt.NDArray[np.uint64]


class TextHashes(NamedTuple):
    """Of one file. signature: (128,) MinHash, None when the file is too short. ngrams: sorted sample of hashes."""

    signature: Hashes | None
    ngrams: Hashes


class _TokenCodes(dict[bytes, int]):
    """Token -> 32-bit code, computed once."""

    def __missing__(self, token: bytes) -> int:
        code = zlib.crc32(token)
        self[token] = code
        return code


def hash_text(text: bytes) -> TextHashes:
    """Signature over distinct 5-grams, and one in four of the distinct 13-grams, chosen by hash."""
    codes = _TokenCodes()
    tokens = np.array([codes[t] for t in _TOKEN.findall(_COMMENT.sub(b" ", text))], dtype=np.uint64)
    shingles = np.unique(_ngrams(tokens, SHINGLE))
    ngrams = np.unique(_ngrams(tokens, NGRAM))
    return TextHashes(
        signature=_signature(shingles) if shingles.size >= _LEAST_SHINGLES else None,
        ngrams=ngrams[ngrams % np.uint64(NGRAM_ONE_IN) == 0],
    )


def near_duplicates(signatures: Sequence[Hashes | None], threshold: float) -> dict[int, int]:
    """Index of each file that repeats an earlier one -> that one's index. Estimated Jaccard >= threshold."""
    # Candidates are compared below, so the index may err on the side of too many.
    index: Any = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
    found: dict[int, int] = {}
    for i, signature in enumerate(signatures):
        if signature is None:
            continue
        sketch = _sketch(signature)
        alike = [int(j) for j in index.query(sketch) if _alike(signatures[int(j)], signature) >= threshold]
        if alike:
            found[i] = min(alike)
        else:
            index.insert(i, sketch)
    return found


def _alike(a: Hashes | None, b: Hashes) -> float:
    """Estimated Jaccard similarity of two signatures."""
    return float(np.mean(a == b))


def _ngrams(tokens: Hashes, n: int) -> Hashes:
    """Hash of every run of n tokens: a polynomial modulo 2^64, then mixed."""
    count = tokens.size - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    result = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        result = result * np.uint64(0x100000001B3) + tokens[i : i + count]
    result = (result ^ (result >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    result = (result ^ (result >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return result ^ (result >> np.uint64(31))


def _signature(shingles: Hashes) -> Hashes:
    sketch: Any = MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=int, scheme="affine64")
    for start in range(0, shingles.size, _BLOCK):
        sketch.update_batch(shingles[start : start + _BLOCK].tolist())
    return np.asarray(sketch.hashvalues, dtype=np.uint64)


def _sketch(signature: Hashes) -> Any:
    return MinHash(num_perm=_PERMUTATIONS, seed=1, hashvalues=signature, scheme="affine64")
