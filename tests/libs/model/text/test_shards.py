"""Windows tile the stream, labels stop at document ends, and a damaged directory is never read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libs.flags.errors import UserError
from libs.model.text.shards import DataDir, PackedDataset, Window, seeded_permutation

Make = Callable[..., Path]


def stream_and_owners(dataset: PackedDataset) -> tuple[list[int], list[int]]:
    """The slow, obviously right stream: documents in order, and for each token which one it is of."""
    documents = dataset.data_dir.documents(dataset.split)
    tokens: list[int] = []
    owners: list[int] = []
    for place, index in enumerate(seeded_permutation(len(documents), dataset.seed).tolist()):
        ids = documents[index].tolist()
        tokens += ids
        owners += [place] * len(ids)
    return tokens, owners


def expected_window(tokens: list[int], owners: list[int], index: int, width: int, pad: int) -> Window:
    window, labels, bounds = [], [], [0]
    for i in range(index * width, (index + 1) * width):
        inside, follows = i < len(tokens), i + 1 < len(tokens)
        window.append(tokens[i] if inside else pad)
        labels.append(tokens[i + 1] if follows and owners[i] == owners[i + 1] else -100)
        owner = owners[i] if inside else -1
        if i > index * width and owner != (owners[i - 1] if i - 1 < len(tokens) else -1):
            bounds.append(i - index * width)
    return Window(np.array(window), np.array(labels), np.array([*bounds, width]))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    width=st.integers(2, 40),
    seed=st.integers(0, 3),
)
def test_windows_are_those_of_the_slow_path(make: Make, sizes: list[int], width: int, seed: int) -> None:
    directory = make(train=sizes, valid=[9])
    dataset = PackedDataset(DataDir.open(directory), "train", width if sum(sizes) > width else 2, seed)
    tokens, owners = stream_and_owners(dataset)
    seen: list[int] = []
    for i in range(len(dataset)):
        got = dataset[i]
        want = expected_window(tokens, owners, i, dataset.window, dataset.tokenizer.pad_id)
        for name in Window._fields:
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=f"{name} of {i}")
        assert (got.tokens.dtype, got.labels.dtype, got.cu_seqlens.dtype) == (np.int64, np.int64, np.int32)
        seen += got.tokens.tolist()
    # Every token once, in order; what follows the end is padding and less than a window of it.
    assert seen[: len(tokens)] == tokens
    assert set(seen[len(tokens) :]) <= {dataset.tokenizer.pad_id}
    assert len(seen) - len(tokens) < dataset.window


def test_the_end_of_a_document_predicts_nothing_even_at_a_window_edge(make: Make) -> None:
    dataset = PackedDataset(DataDir.open(make(train=[10, 17, 30])), "train", 7, 0)
    joined = [dataset[i] for i in range(len(dataset))]
    tokens = np.concatenate([w.tokens for w in joined])
    labels = np.concatenate([w.labels for w in joined])
    ends = tokens == dataset.tokenizer.eod_id
    assert ends.sum() == 3
    assert (labels[ends] == -100).all()
    inside = ~ends & (tokens != dataset.tokenizer.pad_id)
    assert (labels[inside] >= 0).all()


def test_documents_and_metadata_agree(make: Make) -> None:
    data = DataDir.open(make(train=[5, 100, 33], valid=[7, 8]))
    for split in ("train", "valid"):
        documents, metadata = data.documents(split), data.metadata(split)
        assert len(documents) == len(metadata)
        for ids, meta in zip(documents, metadata, strict=True):
            assert ids[-1] == data.tokenizer.eod_id
            assert (ids.size, len(data.tokenizer.decode(ids))) == (meta.tokens, meta.bytes)
    with pytest.raises(UserError, match="did you mean 'valid'"):
        data.documents("valdi")
    with pytest.raises(IndexError):
        data.documents("valid")[2]


def test_the_fingerprint_tells_data_window_and_seed_apart(make: Make) -> None:
    one, other = DataDir.open(make(train=[50, 60])), DataDir.open(make(train=[50, 60], seed=1))
    prints = {
        PackedDataset(one, "train", 8, 0).fingerprint,
        PackedDataset(one, "train", 16, 0).fingerprint,
        PackedDataset(one, "train", 8, 1).fingerprint,
        PackedDataset(one, "valid", 8, 0).fingerprint,
        PackedDataset(other, "train", 8, 0).fingerprint,
    }
    assert len(prints) == 5
    assert PackedDataset(DataDir.open(one.path), "train", 8, 0).fingerprint in prints


def test_less_than_one_window_is_refused(make: Make) -> None:
    data = DataDir.open(make(train=[20]))
    n = PackedDataset(data, "train", 2, 0).n_tokens
    assert len(PackedDataset(data, "train", n, 0)) == 1
    with pytest.raises(UserError, match=f"{n} tokens, less than one window of {n + 1}"):
        PackedDataset(data, "train", n + 1, 0)
    with pytest.raises(UserError, match="at least 2"):
        PackedDataset(data, "train", 1, 0)


def test_the_permutation_is_one_and_never_changes() -> None:
    for n in (0, 1, 2, 1000):
        assert sorted(seeded_permutation(n, 3, 4).tolist()) == list(range(n))
    assert seeded_permutation(10, 0).tolist() != seeded_permutation(10, 1).tolist()
    assert seeded_permutation(50, 0, 1).tolist() != seeded_permutation(50, 1, 0).tolist()
    # Written down: a resumed run of last year must find the order of last year.
    assert seeded_permutation(10, 0, 0).tolist() == [7, 3, 2, 4, 6, 0, 5, 1, 8, 9]


@pytest.mark.parametrize("name", ["train.bin", "valid.idx", "documents.jsonl", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_refused(make: Make, name: str, damage: str) -> None:
    directory = make(train=[50, 60])
    file = directory / name
    raw = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(raw[:-3] if damage == "cut" else raw[:40] + bytes([raw[40] ^ 1]) + raw[41:])
    with pytest.raises(UserError, match="corrupt data directory"):
        DataDir.open(directory)


def test_a_damaged_or_missing_manifest_is_refused(make: Make, tmp_path: Path) -> None:
    directory = make(train=[50])
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for change in ({"fingerprint": "0" * 64}, {"format_version": 2}, {"extra": 1}):
        path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(UserError, match="corrupt data directory"):
            DataDir.open(directory)
    path.write_text("{")
    with pytest.raises(UserError, match="corrupt data directory"):
        DataDir.open(directory)
    with pytest.raises(UserError, match="no data directory"):
        DataDir.open(tmp_path / "nowhere")
