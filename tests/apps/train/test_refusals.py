"""Bad input: a clear error, the right exit status, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.train import lane, start
from apps.train.arguments import parse_arguments
from apps.train.config import hash_values
from apps.train.data.__main__ import main as data_main
from apps.train.ranks import prepare
from libs.flags.environment import Launch
from libs.flags.errors import UserError
from libs.flags.installed import installed_gates
from libs.flags.runlog import read_events
from libs.model.checkpoint import MARKER, write_manifest

Train = Callable[..., int]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim.lrr", "1"], "did you mean 'optim.lr'"),
        (["--train.steps", "many"], "train.steps = 'many'"),
        (["--model.hidden_size", "40"], "nheads=4"),
        (["--model.vocab_size", "64"], "272"),
        (["--data.dir", "nowhere"], "fathom data build --source installed --out nowhere"),
        (["--data.window", "1000000000"], "corpus too small"),
        (["--data.valid_document_tokens", "2"], "held-out"),
        (["--train.mimo_backend", "tilelung"], "tilelung"),
        (["--log.wandb_project", "p"], "pip install wandb"),
        (["--config", "none.toml"], "none.toml"),
        (["--train.loss_backend", "magic"], "linear_cross_entropy: unknown backend 'magic'"),
        (["--train.loss_backend", "liger"], "set FATHOM_FUSED_LINEAR_CE=liger"),
        (["--train.attention_backend", "magic"], "attention: unknown backend 'magic'"),
        (["--train.attention_backend", "xla"], "cannot run on device 'cpu'"),
        (["--train.seed", str(2**63)], "train.seed = '9223372036854775808'"),
        (["--data.seed", str(2**64)], "data.seed = '18446744073709551616'"),
    ],
)
def test_usage_errors_write_nothing(
    train: Train, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert train("--recipe", recipe, "--run-dir", tmp_path / "run", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "runs").exists()


def test_the_largest_seed_trains(train: Train, recipe: Path) -> None:
    words = ["--train.seed", str(2**63 - 1), "--data.seed", str(2**63 - 1), "--train.stop_after", "1"]
    assert train("--recipe", recipe, *words) == 75


def test_an_empty_recipe_is_not_the_default_one(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ([], ["--show-config"], ["--dry-run"]):
        assert train("--recipe", "", *extra) == 2
        assert "unknown recipe ''" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "[" + ".".join("a" * 3000) + "]\nb = 1"])
def test_settings_nested_too_deeply(
    train: Train, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "deep.toml").write_text(text)
    assert train("--recipe", recipe, "--config", tmp_path / "deep.toml") == 2
    assert "nested too deeply" in capsys.readouterr().err


def test_windows_that_the_replicas_cannot_share(recipe: Path) -> None:
    arguments = parse_arguments(["--recipe", str(recipe), "--data.windows_per_batch", "3"])
    with pytest.raises(UserError, match=r"data\.windows_per_batch = 3 cannot be shared by parallel\.dp = 2"):
        prepare(arguments, Launch(rank=0, local_rank=0, world_size=2, attempt=0))


def test_a_run_that_is_refused_late_is_not_the_latest(
    train: Train, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--recipe", recipe, "--train.stop_after", "1") == 75
    latest = tmp_path / "runs" / "latest"
    first = latest.resolve()

    def refuse(*_: object) -> None:
        raise UserError("no engine today")

    with monkeypatch.context() as patch:
        patch.setattr(start, "build_engine", refuse)
        assert train("--recipe", recipe) == 2
    assert latest.resolve() == first
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_latest_is_a_convenience(
    train: Train, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of that name, or what a killed process of this number left, stops no run."""
    runs = tmp_path / "runs"
    (runs / "latest").mkdir(parents=True)
    (runs / f".latest-{os.getpid()}").write_text("left")
    assert train("--recipe", recipe, "--train.stop_after", "1") == 75
    assert "latest does not point to this run" in capsys.readouterr().err
    assert not list(runs.glob(".latest*"))
    (runs / "latest").rmdir()
    (runs / f".latest-{os.getpid()}").write_text("left")
    assert train("--recipe", recipe, "--train.stop_after", "1") == 75
    assert capsys.readouterr().err == ""
    assert (runs / "latest" / "config.json").is_file()
    assert not list(runs.glob(".latest*"))


def test_a_device_that_is_not_here(
    train: Train, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane.torch.cuda, "is_available", lambda: False)
    assert train("--recipe", recipe, "--run-dir", tmp_path / "run", "--train.device", "cuda") == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert train("--recipe", "h200_8x_bf16") == 2


