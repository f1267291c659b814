"""Whole parameters into every rank's and back, written apart from what the programs do with shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from libs.model import ModelConfig
from libs.model.sharding import shard_rules


def shard_state_dict(full: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> dict[str, Tensor]:
    """One rank's parameters (or gradients, or optimizer moments) from the full ones."""
    rules = shard_rules(config)
    return {name: rules[name].cut(tensor, rank, size) for name, tensor in full.items()}


def merge_state_dicts(shards: Sequence[Mapping[str, Tensor]], config: ModelConfig) -> dict[str, Tensor]:
    """The full parameters from every rank's, in rank order, segment by segment. A replicated one is rank 0's."""
    full = {}
    for name, rule in shard_rules(config).items():
        ranks = [shard[name] for shard in shards]
        if rule.dim is None:
            full[name] = ranks[0]
            continue
        parts, start = [], 0
        for segment in rule.segments:
            width = segment.width // len(ranks)
            parts += [rank.narrow(rule.dim, start, width) for rank in ranks]
            start += width
        full[name] = torch.cat(parts, rule.dim)
    return full


def join_entries(entries: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Full parameters from full checkpoint entries: the segments of a packed one behind each other."""
    full = {}
    for name, rule in shard_rules(config).items():
        keys = [f"{name}.{segment.key}" if segment.key else name for segment in rule.segments] or [name]
        full[name] = entries[name] if rule.dim is None else torch.cat([entries[key] for key in keys], rule.dim)
    assert {key for key in entries if key not in full} == {
        f"{name}.{s.key}" for name, rule in shard_rules(config).items() for s in rule.segments if s.key
    }, "an entry that belongs to no parameter"
    return full
