"""How parameters are cut: every rule complete and invertible, packed segments apart, and what cannot be cut refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from libs.flags.errors import UserError
from libs.kernels.loss import linear_cross_entropy
from libs.model import PRESETS, HybridLM, ModelConfig, preset
from libs.model.sharding import (
    check_tensor_parallel,
    legal_tensor_sizes,
    shard_rules,
    to_checkpoint,
)
from libs.parallel.mesh import Group, Groups, Layout, Parallel
from tests.support.sharding import join_entries, merge_state_dicts, shard_state_dict
from tests.support.tensor_parallel import config


def rank_of(rank: int, size: int) -> Parallel:
    """A rank that is built, and never talks."""
    connection: Any = object()
    tp, alone = Group(connection, rank, size, tuple(range(size))), Group()
    return Parallel(Groups(Layout(tp=size), tp, alone, alone, alone, tp))


def full_state(cfg: ModelConfig) -> dict[str, Tensor]:
    """Every entry of every parameter is another number."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in HybridLM(cfg).named_parameters()}
    state, start = {}, 0
    for name, shape in shapes.items():
        state[name] = torch.arange(start, start + shape.numel(), dtype=torch.float64).view(shape)
        start += shape.numel()
    return state


VARIANTS = [config(), config("M-/*/M-", tie_embeddings=False), config("*-"), config("M")]


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_every_preset_has_a_rule(name: str) -> None:
    with torch.device("meta"):
        parameters = dict(HybridLM(preset(name)).named_parameters())
    rules = shard_rules(preset(name))
    assert rules.keys() == parameters.keys()
    for key, rule in rules.items():
        if rule.dim is not None:
            assert sum(segment.width for segment in rule.segments) == parameters[key].shape[rule.dim], key


@pytest.mark.parametrize("cfg", VARIANTS, ids=lambda cfg: cfg.pattern)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_merging_undoes_sharding(cfg: ModelConfig, size: int) -> None:
    full = full_state(cfg)
    shards = [shard_state_dict(full, cfg, rank, size) for rank in range(size)]
    for rank, shard in enumerate(shards):
        with torch.device("meta"):
            local = HybridLM(cfg, parallel=rank_of(rank, size) if size > 1 else None)
        assert {n: t.shape for n, t in shard.items()} == {n: p.shape for n, p in local.named_parameters()}
    merged = merge_state_dicts(shards, cfg)
    assert all(torch.equal(merged[name], tensor) for name, tensor in full.items())


