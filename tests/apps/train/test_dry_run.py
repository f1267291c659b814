"""The plan: numbers by formula, and an exit status that says whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apps.train.origins import recipe_names
from libs.model import parameter_count, preset

Train = Callable[..., int]


def test_it_fits_or_it_does_not(train: Train, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", recipe, "--dry-run"]
    assert train(*words, "--train.device_memory", "1GB") == 0
    said = capsys.readouterr().out
    for part in ("45,032", "optimizer", "activations", "FLOPs per token", "953.7 MiB (train.device_memory)"):
        assert part in said
    assert train(*words, "--train.device_memory", "100KB") == 2
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["--train.loss_backend", "--train.attention_backend"])
def test_a_backend_that_cannot_be_is_not_planned(
    train: Train, recipe: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    on_tpu = ("--train.device", "tpu", "--xla.fsdp", "4", "--data.windows_per_batch", "4")
    assert train("--recipe", recipe, "--dry-run", setting, "magic") == 2
    assert "unknown backend 'magic'" in capsys.readouterr().err
    assert train("--recipe", recipe, "--dry-run", setting, "xla") == 2
    assert "cannot run on device 'cpu'" in capsys.readouterr().err
    assert train("--recipe", recipe, "--dry-run", setting, "xla", *on_tpu) == 0


def test_the_large_recipe_is_planned_without_the_device(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "h200_8x_bf16", "--dry-run"]
    assert train(*words) == 0
    said = capsys.readouterr().out
    assert f"{parameter_count(preset('h200_8x')).total:,}" in said
    assert "NVIDIA H200: 139.000 GiB" in said
    assert train(*words, *ALONE, "--train.device_name", "NVIDIA H100 80GB HBM3", "--data.window", "65536") == 2
    assert train(*words, "--train.device_name", "NVIDIA B200") == 2
    assert "NVIDIA B200" in capsys.readouterr().err


def row(said: str, title: str, name: str) -> list[str]:
    """The cells of a row of a table of the plan."""
    lines = said[said.index(title) :].splitlines()
    found = next(line for line in lines if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in found.split("│")[2:-1]]


def test_the_plan_of_eight_ranks(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """Per rank: its parameters, its memory, what it sends. The plan checks its own counts by the rules of cutting."""
    words = ["--recipe", "h200_8x_bf16", "--dry-run"]
    assert train(*words) == 0
    said = capsys.readouterr().out
    replicated = 4 * 8  # whatever is whole on every rank is counted eight times
    whole = parameter_count(preset("h200_8x")).total
    of_rank = int(row(said, "parameters of one of 8 ranks", "total")[0].replace(",", ""))
    assert whole / 8 < of_rank < whole / 8 + whole / replicated
    sent = " ".join(said.split())
    assert "psiv_cache │ 0.000 GiB │ 0.875 GiB" in sent  # 8192 tokens, 16 heads of 64, rank 4, 14 layers
    off, on = (float(cell.split()[0]) for cell in row(said, "memory of one training step on each rank", "total"))
    assert on - off == pytest.approx(0.875, abs=2e-3)
    assert f"the estimate of {off:.3f} GiB fits" in said
    assert f"with gate psiv_cache on instead: the estimate of {on:.3f} GiB fits" in said
    # 34 blocks, 8 micro-batches of 8192 tokens: output in bf16 forward twice, input's gradient in fp32.
    layers = 34 * 8 * 8192 * 4096 * (2 * 2 + 4) * 2 * 7 / 8 / 2**30
    assert f"tp layers │ {layers:.3f} GiB" in sent
    assert "dp gradients │ 0.000 GiB" in sent
    assert "dp parameters │ 0.000 GiB" in sent


def test_replicas_send_gradients_and_parameters_and_fp8_parameters_as_bytes(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between two replicas half of either goes over the link; an FP8 weight is one byte instead of four."""
    of_rank = 1_125_198_464
    in_fp8 = 958_660_608
    layout = ["--parallel.dp", "2", "--parallel.tp", "4", "--data.windows_per_batch", "2"]

    def sent(recipe: str, *words: str) -> tuple[str, str]:
        assert train("--recipe", recipe, *layout, *words, "--dry-run") == 0
        said = capsys.readouterr().out
        assert f"{of_rank:,}" in said
        gradients, parameters = (row(said, "sent by each rank", name)[0] for name in ("dp gradients", "dp parameters"))
        return gradients, parameters

    whole = f"{of_rank * 4 / 2 / 2**30:.3f} GiB"
    assert sent("h200_8x_bf16") == (whole, whole)
    torch_engine = ("--parallel.engine", "torch")
    assert sent("h200_8x_bf16", *torch_engine) == (f"{of_rank * 4 / 2**30:.3f} GiB", "0.000 GiB")
    assert sent("h200_8x_bf16", *torch_engine, "--parallel.shard_optimizer", "true")[1] == whole
    assert sent("h200_8x_fp8") == (whole, f"{(of_rank * 4 - in_fp8 * 3) / 2 / 2**30:.3f} GiB")