def test_a_rank_that_cannot_find_the_others_says_so(
    train: Train, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert train("--recipe", recipe) == 2
    assert "rank 0 of 2 could not join the job" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FATHOM_PSIV_CACHE", "yes", "yes"),
        ("FATHOM_PSVI_CACHE", "off", "FATHOM_PSIV_CACHE"),
        ("FATHOM_TMA", "all", "tma"),
    ],
)
def test_refused_gates_leave_a_run_log_and_nothing_else(
    train: Train,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
    said: str,
) -> None:
    monkeypatch.setenv(variable, value)
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run) == 78
    assert said in capsys.readouterr().err
    files = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    assert files == ["audit/rank00000.jsonl", "logs/rank00000.jsonl"]
    found = list(read_events(run))
    assert [e["event"] for e in found] == ["run.start", "config.resolved", "gate.refused", "run.stop"]
    assert (found[-2]["variable"], found[-2]["value"]) == (variable, value)
    assert (found[-1]["status"], found[-1]["exit_code"]) == ("refused", 78)
    assert found[0]["gates_hash"] is None


def test_gates_are_refused_before_the_data_is_looked_for(
    train: Train, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FATHOM_PSIV_CACHE", "yes")
    assert train("--recipe", recipe, "--data.dir", "nowhere") == 78
    assert train("--recipe", recipe, "--dry-run") == 78


def test_show_config_and_dry_run_write_nothing(train: Train, recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert train("--recipe", recipe, "--show-config") == 0
    assert train("--recipe", recipe, "--dry-run") == 0
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def paused(train: Train, recipe: Path, tmp_path: Path) -> Path:
    """A run that stands at step 3."""
    assert train("--recipe", recipe, "--run-dir", tmp_path / "run", "--train.stop_after", "3") == 75
    return tmp_path / "run"


def test_a_used_run_directory(train: Train, recipe: Path, paused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--recipe", recipe, "--run-dir", paused) == 2
    assert f"--resume {paused}" in capsys.readouterr().err


def test_resuming_what_is_no_run(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The runs that are near are named; a run that was refused before it began is told from one that is not there."""
    (tmp_path / "some-run" / "logs").mkdir(parents=True)
    assert train("--resume", tmp_path / "some-ran") == 2
    assert f"no run at {tmp_path / 'some-ran'}; did you mean {tmp_path / 'some-run'}?" in capsys.readouterr().err
    assert train("--resume", tmp_path / "some-run") == 2
    error = capsys.readouterr().err
    assert "not a run of `fathom train`" in error
    assert "start it anew, without --resume" in error


def test_resuming_by_a_bare_name(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "some-run" / "logs").mkdir(parents=True)
    assert train("--resume", "some-run") == 2
    assert "is it --resume runs/some-run?" in capsys.readouterr().err


def test_resuming_a_file(train: Train, paused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = paused / "checkpoints" / "step-00000003" / "model.safetensors"
    for path in (paused / "config.json", weights):
        assert train("--resume", path) == 2
        said = capsys.readouterr().err
        assert f"{path} is a file, not a run or checkpoint folder; did you mean {path.parent}?" in said


def test_the_fp8_recipe_is_no_layout(train: Train, paused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From one to another is refused; with or without is the gate's to say."""
    _edit_config(paused, lambda content: content["parallel"].update(fp8_recipe="delayed"))
    assert train("--resume", paused, "--parallel.fp8_recipe", "blockwise") == 2
    assert "these would make it another run:\n  parallel.fp8_recipe" in capsys.readouterr().err
    assert train("--resume", paused, "--parallel.fp8_recipe", "none", "--parallel.timeout_s", "61") == 0


def test_resume_refuses_other_settings_but_not_equal_ones(
    train: Train, paused: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--resume", paused, "--optim.lr", "0.5") == 2
    said = capsys.readouterr().err
    assert "optim.lr: 0.01 in the run, 0.5 (command line --optim.lr)" in said
    monkeypatch.setenv("FATHOM_TRAIN__OPTIM__LR", "1e-2")
    assert train("--resume", paused) == 0


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _edit_config(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """As one who knows about the hash."""

    def change_both(content: dict[str, Any]) -> None:
        change(content["config"])
        content["config_hash"] = hash_values(content["config"])

    _edit(run / "config.json", change_both)


def _recommit(checkpoint: Path) -> None:
    digest = write_manifest(checkpoint)
    (checkpoint / MARKER).write_text(json.dumps({"manifest_sha256": digest}))


@pytest.mark.parametrize(("field", "value"), [("a_activation", "heavy_tail"), ("d_state", 32)])
def test_a_checkpoint_of_another_model(
    train: Train, paused: Path, capsys: pytest.CaptureFixture[str], field: str, value: object
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["model"]["mixer"][field] = value

    _edit_config(paused, change)
    assert train("--resume", paused) == 2
    said = capsys.readouterr().err
    assert f"mixer.{field}" in said
    assert repr(value) in said
    assert list(read_events(paused))[-1]["exit_code"] == 2


def test_other_data_than_at_the_beginning(
    train: Train, paused: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "other"
    shutil.copytree(corpus.parent / "src", source)
    for path in sorted(source.iterdir())[:5]:
        path.unlink()
    out = tmp_path / "data2"
    words = ["build", "--source", str(source), "--out", str(out), "--tokenizer", "bytes", "--quiet"]
    assert data_main([*words, "--window", "64", "--workers", "1", "--valid-share", "0.2"]) == 0

    def change(content: dict[str, Any]) -> None:
        content["data"]["dir"] = str(out)

    _edit_config(paused, change)
    assert train("--resume", paused) == 2
    assert "data fingerprint" in capsys.readouterr().err


def test_an_edited_config(train: Train, paused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _edit(paused / "config.json", lambda content: content["config"]["optim"].update(lr=0.5))
    assert train("--resume", paused) == 2
    assert "config.json is not what the run began with" in capsys.readouterr().err
    _edit(paused / "config.json", lambda content: content["config"]["optim"].update(lr=0.01))
    assert train("--resume", paused) == 0


def test_a_config_of_an_earlier_version(train: Train, paused: Path) -> None:
    """Which lacks a setting of this one: the hash is that of what was written."""
    _edit_config(paused, lambda content: content["train"].pop("stop_after"))
    assert train("--resume", paused) == 0


def test_another_torch_than_in_the_checkpoint_is_an_anomaly(train: Train, paused: Path) -> None:
    checkpoint = paused / "checkpoints" / "step-00000003"
    _edit(checkpoint / "trainer.json", lambda content: content.update(torch_version="1.0"))
    _recommit(checkpoint)
    assert train("--resume", paused) == 0
    (anomaly,) = (event for event in read_events(paused) if event["event"] == "anomaly.generic")
    assert anomaly["what"] == "resumed with another torch"
    assert anomaly["details"] == {"before": "1.0", "now": str(torch.__version__)}


def test_a_damaged_config(train: Train, paused: Path) -> None:
    (paused / "config.json").write_text("{")
    assert train("--resume", paused) == 2


def test_a_tampered_or_cut_audit_file(train: Train, paused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = paused / "audit" / "rank00000.jsonl"
    original = audit.read_bytes()
    lines = original.splitlines(keepends=True)
    audit.write_bytes(original.replace(b'"value":"off"', b'"value":"all"', 1))
    assert train("--resume", paused) == 2
    assert "tampered" in capsys.readouterr().err
    audit.write_bytes(b"".join(lines[:-2]))  # a valid chain, only shorter: the checkpoint's anchor shows it
    assert train("--resume", paused) == 2
    assert "truncate" in capsys.readouterr().err
    audit.write_bytes(original)
    assert train("--resume", paused) == 0


def test_another_gate_than_in_the_checkpoint(train: Train, paused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = paused / "checkpoints" / "step-00000003"
    _edit(checkpoint / "trainer.json", lambda content: content["gates"].update(tma="fwd"))
    _recommit(checkpoint)
    assert train("--resume", paused) == 78
    assert "--accept-gate-change tma" in capsys.readouterr().err
    assert [e["gate"] for e in read_events(paused) if e["event"] == "gate.refused"] == ["tma"]
    assert train("--resume", paused, "--accept-gate-change", "tmaa") == 2
    assert train("--resume", paused, "--accept-gate-change", "tma") == 0
    changed = [e for e in read_events(paused) if e["event"] == "gate.changed"]
    assert [(e["gate"], e["old"], e["new"]) for e in changed] == [("tma", "fwd", "off")]


def test_gates_are_in_every_checkpoint(train: Train, paused: Path) -> None:
    state = json.loads((paused / "checkpoints" / "step-00000003" / "trainer.json").read_text())
    assert state["gates"] == installed_gates().values()
    assert state["gates_hash"] == installed_gates().hash
    start = next(read_events(paused))
    assert start["gates_hash"] == state["gates_hash"]
    head, length = state["audit_anchor"].split(":")
    assert json.loads((paused / "audit" / "rank00000.jsonl").read_text().splitlines()[int(length) - 1])["hash"] == head


def test_default_run_directory_and_latest(train: Train, recipe: Path, tmp_path: Path) -> None:
    assert train("--recipe", recipe, "--train.steps", "6") == 0
    (run,) = [path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]
    assert "-tiny-" in run.name
    assert (tmp_path / "runs" / "latest").resolve() == run
    assert train("--resume", "runs/latest") == 0


def test_a_checkpoint_under_another_name_or_of_another_run(
    train: Train, recipe: Path, paused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = paused / "checkpoints"
    shutil.copytree(folder / "step-00000003", folder / "step-00000005")
    assert train("--resume", paused) == 2
    assert "holds step 3" in capsys.readouterr().err
    shutil.rmtree(folder / "step-00000005")
    other = tmp_path / "other"
    assert train("--recipe", recipe, "--run-dir", other, "--train.stop_after", "1") == 75
    shutil.copytree(folder / "step-00000003", other / "checkpoints" / "step-00000003")
    assert train("--resume", other) == 2
    assert "a checkpoint of run" in capsys.readouterr().err
