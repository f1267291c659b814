"""Files of several ranks: every count reads what every other wrote, a missing or foreign piece is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from libs.flags.errors import UserError
from libs.model import HybridLM
from libs.model.shard_files import LAYOUT_FILE, LocalTensors, read_layout, shard_name
from libs.model.weights import load_model, load_parameters
from tests.support import sharded_files
from tests.support.sharded_files import cut, moments, parameters, write_checkpoint


@pytest.fixture(scope="module")
def full() -> HybridLM:
    return sharded_files.model()


@pytest.fixture(scope="module", params=[1, 2])
def saved(request: pytest.FixtureRequest, full: HybridLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run"), 3, full, request.param)


def paths(saved: Path, kind: str) -> list[Path]:
    layout = read_layout(saved)
    return [saved / name for name in (layout.weights if kind == "model" else layout.optimizer)]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_every_rank_gets_its_own_rows(saved: Path, full: HybridLM, size: int, kind: str) -> None:
    whole = parameters(full) if kind == "model" else moments(full)
    for rank in range(size):
        got, want = LocalTensors(paths(saved, kind), full.config, rank, size), cut(whole, full, rank, size)
        assert set(got) == set(want)
        assert len(got) == len(want)
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype
            assert torch.equal(got[name], tensor), name


def test_table_shows_full_shapes(saved: Path, full: HybridLM) -> None:
    rows = {row.name: row for row in LocalTensors(paths(saved, "model"), full.config).table()}
    assert {name: row.shape for name, row in rows.items()} == {n: tuple(t.shape) for n, t in parameters(full).items()}
    pieces = {rows["blocks.0.layer.in_proj.weight"].pieces, rows["embedding.weight"].pieces}
    assert pieces == {read_layout(saved).tp}


def test_a_whole_model_from_shards_is_bit_equal(saved: Path, full: HybridLM) -> None:
    merged = load_model(saved)
    assert all(torch.equal(tensor, parameters(full)[name]) for name, tensor in parameters(merged).items())
    into = HybridLM(full.config)
    before = {name: tensor.data_ptr() for name, tensor in into.named_parameters()}
    load_parameters(saved, into)
    assert all(torch.equal(tensor, parameters(full)[name]) for name, tensor in parameters(into).items())
    assert {name: tensor.data_ptr() for name, tensor in into.named_parameters()} == before


def test_keys_mean_the_same_in_every_layout(full: HybridLM, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, full, 2)
    path = folder / shard_name("model", 1, 2)
    with safe_open(path, framework="pt") as file:
        extents = json.loads(file.metadata()["entries"])
    z = extents["blocks.0.layer.in_proj.weight.z"]
    rows, width = full.config.mixer.packed_widths[0], full.config.hidden_size  # type: ignore[union-attr]
    assert z == {"dim": 0, "start": rows // 2, "full_shape": [rows, width]}
    assert extents["blocks.0.norm.weight"]["dim"] is None


def test_a_model_of_other_geometry_is_refused(saved: Path, full: HybridLM) -> None:
    other = HybridLM(sharded_files.config("M-M-/*-", vocab_size=sharded_files.VOCAB))
    with pytest.raises(UserError, match="pattern: checkpoint"):
        load_parameters(saved, other)


@pytest.fixture
def sharded(full: HybridLM, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, 1, full, 2)


def test_a_missing_shard_is_named_with_what_there_is(sharded: Path, full: HybridLM) -> None:
    rows = full.config.vocab_size
    alone = LocalTensors([sharded / shard_name("model", 1, 2)], full.config)
    with pytest.raises(
        UserError, match=rf"'embedding.weight' has {rows} rows, its shards hold \[{rows // 2}, {rows}\)"
    ):
        alone["embedding.weight"]
    with pytest.raises(UserError, match="a shard is missing"):
        alone.check_whole()
    with pytest.raises(UserError, match=r"hold \[0, \d+\): a shard is missing"):
        LocalTensors([sharded / shard_name("model", 0, 2)], full.config).check_whole()
    twice = LocalTensors([sharded / shard_name("model", 0, 2)] * 2, full.config)
    with pytest.raises(UserError, match=r"hold \[0, \d+\), \[0, \d+\)"):
        twice.check_whole()
    (sharded / shard_name("model", 0, 2)).unlink()
    with pytest.raises(UserError, match=r"model-tp000of002\.safetensors cannot be read"):
        load_model(sharded)


def rewrite(path: Path, **changes: str) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, **changes})


def test_damaged_headers_are_refused(sharded: Path, full: HybridLM) -> None:
    path = sharded / shard_name("model", 0, 2)
    with safe_open(path, framework="pt") as file:
        entries = json.loads(file.metadata()["entries"])
    rewrite(path, entries="{}")
    with pytest.raises(UserError, match="does not hold what its own header lists"):
        LocalTensors([path], full.config)
    rewrite(path, entries="[")
    with pytest.raises(UserError, match="header of a shard is damaged"):
        LocalTensors([path], full.config)
    tensors = {**load_file(path), "stranger": torch.zeros(2)}
    extent = {"dim": None, "start": 0, "full_shape": [2]}
    save_file(
        tensors, path, metadata={"format": "fathom-shard", "entries": json.dumps({**entries, "stranger": extent})}
    )
    with pytest.raises(UserError, match="'stranger' belongs to no parameter"):
        LocalTensors([path], full.config)
    (sharded / LAYOUT_FILE).write_text('{"format_version": 2}')
    with pytest.raises(UserError, match=r"layout\.json is not the layout"):
        read_layout(sharded)


def test_only_what_is_asked_for_is_a_key(sharded: Path, full: HybridLM) -> None:
    tensors = LocalTensors([sharded / shard_name("model", r, 2) for r in range(2)], full.config)
    with pytest.raises(KeyError):
        tensors["no.such.weight"]
