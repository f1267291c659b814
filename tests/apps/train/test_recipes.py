"""Every recipe that ships can be read and planned on a machine without its device, and says whether it fits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from apps.train.origins import recipe_layer, recipe_names, resolve_config
from libs.model.sharding import check_tensor_parallel

Train = Callable[..., int]


@pytest.mark.parametrize("name", recipe_names())
def test_it_is_read_and_planned(train: Train, capsys: pytest.CaptureFixture[str], name: str) -> None:
    config = resolve_config([recipe_layer(name)]).config
    check_tensor_parallel(config.model.architecture(), config.parallel.tp)
    status = train("--recipe", name, "--dry-run")
    said = capsys.readouterr().out
    for part in ("parameters", "FLOPs per token", "memory of one training step"):
        assert part in said
    # A TPU is planned by compiling for it (--aot); here its step is only compared with this machine's memory.
    assert (status, " fits" in said) == (0, True) or (config.train.device == "tpu" and "DOES NOT FIT" in said)


@pytest.mark.parametrize("micro_batch", ["8", "10"])
@pytest.mark.parametrize("recipe", ["h200_8x_bf16", "h200_8x_fp8"])
def test_large_micro_batches_on_eight_h200(
    train: Train, capsys: pytest.CaptureFixture[str], recipe: str, micro_batch: str
) -> None:
    """What the recipes' comments offer; and that the plan would say it if one were too large."""
    words = ["--recipe", recipe, "--dry-run", "--data.windows_per_batch"]
    assert train(*words, micro_batch) == 0
    assert "GiB fits" in capsys.readouterr().out
    assert train(*words, "400") == 2
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_the_smoke_recipe_is_the_engine_of_the_large_ones(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    smoke, large = (resolve_config([recipe_layer(name)]).config for name in ("h200_1x_smoke", "h200_8x_bf16"))
    assert smoke.parallel.engine == large.parallel.engine == "megatron"
    assert smoke.train.precision == large.train.precision == "bf16"
    assert (smoke.train.steps, smoke.parallel.layout(1).world_size) == (20, 1)


def test_megatron_is_planned_everywhere_and_run_on_cuda_only(
    train: Train, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    words = ["--recipe", recipe, "--parallel.engine", "megatron"]
    assert train(*words, "--dry-run") == 0
    capsys.readouterr()
    assert train(*words) == 2
    said = capsys.readouterr().err
    assert "needs a CUDA device" in said
    assert "this run is on cpu; allowed here: auto, torch (or --dry-run" in said
    assert train(*words, "--parallel.shard_optimizer", "true", "--dry-run") == 2
    assert "megatron's optimizer is always sharded" in capsys.readouterr().err


def test_gates_hear_of_the_layout(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The facts that gates ask for are those of the planned layout and engine."""
    monkeypatch.setenv("FATHOM_FUSED_LINEAR_CE", "liger")
    monkeypatch.setenv("FATHOM_FP8_PARAM_GATHER", "on")
    assert train("--recipe", "h200_8x_fp8", "--dry-run") == 78
    said = capsys.readouterr().err
    for part in (
        "needs tp = 1, it is 4",
        "needs transformer-engine >=2.9,<2.12",
    ):
        assert part in said
    for part in ("megatron distributed optimizer", "fp8 recipe", "linears that can hold FP8 weights"):
        assert part not in said
