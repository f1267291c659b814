"""Our mixer dropped into Megatron-core's MambaModel, on two gloo processes, with nothing patched."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from libs.flags.errors import UserError
from libs.model.megatron import MegatronMixer, megatron_mixer_spec
from libs.parallel.mesh import Layout
from tests.support import megatron_mixer
from tests.support.ranks import run_ranks
from tests.support.tensor_parallel import config


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(megatron_mixer.check, Layout(tp=2))


@pytest.mark.parametrize("name", ["whole", "packed"])
def test_tp2_equals_tp1(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank[f"{name} loss"] < 1e-6
        assert max(rank[f"{name} gradients"].values()) < 1e-5
        assert len(rank[f"{name} gradients"]) == 2 * 13


def test_sequence_parallel_gives_each_rank_its_tokens(ranks: list[dict[str, Any]]) -> None:
    assert all(max(rank["sequence parallel"].values()) < 5e-6 for rank in ranks)


def of_size(size: int) -> Any:
    return SimpleNamespace(size=lambda: size)


@pytest.mark.parametrize(
    ("changes", "groups", "problem"),
    [
        ({"d_model": 64}, {}, r"hidden_size=64, model 'cpu_tiny' has 32"),
        ({"layer_number": 2}, {}, r"layer 2 is a mixer, but pattern 'M-M' has no 'M' there"),
        ({"layer_number": 4}, {}, r"layer 4 is a mixer"),
        ({}, {"cp": of_size(2)}, r"context_parallel_size=2"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict[str, Any], groups: dict[str, Any], problem: str) -> None:
    options = {"d_model": 32, "layer_number": 1, "model": config("M-M"), "seed": 0, "backend": "auto"} | changes
    collection = SimpleNamespace(**({"tp": of_size(1)} | groups))
    with pytest.raises(UserError, match=problem):
        MegatronMixer(SimpleNamespace(sequence_parallel=False), pg_collection=collection, **options)


def test_refuses_to_decode_and_a_model_without_mixers() -> None:
    mixer = MegatronMixer(
        SimpleNamespace(sequence_parallel=False), d_model=32, layer_number=1, model=config("M"), seed=0, backend="auto",
        pg_collection=SimpleNamespace(tp=of_size(1)),
    )  # fmt: skip
    with pytest.raises(UserError, match="trains only"):
        mixer(torch.zeros(4, 1, 32), inference_context=object())
    with pytest.raises(UserError, match="has no 'M'"):
        megatron_mixer_spec(config("*-"), seed=0)


def test_the_loss_is_one_and_documents_matter(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["whole value"] == ranks[1]["whole value"] == pytest.approx(1.25 * math.log(64), rel=0.1)
    assert ranks[0]["whole value"] != ranks[0]["packed value"]


def test_checkpoint_entries_name_each_segment(ranks: list[dict[str, Any]]) -> None:
    """Global height and this rank's offset of every segment of in_proj: no slice of one is a part of another."""
    heights = {"z": 64, "x": 64, "B": 128, "C": 128, "dd_dt": 4, "dd_A": 4, "trap": 4}
    for index, rank in enumerate(ranks):
        want = {f"mixer.in_proj.weight.{key}": (width, index * width // 2) for key, width in heights.items()}
        assert rank["keys"] == want


def test_marks_and_precision_survive_megatron(ranks: list[dict[str, Any]]) -> None:
    replicated = {"angle_proj.weight", "B_norm.weight", "C_norm.weight"}
    assert len(ranks[0]["marked"]) == 13 - len(replicated)
    assert not replicated & set(ranks[0]["marked"])
    assert ranks[0]["kept"] is True
