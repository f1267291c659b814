"""zlib and lzma on the bytes that the model scored: what a number of bits per byte can be compared with.

Not a bound on anything: a compressor knows nothing before the first byte, a trained model has read a corpus.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Sequence

from apps.eval.results import Compression, Compressor

_LEAST_DICTIONARY = 4096  # liblzma's minimum


def zlib9(data: bytes) -> bytes:
    """zlib at level 9 (32 KiB window)."""
    return zlib.compress(data, level=9)


def lzma_raw(data: bytes) -> bytes:
    """LZMA2 without a container, preset 9 extreme, a dictionary as large as the input: lzma at its best."""
    size = max(_LEAST_DICTIONARY, len(data))
    chain = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=chain)


COMPRESSORS: tuple[tuple[str, str, Callable[[bytes], bytes]], ...] = (
    ("zlib-9", "zlib level 9, header included", zlib9),
    ("lzma", "raw LZMA2, preset 9 extreme, dictionary as large as the input", lzma_raw),
)


def compress(documents: Sequence[bytes], *, unscored_bytes: int) -> Compression:
    """Bits per byte of each compressor, document by document and over all documents as one stream.

    One stream favours the compressor: text that two documents share is paid for once.
    """
    total = sum(len(document) for document in documents)
    assert total > 0, "no bytes to compress"
    stream = b"".join(documents)
    rows = [
        Compressor(
            name=name,
            what=what,
            per_document_bpb=8 * sum(len(run(document)) for document in documents if document) / total,
            one_stream_bpb=8 * len(run(stream)) / total,
        )
        for name, what, run in COMPRESSORS
    ]
    return Compression(bytes=total, unscored_bytes=unscored_bytes, compressors=rows)