def test_the_plan_of_a_tpu_is_for_one_chip_of_its_slice(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """Not for this machine's memory. A chip holds a fourth of what fsdp = 4 cuts, and works on a fourth of the rows."""
    words = ["--recipe", "v6e_4k_hybrid", "--dry-run"]
    assert train(*words) == 0
    said = capsys.readouterr().out
    assert "TPU v6e: 31.500 GiB (one of 4 chips of v6e-4" in said
    whole = parameter_count(preset("130m")).total
    assert f"{4 * whole / 4 / 2**30:.3f} GiB" in row(said, "memory of one training step", "parameters")[0]
    assert train(*words, "--xla.fsdp", "1") == 0
    alone = capsys.readouterr().out
    assert "one of 1 chips of v6e-1" in alone
    assert f"{4 * whole / 2**30:.3f} GiB" in row(alone, "memory of one training step", "parameters")[0]
    cut, all_rows = (
        float(row(text, "memory of one training step", "activations")[0].split()[0]) for text in (said, alone)
    )
    assert all_rows == pytest.approx(4 * cut, rel=0.2)
    assert train(*words, "--data.windows_per_batch", "1024") == 2
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert train(*words, "--xla.fsdp", "2") == 2
    assert "no TPU slice of 2 chips is known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parallel.tp", "16"], "tp=16 cannot shard"),
        (["--parallel.dp", "3", "--parallel.tp", "1"], "cannot be shared by parallel.dp = 3"),
    ],
)
def test_layouts_that_cannot_be(train: Train, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert train("--recipe", "h200_8x_bf16", "--dry-run", *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name.startswith("h200")])
def test_every_large_recipe_fits(train: Train, recipe: str) -> None:
    assert train("--recipe", recipe, "--dry-run") == 0


ALONE = ["--parallel.tp", "1", "--parallel.sequence_parallel", "false"]
HOPPER = ["--recipe", "h200_8x_bf16", "--dry-run", "--train.mimo_backend", "tilelang"]
SMALLER = ["--data.window", "1024"]


def test_gates_are_planned_for_the_device_that_is_not_here(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An H200 has what the Hopper gates need; this machine only lends its TileLang."""
    for name, value in {"TMA": "all", "WARP_SPECIALIZATION": "all", "PSIV_CACHE": "gmem_pool"}.items():
        monkeypatch.setenv(f"FATHOM_{name}", value)
    assert train(*HOPPER, *SMALLER) == 0
    said = " ".join(capsys.readouterr().out.split())
    # 1024 tokens, 16 of 128 heads of 64, rank 4, two bytes, 14 layers.
    assert f"psiv_cache │ 0.000 GiB │ {1024 * 16 * 64 * 4 * 2 * 14 / 2**30:.3f} GiB" in said
    assert "psiv_cache on (as set)" in said
    assert "with gate psiv_cache off instead: the estimate of" in said
    assert train(*HOPPER[:3], *SMALLER) == 78
    assert "scan backend chunked has no stage gmem_pool" in capsys.readouterr().err
    monkeypatch.setenv("FATHOM_SPLIT_SCAN", "on")
    assert train(*HOPPER, *SMALLER) == 0
    assert train(*HOPPER, *SMALLER, *ALONE, "--train.device_memory", "70GB") == 78
    assert "bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train.device_name", "Tesla", "--train.device_memory", "80GB"], "Tesla is not known to be"),
        (["--train.precision", "fp32"], "computes in bf16"),
        (["--model.mixer.d_state", "96"], "N=96, P=64, R=4, C=16; nearest"),
    ],
)
def test_the_hopper_kernels_are_planned_where_they_can_run(
    train: Train, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert train(*HOPPER, *SMALLER, *words) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_backend_is_not_planned(train: Train, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--recipe", recipe, "--dry-run", "--train.mimo_backend", "tilelung") == 2
    assert "unknown backend 'tilelung'" in capsys.readouterr().err
