"""Megatron's indexed dataset (`.bin` / `.idx`) behind two small classes with errors a user can act on.

For reading and writing token documents in the layout other trainers read. Not for packing or shuffling
(see `libs.model.text.shards`): megatron's own GPTDataset order depends on the number of training steps.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from libs.flags.errors import UserError

with warnings.catch_warnings():
    # Importing megatron.core warns four times about optional CUDA packages the datasets never use.
    warnings.simplefilter("ignore", UserWarning)
    import megatron.core.datasets.indexed_dataset as megatron_dataset

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1


class DocumentWriter:
    """Writes one split, one document per sequence. Use as a context manager; an error leaves no `.idx`."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self.dtype: type[Any] = megatron_dataset.DType.optimal_dtype(vocab_size)
        self._vocab_size = vocab_size
        self._builder: Any = megatron_dataset.IndexedDatasetBuilder(
            megatron_dataset.get_bin_path(str(prefix)), dtype=self.dtype
        )

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is None:
            self._builder.finalize(megatron_dataset.get_idx_path(str(self._prefix)))
        else:
            self._builder.data_file.close()

    def add(self, ids: npt.NDArray[np.integer[Any]]) -> None:
        """Append one document: `ids` (n,), n >= 1, every id in [0, vocab_size)."""
        assert ids.ndim == 1, f"a document is one row of ids, not {ids.shape}"
        assert ids.size, "an empty document cannot be stored"
        assert ids.min() >= 0, f"negative token id {int(ids.min())}"
        assert ids.max() < self._vocab_size, f"token id {int(ids.max())} outside vocabulary {self._vocab_size}"
        self._builder.add_document(ids, [int(ids.size)])


class DocumentReader:
    """Random access to the documents of one split (memory-mapped).

    Raises:
        UserError: files missing, of another format, or of a size that the index does not promise.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        _check_files(prefix)
        self._dataset: Any = megatron_dataset.IndexedDataset(str(prefix), mmap=True)
        self.lengths: npt.NDArray[np.int64] = np.array(self._dataset.sequence_lengths, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.lengths.size)

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        """Ids (n,) of document `index`, its end-of-document token included."""
        return self.slice(index, 0, None)

    def slice(self, index: int, offset: int, length: int | None) -> npt.NDArray[np.int32]:
        """Ids (length,) of document `index` from token `offset` on (None: to its end)."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)} in {self.prefix}")
        return np.asarray(self._dataset.get(index, offset, length)).astype(np.int32)

    def __iter__(self) -> Iterator[npt.NDArray[np.int32]]:
        return (self[i] for i in range(len(self)))


def _check_files(prefix: Path) -> None:
    """Compare both file sizes with what the index header and the lengths promise, before megatron maps them."""
    idx, data = (Path(f"{prefix}{suffix}") for suffix in (".idx", ".bin"))
    for path in (idx, data):
        if not path.is_file():
            raise UserError(f"corrupt data directory: {path} is missing; build it again with --force")
    with idx.open("rb") as stream:
        raw = stream.read(_HEADER.size)
        if len(raw) < _HEADER.size:
            raise UserError(f"corrupt data directory: {idx} is cut off after {len(raw)} bytes")
        magic, version, code, sequences, documents = _HEADER.unpack(raw)
        if magic != _MAGIC or version != _VERSION or code not in {int(d.value) for d in megatron_dataset.DType}:
            raise UserError(f"corrupt data directory: {idx} is not a Megatron index of version {_VERSION}")
        promised = _HEADER.size + 12 * sequences + 8 * documents
        if idx.stat().st_size != promised:
            raise UserError(f"corrupt data directory: {idx} has {idx.stat().st_size} bytes, its header says {promised}")
        lengths = np.frombuffer(stream.read(4 * sequences), dtype=np.int32)
    item = int(np.dtype(megatron_dataset.DType.dtype_from_code(code)).itemsize)
    promised = int(lengths.sum(dtype=np.int64)) * item
    if data.stat().st_size != promised:
        raise UserError(f"corrupt data directory: {data} has {data.stat().st_size} bytes, its index says {promised}")