@pytest.mark.parametrize("size", [2, 4])
def test_packed_segments_are_cut_apart(size: int) -> None:
    """in_proj of rank r: heads r of z, x, dd_dt, dd_A and trap, groups r of B and C; written out row by row."""
    cfg = config("M")
    mixer = cfg.mixer
    assert mixer is not None
    full = full_state(cfg)["blocks.0.layer.in_proj.weight"]
    per_group = mixer.mimo_rank * mixer.d_state
    for rank in range(size):
        want, start = [], 0
        units = [(4, mixer.headdim), (4, mixer.headdim), (4, per_group), (4, per_group), (4, 1), (4, 1), (4, 1)]
        for heads, rows in units:
            own = range(rank * heads // size, (rank + 1) * heads // size)
            want += [full[start + head * rows + row] for head in own for row in range(rows)]
            start += heads * rows
        got = shard_state_dict(full_state(cfg), cfg, rank, size)["blocks.0.layer.in_proj.weight"]
        assert torch.equal(got, torch.stack(want))
        plain_slice = full.chunk(size)[rank]
        assert not torch.equal(got, plain_slice)


def test_what_is_replicated() -> None:
    replicated = {name for name, rule in shard_rules(config("M-*-/M")).items() if rule.dim is None}
    mixers = {f"{path}.layer.{n}.weight" for path in ("blocks.0", "mtp.0.blocks.0") for n in ("B_norm", "C_norm")}
    mixers |= {f"{path}.layer.angle_proj.weight" for path in ("blocks.0", "mtp.0.blocks.0")}
    norms = {f"blocks.{i}.norm.weight" for i in range(4)} | {"mtp.0.blocks.0.norm.weight", "final_norm.weight"}
    depth = {f"mtp.0.{n}.weight" for n in ("hidden_norm", "embedding_norm", "join_proj", "final_norm")}
    assert replicated == mixers | norms | depth


@pytest.mark.parametrize("cfg", VARIANTS, ids=lambda cfg: cfg.pattern)
def test_checkpoint_entries_fit_every_layout(cfg: ModelConfig) -> None:
    """Entries written by four ranks, put together by their own positions, give the full model and any other layout."""
    full, entries = full_state(cfg), {}
    for rank in range(4):
        for key, part in to_checkpoint(shard_state_dict(full, cfg, rank, 4), cfg, rank, 4).items():
            whole = entries.setdefault(key, torch.full(part.full_shape, torch.nan, dtype=torch.float64))
            if part.dim is None:
                whole.copy_(part.tensor)
            else:
                whole.narrow(part.dim, part.start, part.tensor.shape[part.dim]).copy_(part.tensor)
    assert all(tensor.isfinite().all() for tensor in entries.values())
    restored = join_entries(entries, cfg)
    assert all(torch.equal(restored[name], tensor) for name, tensor in full.items())
    if cfg.mixer is not None and cfg.pattern.startswith("M"):
        packed = [key.rsplit(".", 1)[1] for key in entries if key.startswith("blocks.0.layer.in_proj.weight.")]
        assert packed == ["z", "x", "B", "C", "dd_dt", "dd_A", "trap"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_initial_values_are_the_same_for_every_tp(size: int, tied: bool) -> None:
    cfg = config("M-*-/M", tie_embeddings=tied)
    whole = HybridLM(cfg)
    whole.reset_parameters(7)
    shards = []
    for rank in range(size):
        local = HybridLM(cfg, parallel=rank_of(rank, size))
        local.reset_parameters(7)
        shards.append(dict(local.named_parameters()))
    merged = merge_state_dicts(shards, cfg)
    assert all(torch.equal(merged[name], parameter) for name, parameter in whole.named_parameters())


def changed(part: str, **values: int) -> ModelConfig:
    data = config().model_dump()
    data[part] = data[part] | values
    return ModelConfig.parse(data)


@pytest.mark.parametrize(
    ("cfg", "size", "shown"),
    [
        (config(), 3, r"mixer nheads=4 and ngroups=4 must be divisible by tp, which allows tp = 1, 2, 4"),
        (config(), 0, r"tp=0 cannot shard"),
        (changed("mixer", ngroups=1), 2, r"nheads=4 and ngroups=1 .* allows tp = 1\nlegal tp for this model: 1$"),
        (changed("mixer", ngroups=2), 4, r"ngroups=2 .* allows tp = 1, 2\nlegal tp for this model: 1, 2$"),
        (changed("attention", kv_heads=2), 4, r"attention nheads=4 and kv_heads=2 .* allows tp = 1, 2"),
        (changed("mlp", width=66), 4, r"mlp width=66 .* allows tp = 1, 2, 3, 6, 11, 22, 33, 66"),
        (
            config().model_copy(update={"vocab_size": 63}),
            2,
            r"vocab_size=63 .*tp = 1, 3, 7, 9, 21, 63\nlegal tp for this model: 1$",
        ),
    ],
)
def test_refuses_a_tp_that_does_not_divide(cfg: ModelConfig, size: int, shown: str) -> None:
    with pytest.raises(UserError, match=shown):
        check_tensor_parallel(cfg, size)
    if size > 1:
        with pytest.raises(UserError, match=shown):
            HybridLM(cfg, parallel=rank_of(0, size))


def test_every_failing_part_is_listed_and_only_those() -> None:
    with pytest.raises(UserError) as caught:
        check_tensor_parallel(preset("cpu_demo"), 2)
    assert "mixer nheads=4 and ngroups=1" in str(caught.value)
    assert "attention nheads=4 and kv_heads=1" in str(caught.value)
    assert "mlp" not in str(caught.value)
    assert legal_tensor_sizes(preset("h200_8x")) == [1, 2, 4, 8]
    assert legal_tensor_sizes(config("-")) == [1, 2, 4, 8, 16, 32, 64]


def test_the_reference_loss_does_not_split_the_vocabulary() -> None:
    group = rank_of(0, 2).tp
    with pytest.raises(ValueError, match=r"'reference' cannot split the vocabulary over 2 ranks; able: chunked"):
        linear_cross_entropy(
            torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long), backend="reference", group=group
        )
