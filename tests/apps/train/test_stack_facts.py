"""What gate xla_scan_layers is told of a config, and what it says to it."""

from __future__ import annotations

import pytest

from apps.train.facts import Machine, facts_of
from apps.train.origins import command_line_layer, recipe_layer, resolve_config
from libs.flags.errors import GateRefused
from libs.flags.facts import Facts
from libs.flags.resolve import resolve

BLOCK = ("--train.activation_checkpointing", "block")


def facts(recipe: str, *words: str, on_xla: bool = True) -> Facts:
    config = resolve_config([recipe_layer(recipe), command_line_layer(words)]).config
    machine = Machine(on_gpu=False, on_xla="xla" if on_xla else None, name="planned", bf16=False, memory_bytes=2**35)
    found = facts_of(config, machine, "xla" if on_xla else "chunked")
    return found.model_copy(update={"packages": {"torch-xla": "2.9.0"}})


def test_the_recipes_of_the_lane_may_loop_over_the_whole_stack() -> None:
    for recipe in ("v6e_4k_dense", "v6e_4k_hybrid"):
        found = facts(recipe)
        assert (found.homogeneous_stack, found.homogeneous_runs, found.activation_checkpointing) == (True, 1, "block")
        assert resolve({"FATHOM_XLA_SCAN_LAYERS": "on"}, found).value("xla_scan_layers") == "on"


def test_a_hybrid_is_refused_with_the_first_difference_unless_runs_are_asked_for() -> None:
    found = facts("cpu_demo", *BLOCK)
    with pytest.raises(GateRefused, match=r"layer 4, kind: <LayerKind.ATTENTION: '\*'>, but <LayerKind.MAMBA: 'M'>"):
        resolve({"FATHOM_XLA_SCAN_LAYERS": "on"}, found)
    assert resolve({"FATHOM_XLA_SCAN_LAYERS": "runs"}, found).value("xla_scan_layers") == "runs"
    with pytest.raises(GateRefused, match="activation_checkpointing = block"):
        resolve({"FATHOM_XLA_SCAN_LAYERS": "runs"}, facts("cpu_demo", "--train.activation_checkpointing", "none"))


def test_elsewhere_nothing_is_said() -> None:
    found = facts("cpu_demo", *BLOCK, on_xla=False)
    assert found.homogeneous_stack is None
    with pytest.raises(GateRefused, match="needs device tpu or xla, this run has cpu"):
        resolve({"FATHOM_XLA_SCAN_LAYERS": "runs"}, found)
