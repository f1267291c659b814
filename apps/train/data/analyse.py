"""Parses and hashes all files, in worker processes when there is enough to do.

Its own module so that a worker imports neither torch nor tokenizers. Not for what is done with the results.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from apps.train.data.duplicates import TextHashes, hash_text
from apps.train.data.parse import ParsedFile, parse

_CHUNK_BYTES = 400_000
_SERIAL_BYTES = 1_500_000


class Analysis(NamedTuple):
    """What the pipeline needs to know of one file."""

    parsed: ParsedFile
    hashes: TextHashes


def analyse(texts: Sequence[bytes], workers: int, advance: Callable[[int], None]) -> list[Analysis]:
    """One analysis per text, in order; the result does not depend on `workers`."""
    chunks = list(_chunks(texts))
    if workers < 2 or sum(map(len, texts)) < _SERIAL_BYTES:
        return _gathered(map(_analyse_chunk, chunks), chunks, advance)
    # spawn: a fork of a process that has run tokenizers or torch threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupt)
    try:
        return _gathered(pool.map(_analyse_chunk, chunks), chunks, advance)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _gathered(
    results: Iterator[list[Analysis]], chunks: list[list[bytes]], advance: Callable[[int], None]
) -> list[Analysis]:
    gathered: list[Analysis] = []
    for chunk, result in zip(chunks, results, strict=True):
        gathered += result
        advance(sum(map(len, chunk)))
    return gathered


def _analyse_chunk(texts: list[bytes]) -> list[Analysis]:
    return [Analysis(parse(text), hash_text(text)) for text in texts]


def _ignore_interrupt() -> None:
    """Ctrl-C reaches the whole group; only the parent reports it and stops the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _chunks(texts: Sequence[bytes]) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
