"""`fathom generate` over a small real checkpoint: bytes out, the plan, and errors a user can make."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.eval import generate
from apps.eval.generate import main
from libs.flags import installed
from libs.flags.errors import run_entry
from libs.flags.installed import GateState
from libs.model import HybridLM
from libs.model.checkpoint import resolve_checkpoint
from libs.model.inference import Engine, EngineConfig, Sampling
from libs.model.text.tokenizer import Tokenizer
from libs.model.weights import load_model

PROMPT = b"    const int value_1 = value_2 + "


@pytest.fixture(autouse=True)
def _gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "_PROCESS", GateState())


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    path = tmp_path / "prompt.txt"
    path.write_bytes(PROMPT)
    return str(path)


def expected(run_dir: Path, sampling: Sampling) -> tuple[bytes, tuple[int, ...]]:
    """The engine used directly."""
    checkpoint = resolve_checkpoint(run_dir)
    tokenizer, model = Tokenizer.load(checkpoint / "tokenizer.json"), load_model(checkpoint)
    ids = tokenizer.encode(PROMPT).tolist()
    how = sampling.model_copy(update={"stop_ids": (tokenizer.eod_id,)})
    (found,) = Engine(model, EngineConfig(max_tokens=len(ids) + how.max_new_tokens)).generate([ids], how)
    return tokenizer.decode(found.tokens), found.tokens


def test_weights_that_are_not_finite_give_no_answer(
    run_dir: Path, prompt: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(*args: Any, **options: Any) -> HybridLM:
        model = load_model(*args, **options)
        with torch.no_grad():
            model.final_norm.weight[0] = torch.nan
        return model

    monkeypatch.setattr(generate, "load_model", damaged)
    assert main(["--checkpoint", str(run_dir), "--prompt", prompt]) == 70
    shown = capsys.readouterr()
    assert shown.out.strip() == ""
    assert "logits are not finite" in shown.err


def test_a_file_in_bytes_out(run_dir: Path, prompt: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    options = ["--checkpoint", str(run_dir), "--prompt", prompt, "--max-new-tokens", "12"]
    assert main(options) == 0
    streamed = capfdbinary.readouterr().out
    text, tokens = expected(run_dir, Sampling(max_new_tokens=12))
    assert streamed == text + b"\n"
    assert main([*options, "--json"]) == 0
    shown = json.loads(capfdbinary.readouterr().out)
    assert tuple(shown["tokens"]) == tokens
    assert shown["prompt_tokens"] == len(PROMPT)
    assert len(shown["logprobs"]) == len(tokens)
    assert shown["prefix"] == {"matched": 0, "skipped": 0, "computed": len(PROMPT) + len(tokens) - 1, "reason": "off"}


def test_stdin_and_sampling(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT)))
    options = ["--temperature", "0.8", "--top-k", "40", "--top-p", "0.9", "--seed", "11", "--max-new-tokens", "9"]
    assert main(["--checkpoint", str(run_dir), *options]) == 0
    how = Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=11, max_new_tokens=9)
    assert capfdbinary.readouterr().out == expected(run_dir, how)[0] + b"\n"


def test_drafts_change_no_byte(
    run_dir: Path, prompt: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(installed, "_PROCESS", GateState())
    monkeypatch.setenv("FATHOM_MTP_SPECULATION", "on")
    options = ["--checkpoint", str(run_dir), "--prompt", prompt, "--max-new-tokens", "12", "--draft-length", "2"]
    assert main([*options, "--json"]) == 0
    shown = json.loads(capfdbinary.readouterr().out)
    assert tuple(shown["tokens"]) == expected(run_dir, Sampling(max_new_tokens=12))[1]
    assert shown["counters"]["drafted"] > 0


def test_the_plan_is_what_an_engine_allocates(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint", str(run_dir), "--plan", "--max-tokens", "1000", "--max-batch", "3"]
    assert main([*options, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    engine = Engine(load_model(resolve_checkpoint(run_dir)), EngineConfig(max_tokens=1000, max_batch=3))
    assert shown["by_component"] == engine.plan.by_component
    assert shown["total"] == engine.plan.total
    assert shown["blocks"] == 3 * 16 + 1
    assert main(options) == 0
    assert f"{engine.plan.total:,} bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature=-1.0 is outside"), (["--top-p", "0"], "top_p=0.0"),
        (["--max-new-tokens", "0"], "max_new_tokens"), (["--max-tokens", "20"], "available are max_tokens=20"),
        (["--prompt", "/nonexistent/file"], "cannot be read"), (["--block-size", "3"], "block_size=3"),
        (["--draft-length", "1"], "FATHOM_MTP_SPECULATION=on"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    run_dir: Path, prompt: str, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run_entry(main, ["--checkpoint", str(run_dir), "--prompt", prompt, *options]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_prompt_and_no_checkpoint(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert run_entry(main, ["--checkpoint", str(run_dir), "--prompt", str(empty)]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert run_entry(main, ["--checkpoint", str(tmp_path / "none"), "--prompt", str(empty)]) == 2
    assert "no such run or checkpoint" in capsys.readouterr().err


def test_a_gate_that_cannot_be_had(
    run_dir: Path, prompt: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FATHOM_PREFIX_CACHE", "always")
    assert run_entry(generate.main, ["--checkpoint", str(run_dir), "--prompt", prompt]) == 78
    assert "FATHOM_PREFIX_CACHE" in capsys.readouterr().err
    assert torch.get_num_threads() == 1
