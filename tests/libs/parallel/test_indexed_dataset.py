"""Megatron reads what we write, we read what Megatron writes, and damaged files are told from good ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from libs.flags.errors import UserError
from libs.parallel.indexed_dataset import DocumentReader, DocumentWriter

DOCUMENTS = [np.array(ids, dtype=np.int32) for ids in ([5, 6, 0], [7], list(range(200)), [65_000, 3])]


def write(prefix: Path, vocab_size: int = 65_100) -> Path:
    with DocumentWriter(prefix, vocab_size) as writer:
        for ids in DOCUMENTS:
            writer.add(ids)
    return prefix


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_100, np.uint16), (100_000, np.int32)])
def test_both_read_the_same(tmp_path: Path, vocab_size: int, dtype: type[np.generic]) -> None:
    prefix = write(tmp_path / "d", vocab_size)
    ours, theirs = DocumentReader(prefix), IndexedDataset(str(prefix))
    assert len(ours) == len(theirs) == len(DOCUMENTS)
    assert theirs.index.dtype is dtype
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert ours.lengths.tolist() == [ids.size for ids in DOCUMENTS]
    for i, ids in enumerate(DOCUMENTS):
        np.testing.assert_array_equal(ours[i], ids)
        np.testing.assert_array_equal(theirs[i], ids)
        assert ours[i].dtype == np.int32
    np.testing.assert_array_equal(ours.slice(2, 17, 5), [17, 18, 19, 20, 21])


def test_we_read_megatrons_own(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    for ids in DOCUMENTS:
        builder.add_item(torch.from_numpy(ids))
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    for got, want in zip(DocumentReader(tmp_path / "m"), DOCUMENTS, strict=True):
        np.testing.assert_array_equal(got, want)


def test_an_id_outside_the_vocabulary_is_our_mistake(tmp_path: Path) -> None:
    for ids in ([100], [-1], []):
        with pytest.raises(AssertionError), DocumentWriter(tmp_path / "d", 100) as writer:
            writer.add(np.array(ids, dtype=np.int64))
    assert not (tmp_path / "d.idx").exists()


@pytest.mark.parametrize("damage", ["no bin", "no idx", "short bin", "long bin", "short idx", "header", "magic"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "d")
    data, idx = tmp_path / "d.bin", tmp_path / "d.idx"
    raw_data, raw_idx = data.read_bytes(), idx.read_bytes()
    if damage.startswith("no"):
        (data if "bin" in damage else idx).unlink()
    elif damage.endswith("bin"):
        data.write_bytes(raw_data[:-2] if damage == "short bin" else raw_data + b"\0\0")
    else:
        idx.write_bytes({"short idx": raw_idx[:-8], "header": raw_idx[:10], "magic": b"X" + raw_idx[1:]}[damage])
    with pytest.raises(UserError, match="corrupt data directory"):
        DocumentReader(tmp_path / "d")
