"""`fathom checkpoint`: verify finds every damaged byte, inspect tells what is there, an export computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from apps.cli import dispatch
from apps.eval.results import read_result
from apps.train.checkpoint import export as export_module
from apps.train.save import checkpoint_dir
from libs.flags.errors import run_entry
from libs.model import HybridLM, parameter_count
from libs.model.checkpoint import commit, resolve_checkpoint, staging_directory
from libs.model.shard_files import shard_name
from libs.model.weights import load_model
from tests.apps.eval.small_run import build_data_dir
from tests.support import sharded_files
from tests.support.sharded_files import parameters, write_checkpoint


@pytest.fixture(scope="module")
def full() -> HybridLM:
    return sharded_files.model()


@pytest.fixture
def run(tmp_path: Path, full: HybridLM) -> Path:
    """A run that saved step 1 alone and step 2 on two tensor-parallel ranks."""
    path = tmp_path / "run"
    write_checkpoint(path, 1, full, 1)
    write_checkpoint(path, 2, full, 2)
    return path


def fathom(*words: object) -> int:
    return run_entry(dispatch, ["checkpoint", *(str(word) for word in words)])


def test_verify(run: Path, full: HybridLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert fathom("verify", run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "ok"]
    count = len(parameters(full))
    assert all(f"{count} parameters, {3 * count} optimizer tensors" in line for line in lines)
    assert fathom("verify", checkpoint_dir(run, 2)) == 0


def test_verify_finds_one_flipped_bit_among_several_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint_dir(run, 2) / shard_name("optimizer", 1, 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert fathom("verify", run) == 2
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["ok", "damaged"]
    assert "1 of 2 checkpoints are damaged" in err
    assert f"{path.name} has sha256" in err


def test_verify_finds_a_shard_that_was_never_written(
    run: Path, full: HybridLM, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every checksum is right: rank 1's file was just not there when rank 0 committed."""
    staging = staging_directory(checkpoint_dir(run, 3))
    for path in checkpoint_dir(run, 2).iterdir():
        if path.name not in ("MANIFEST.json", "COMMITTED", shard_name("model", 1, 2)):
            (staging / path.name).write_bytes(path.read_bytes())
    layout = staging / "layout.json"
    layout.write_text(layout.read_text().replace(f',"{shard_name("model", 1, 2)}"', ""))
    commit(staging, checkpoint_dir(run, 3))
    assert fathom("verify", checkpoint_dir(run, 3)) == 2
    assert "a shard is missing" in capsys.readouterr().err


def test_nothing_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fathom("verify", tmp_path / "nowhere") == 2
    assert "no such run or checkpoint" in capsys.readouterr().err
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert fathom("verify", tmp_path / "empty") == 2
    assert "no committed checkpoint" in capsys.readouterr().err


def test_inspect(run: Path, full: HybridLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert fathom("inspect", run, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 2
    assert found["layout"] == {"dp": 2, "cp": 1, "tp": 2}
    assert found["training"]["gates"] == {"psiv_cache": "off"}
    assert found["training"]["data_fingerprint"] == "d"
    assert found["parameters"] == parameter_count(full.config).total
    rows = {row["name"]: row for row in found["tensors"]}
    name = "blocks.0.layer.in_proj.weight"
    assert rows[name] == {"name": name, "dtype": "F32", "shape": list(parameters(full)[name].shape), "pieces": 2}
    assert len(found["optimizer_tensors"]) == 3 * len(rows)
    assert fathom("inspect", run) == 0
    shown = capsys.readouterr().out
    assert "written by dp=2 cp=1 tp=2" in shown
    assert "psiv_cache=off" in shown
    assert "in_proj" in shown


@pytest.mark.parametrize("step", [1, 2])
def test_an_export_is_the_model_and_evaluates(
    run: Path, full: HybridLM, tmp_path: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    assert fathom("export", checkpoint_dir(run, step), "--out", out) == 0
    assert "largest difference 0" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        *("model.safetensors", "model.json", "tokenizer.json", "export.json", "MANIFEST.json", "COMMITTED")
    }
    loaded = load_model(resolve_checkpoint(out))
    assert all(torch.equal(p, parameters(full)[n]) for n, p in parameters(loaded).items())
    assert json.loads((out / "export.json").read_text())["step"] == step
    assert fathom("verify", out) == 0
    assert fathom("inspect", out) == 0
    assert "an exported model" in capsys.readouterr().out
    data, result = build_data_dir(tmp_path / "data", {"train": [600], "valid": [300, 500, 700]}), tmp_path / "r.json"
    words = ["eval", "--checkpoint", out, "--data", data, "--out", result, "--suite", "loss_by_position"]
    words += ["--span-tokens", "32", "--detached"]
    assert run_entry(dispatch, [str(word) for word in words]) == 0
    assert read_result(result).checkpoint.parameters == parameter_count(full.config).total


def test_an_export_that_computes_something_else_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = export_module.save_model

    def wrong(folder: Path, model: HybridLM) -> None:
        with torch.no_grad():
            model.final_norm.weight[0] += 1e-3
        write(folder, model)

    monkeypatch.setattr(export_module, "save_model", wrong)
    assert fathom("export", run, "--out", tmp_path / "exported") == 2
    assert "does not compute what the checkpoint does" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_never_replaces_anything(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    assert fathom("export", run, "--out", tmp_path / "there") == 2
    assert "exists already" in capsys.readouterr().err
    (checkpoint_dir(run, 2) / "trainer.json").write_text("{}")
    assert fathom("export", run, "--out", tmp_path / "new") == 2
    assert "corrupt checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
