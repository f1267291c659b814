"""FP8 as a run asks for it on a machine that has nothing of what it needs: everything in one refusal; and the plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apps.train import fp8
from apps.train.facts import step_memory
from apps.train.origins import recipe_layer, resolve_config
from libs.flags.facts import Facts
from libs.flags.resolve import resolve
from libs.model.flops import parameter_count
from libs.model.fp8 import fp8_elements
from libs.parallel.mesh import Layout
from tests.apps.train.test_recipes import Train
from tests.support.h200 import H200

VARIABLE = "FATHOM_FP8_PARAM_GATHER"
Said = Callable[[], str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA is told")
def test_everything_that_is_missing_is_listed_at_once(
    train: Train, monkeypatch: pytest.MonkeyPatch, said: Said, recipe: str
) -> None:
    """`fathom train` itself: what the catalogue asks, and what the engine would need, in one refusal."""
    monkeypatch.setenv(VARIABLE, "on")
    assert train("--recipe", recipe, "--parallel.tp", "1", "--data.window", "61", "--data.windows_per_batch", "1") == 78
    found = said()
    assert found.count("refused:") == 1
    for part in (
        "needs device cuda", "transformer-engine", "megatron distributed optimizer", "needs bf16 training",
        "fp8 recipe of tensorwise, blockwise, found none", "needs CUDA, torch has no device", "cannot be imported",
        "cuDNN", "FusedAdam", "61 tokens per matrix product: must be a multiple of 16",
    ):  # fmt: skip
        assert part in found, part


def test_delayed_scaling_is_refused_with_its_reason(
    train: Train, monkeypatch: pytest.MonkeyPatch, said: Said, recipe: str
) -> None:
    monkeypatch.setenv(VARIABLE, "on")
    assert train("--recipe", recipe, "--parallel.fp8_recipe", "delayed") == 78
    assert "recipe delayed is not supported: activation checkpointing computes each block twice" in said()


def test_a_recipe_without_its_gate_does_not_train_in_bf16(train: Train, said: Said, recipe: str) -> None:
    assert train("--recipe", recipe, "--parallel.fp8_recipe", "blockwise") == 2
    assert f"set {VARIABLE}=on, or --parallel.fp8_recipe none to train in bf16" in said()


def test_nothing_missing_leaves_the_gates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped recipe on a machine that has everything; and one thing less."""
    config, layout = resolve_config([recipe_layer("h200_8x_fp8")]).config, Layout(tp=8)
    gates = resolve({}, Facts(packages={}))
    monkeypatch.setenv(VARIABLE, "on")
    monkeypatch.setattr(fp8, "probe", lambda: H200)
    assert fp8.settle_fp8(gates, config, layout) is gates
    monkeypatch.setattr(fp8, "probe", lambda: H200._replace(max_connections=None))
    assert "CUDA_DEVICE_MAX_CONNECTIONS" in str(fp8.settle_fp8(gates, config, layout))


def test_the_plan_says_what_fp8_costs(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--recipe", "h200_8x_fp8", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "FP8 weights (blockwise): " in shown
    assert f"a run asks for {VARIABLE}=on" in shown
    assert train("--recipe", "h200_8x_fp8", "--parallel.fp8_recipe", "none", "--dry-run") == 0
    assert "FP8" not in capsys.readouterr().out


@pytest.mark.parametrize("dp", [1, 2])
def test_bytes_of_parameters_and_state(dp: int) -> None:
    """A parameter in FP8 is two bytes for four, and adds four of main values that replicas share."""
    from apps.train.dry_run import planned_machine, target_device

    config = resolve_config([recipe_layer("h200_8x_fp8")]).config
    bf16 = config.model_copy(update={"parallel": config.parallel.model_copy(update={"fp8_recipe": None})})
    layout = Layout(dp=dp, tp=8 // dp)
    machine = planned_machine(config, target_device(config))
    low, high = (step_memory(one, machine, layout).by_component for one in (config, bf16))
    count = fp8_elements(config.model.architecture(), layout.tp)
    assert 0.7 * parameter_count(config.model.architecture()).total < count * layout.tp
    assert high["parameters"] - low["parameters"] == 2 * count
    assert low["optimizer"] - high["optimizer"] == 4 * count // dp
    others = ("gradients", "activations", "scan_states", "logits_chunk", "workspace")
    assert [low[name] for name in others] == [high[name] for name in others]
