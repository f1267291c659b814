"""The compressors are what they are called, and count every byte once."""

from __future__ import annotations

import lzma
import zlib

import pytest

from apps.eval.suites.compression import compress, lzma_raw

A = b"static constexpr int kValue = 4;\n" * 40
B = bytes(range(256)) * 3


def test_sizes_are_those_of_the_libraries() -> None:
    result = compress([A, B], unscored_bytes=0)
    zlib9, best = result.compressors
    total = len(A) + len(B)
    assert zlib9.per_document_bpb == pytest.approx(8 * (len(zlib.compress(A, 9)) + len(zlib.compress(B, 9))) / total)
    assert zlib9.one_stream_bpb == pytest.approx(8 * len(zlib.compress(A + B, 9)) / total)
    assert best.one_stream_bpb == pytest.approx(8 * len(lzma_raw(A + B)) / total)
    assert result.bytes == total


def test_lzma_can_be_undone_and_is_no_worse_than_xz() -> None:
    data = A * 50 + B
    chain = [{"id": lzma.FILTER_LZMA2, "dict_size": len(data)}]
    assert lzma.decompress(lzma_raw(data), format=lzma.FORMAT_RAW, filters=chain) == data
    assert len(lzma_raw(data)) <= len(lzma.compress(data, preset=9))


def test_one_stream_pays_for_shared_text_once() -> None:
    zlib9 = compress([A, A, A], unscored_bytes=0).compressors[0]
    assert zlib9.one_stream_bpb < 0.6 * zlib9.per_document_bpb
