"""What gate pallas_attention is told of a config: every length that attention is given, and the precision."""

from __future__ import annotations

import pytest

from apps.train.config import TrainConfig
from apps.train.facts import Machine, facts_of
from apps.train.origins import command_line_layer, recipe_layer, resolve_config
from libs.flags.facts import Facts


def facts(recipe: str, *words: str, bf16: bool = True, on_xla: bool = True) -> Facts:
    config: TrainConfig = resolve_config([recipe_layer(recipe), command_line_layer(words)]).config
    machine = Machine(on_gpu=False, on_xla="tpu" if on_xla else None, name="planned", bf16=bf16, memory_bytes=2**35)
    return facts_of(config, machine, "xla" if on_xla else "chunked")


@pytest.mark.parametrize("recipe", ["v6e_4k_dense", "v6e_16k_hybrid", "v6e_64k_dense"])
def test_the_recipes_of_the_lane_are_in_the_table(recipe: str) -> None:
    found = facts(recipe)
    assert found.attention_in_tile_table is True
    assert found.attention_tile_refusal is None
    assert facts(recipe, bf16=False).attention_in_tile_table is True


def test_a_length_of_validation_counts_too() -> None:
    found = facts("v6e_16k_dense", "--data.valid_document_tokens", "1000")
    assert found.attention_in_tile_table is False
    assert "the nearest is S=1024" in str(found.attention_tile_refusal)


def test_elsewhere_and_without_attention_nothing_is_said() -> None:
    assert facts("v6e_16k_dense", on_xla=False).attention_in_tile_table is None
    assert facts("cpu_demo", "--model.preset", "cpu_tiny", "--model.pattern", "M-").attention_in_tile_table is None
