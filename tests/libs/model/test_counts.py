"""Counts equal built models, FLOPs equal torch's counter, twins are equal, memory is near."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from libs.flags.errors import UserError
from libs.model import PRESETS, HybridLM, ModelConfig, dense_twin, flops_per_token, memory, parameter_count, preset
from libs.model.flops import FORMULA_VERSION, scan_flops
from libs.model.memory import memory_estimate

Make = Callable[..., ModelConfig]


def on_meta(config: ModelConfig) -> HybridLM:
    with torch.device("meta"):
        return HybridLM(config)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_built_on_meta_with_the_counted_parameters(name: str) -> None:
    model = on_meta(preset(name))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(preset(name)).total


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": False},
        {"mixer__outproj_norm": True, "mixer__ngroups": 2},
        {"mixer__mimo_rank": 4, "mixer__rotary_dim_divisor": 2, "pattern": "MM/M/*-"},
        {"attention__kv_heads": 1},
    ],
)
def test_parameters_per_layer_type_equal_a_built_model(config_with: Make, changes: dict[str, Any]) -> None:
    config = config_with(**changes)
    model, count = HybridLM(config), parameter_count(config)
    found: dict[str, int] = dict.fromkeys(count.by_layer_type, 0)
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        key = config.layers.trunk[int(name.split(".")[1])].value if part == "blocks" else part
        found[key] += parameter.numel()
    assert found == count.by_layer_type
    assert count.total - count.active == found["mtp"] if config.mtp_depth else count.total == count.active


@pytest.mark.parametrize("name", [name for name in PRESETS if name + "_dense" in PRESETS])
def test_dense_twin_has_equal_parameters(name: str) -> None:
    hybrid, twin = preset(name), preset(name + "_dense")
    assert twin == dense_twin(hybrid)
    assert "M" not in twin.pattern
    assert len(twin.pattern) == len(hybrid.pattern)
    target = parameter_count(hybrid).total
    assert abs(parameter_count(twin).total - target) < 0.005 * target


def test_no_twin_of_a_model_without_mixer_or_mlp(config_with: Make) -> None:
    with pytest.raises(UserError, match="no 'M' to replace"):
        dense_twin(config_with("*-"))
    with pytest.raises(UserError, match="at least one '-'"):
        dense_twin(config_with("M*"))


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"cpu_dem.*cpu_demo"):
        preset("cpu_dem")


def test_sizes_are_those_the_names_promise() -> None:
    totals = {name: parameter_count(config).total for name, config in PRESETS.items()}
    assert 1.8e6 < totals["cpu_demo"] < 2.3e6
    assert totals["cpu_tiny"] < 1e5
    assert 1.1e8 < totals["130m"] < 1.5e8
    assert 0.9e9 < totals["1b"] < 1.4e9
    assert 4e9 < totals["h200_8x"] < 5e9


@pytest.mark.parametrize("changes", [{"pattern": "-"}, {"pattern": "M-M", "mixer__ngroups": 2}, {"pattern": "*-/*-/-"}])
def test_projection_flops_equal_torchs_counter(config_with: Make, changes: dict[str, Any]) -> None:
    config, tokens = config_with(**changes), 16
    # Plain mm is a product with a weight; the scan and attention are batched products or fused operators.
    model = HybridLM(config)
    ids = torch.randint(0, config.vocab_size, (1, tokens))
    with FlopCounterMode(display=False) as counter:
        model.loss(ids, ids)
    by_op: dict[Any, int] = counter.get_flop_counts()["Global"]
    measured = sum(flops for op, flops in by_op.items() if str(op) in ("aten.mm", "aten.addmm"))
    expected = flops_per_token(config, tokens).by_part["projection"] * tokens
    assert measured == expected


def test_scan_flops_are_those_of_the_reference_shape() -> None:
    mixer = preset("130m").mixer
    assert mixer is not None
    reference = mixer.model_copy(update={"nheads": 16})
    assert scan_flops(reference) * 8192 == 16 * 512 * (2 * 64**2 * 128 + 4 * 64 * 64 * 64)  # 17.2 GFLOP
    assert round(scan_flops(reference) * 8192 / 1e9, 1) == 17.2


def test_flops_by_type_and_by_part_have_one_total() -> None:
    count = flops_per_token(preset("130m"), 2048)
    assert count.formula_version == FORMULA_VERSION
    assert count.forward == pytest.approx(sum(count.by_part.values()))
    assert count.train == 3 * count.forward
    longer = flops_per_token(preset("130m"), 2048, mean_context=4097 / 2).by_part["attention_scores"]
    assert longer > 1.9 * count.by_part["attention_scores"]


def saved_bytes(model: HybridLM, tokens: int, dtype_bytes: int) -> int:
    """Bytes of distinct storages that autograd keeps between forward and backward, parameters left out."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    documents = torch.tensor([0, tokens // 3, tokens])
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype_bytes == 2),
    ):
        model.loss(ids, ids, cu_seqlens=documents)
    return sum(storages.values())


@pytest.mark.parametrize("dtype_bytes", [4, 2])
@pytest.mark.parametrize("pattern", ["M", "*", "-", "M-M-*-M-", "*-*-*-*-", "M-*-/*-"])
def test_activations_are_what_autograd_saves(pattern: str, dtype_bytes: int) -> None:
    """Each kind of layer alone, and together; at the head's backward all of them are there."""
    config = ModelConfig.parse({**preset("cpu_demo").model_dump(), "pattern": pattern, "vocab_size": 256})
    sizes = memory._Sizes(512, 512, dtype_bytes, fused_norm=False)
    expected = sum(stage.saved + stage.scan for stage in memory._stages(config, sizes, "cpu"))
    assert saved_bytes(HybridLM(config), 512, dtype_bytes) == pytest.approx(expected, rel=0.04)


def test_a_composed_norm_saves_more_than_a_fused_one() -> None:
    config = preset("cpu_demo")
    on_cpu, on_gpu = (
        memory_estimate(config, tokens=2048, dtype_bytes=4, device_type=device) for device in ("cpu", "cuda")
    )
    assert on_gpu.by_component["activations"] < on_cpu.by_component["activations"]


def test_gradients_come_with_the_backward_unless_they_stay() -> None:
    """With many activations most is held while the last block's are there, and few gradients."""
    config = preset("cpu_demo")
    few, many, kept = (
        memory_estimate(config, tokens=tokens, dtype_bytes=4, device_type="cpu", gradients_kept=keep)
        for tokens, keep in ((1, False), (2048, False), (2048, True))
    )
    n = parameter_count(preset("cpu_demo")).total
    assert few.by_component["gradients"] == 4 * n
    assert many.at == "the backward of a block -"
    assert 0 < many.by_component["gradients"] < 4 * n
    assert kept.total == many.total + 4 * n - many.by_component["gradients"]


def test_memory_components_follow_their_meaning() -> None:
    config = preset("h200_8x")
    plain = memory_estimate(config, tokens=8192, dtype_bytes=2)
    recomputed = memory_estimate(config, tokens=8192, dtype_bytes=2, activation_checkpointing="block")
    n = parameter_count(config).total
    assert plain.by_component["parameters"] == plain.by_component["gradients"] == 4 * n
    assert plain.by_component["optimizer"] == 8 * n
    assert plain.total == sum(plain.by_component.values())
    assert recomputed.by_component["activations"] < plain.by_component["activations"] / 4
    assert memory_estimate(config, tokens=16384, dtype_bytes=2).total > plain.total
    with pytest.raises(UserError, match="adamm"):
        memory_estimate(config, tokens=1, dtype_bytes=2, optimizer="adamm")
