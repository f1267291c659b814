"""Reading a built data directory: whole documents for evaluation, packed windows for training.

For every consumer of data. Not for building (see `apps.train.data.build`), nor for the order in which windows
are visited (see `apps.train.data.loader`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from libs.flags.errors import UserError
from libs.model.text.document import DocumentMeta
from libs.model.text.manifest import (
    DOCUMENTS_NAME,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    digest_file,
    read_manifest,
)
from libs.model.text.tokenizer import Tokenizer
from libs.parallel.indexed_dataset import DocumentReader

IGNORE_INDEX = -100
PACKING_VERSION = 1


class DataDir:
    """A built data directory, opened with `DataDir.open`.

    Attributes: path, manifest, tokenizer, fingerprint (data and tokenizer).
    """

    def __init__(self, path: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self.path = path
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.fingerprint = manifest.fingerprint
        self._readers: dict[str, DocumentReader] = {}

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> DataDir:
        """Open `path`. `verify` reads every file once and compares checksums; sizes are compared in any case.

        Raises:
            UserError: nothing there, or files damaged, missing, or of another build.
        """
        directory = Path(path)
        manifest = read_manifest(directory)
        for name, promised in manifest.files.items():
            file = directory / name
            if not file.is_file():
                raise UserError(f"corrupt data directory: {file} is missing; build it again with --force")
            size = file.stat().st_size
            if size != promised.size:
                raise UserError(f"corrupt data directory: {file} has {size} bytes, expected {promised.size}")
            if (verify or name == TOKENIZER_NAME) and digest_file(file) != promised:
                raise UserError(f"corrupt data directory: {file} does not have its recorded checksum")
        tokenizer = Tokenizer.load(directory / TOKENIZER_NAME)
        if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
            raise UserError(f"corrupt data directory: {directory / TOKENIZER_NAME} is another tokenizer")
        return cls(directory, manifest, tokenizer)

    def documents(self, split: str) -> DocumentReader:
        """Documents of `split`: `len(...)`, `[i]` -> ids (n,) int32 with the trailing end-of-document token."""
        if split not in SPLITS:
            raise UserError.unknown("split", split, SPLITS)
        if split not in self._readers:
            self._readers[split] = DocumentReader(self.path / split)
        return self._readers[split]

    def metadata(self, split: str) -> Sequence[DocumentMeta]:
        """One entry per document of `split`, in the order of `documents(split)`."""
        if split not in SPLITS:
            raise UserError.unknown("split", split, SPLITS)
        return [meta for meta in self._all_metadata if meta.split == split]

    @cached_property
    def _all_metadata(self) -> list[DocumentMeta]:
        path = self.path / DOCUMENTS_NAME
        try:
            with path.open("rb") as stream:
                return [DocumentMeta.model_validate_json(line) for line in stream]
        except (OSError, ValidationError) as error:
            raise UserError(f"corrupt data directory: {path}: {error}") from error


class Window(NamedTuple):
    """A fixed-length slice of the token stream.

    tokens: (W,) int64. labels: (W,) int64, the next token, or -100 where that belongs to another document or
    is padding. cu_seqlens: (n+1,) int32, 0 = first, W = last, the documents' boundaries between: the one
    source of boundaries for attention mask, rotary positions and state reset.
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    cu_seqlens: npt.NDArray[np.int32]


class PackedDataset:
    """The documents of one split in seeded order, as one stream cut into windows of `window` tokens.

    Window i holds stream tokens [i W, (i+1) W), so every token is in exactly one window. Tail rule: the last
    window is filled up with padding tokens, a sequence of their own without labels.

    Raises:
        UserError: the split has less than one window of tokens.
    """

    def __init__(self, data_dir: DataDir, split: str, window: int, seed: int) -> None:
        if window < 2:
            raise UserError(f"window of {window} tokens: at least 2 are needed")
        self.data_dir, self.split, self.window, self.seed = data_dir, split, window, seed
        self.tokenizer = data_dir.tokenizer
        self._documents = data_dir.documents(split)
        self._order = seeded_permutation(len(self._documents), seed)
        ends = np.cumsum(self._documents.lengths[self._order])
        # _starts[j] is the stream position of the j-th document in order; the last entry is the stream's
        # length.
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), ends.astype(np.int64)])
        self.n_tokens = int(self._starts[-1])
        if self.n_tokens < window:
            raise UserError(
                f"corpus too small: split {split!r} of {data_dir.path} has {self.n_tokens} tokens, less than "
                f"one window of {window}; use a smaller window or more source text"
            )

    def __len__(self) -> int:
        return -(-self.n_tokens // self.window)

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        begin = index * self.window
        end = min(begin + self.window, self.n_tokens)
        stream = self._read(begin, min(end + 1, self.n_tokens))
        tokens = np.full(self.window, self.tokenizer.pad_id, dtype=np.int64)
        labels = np.full(self.window, IGNORE_INDEX, dtype=np.int64)
        tokens[: end - begin] = stream[: end - begin]
        labels[: stream.size - 1] = stream[1:]
        inner = self._starts[(self._starts > begin) & (self._starts < begin + self.window)] - begin
        # The last token of a document predicts the first of the next one: no label.
        labels[self._starts[(self._starts > begin) & (self._starts <= end)] - begin - 1] = IGNORE_INDEX
        cu_seqlens = np.concatenate([[0], inner, [self.window]]).astype(np.int32)
        return Window(tokens, labels, cu_seqlens)

    @property
    def fingerprint(self) -> str:
        """sha256 over data, tokenizer and packing; a resumed run must find the same one."""
        parts = (self.data_dir.fingerprint, self.tokenizer.fingerprint, self.split, self.window, self.seed)
        return hashlib.sha256(repr((PACKING_VERSION, *parts)).encode()).hexdigest()

    def _read(self, begin: int, end: int) -> npt.NDArray[np.int32]:
        """Stream tokens [begin, end)."""
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        parts: list[npt.NDArray[np.int32]] = []
        while begin < end:
            offset = begin - int(self._starts[first])
            length = min(end, int(self._starts[first + 1])) - begin
            parts.append(self._documents.slice(int(self._order[first]), offset, length))
            begin, first = begin + length, first + 1
        return np.concatenate(parts)


def seeded_permutation(n: int, *key: int) -> npt.NDArray[np.int64]:
    """A permutation of range(n) that depends on `n` and `key` only, not on numpy's generators or version.

    Sorts by SplitMix64 (Steele, Lea, Flood 2014) of the position, keyed by the chained mix of `key`.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _splitmix64(state ^ np.array([part], dtype=np.uint64))
    return np.argsort(_splitmix64(np.arange(n, dtype=np.uint64) + state), kind="stable")


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
