"""How every parameter of `HybridLM` is cut over the tensor-parallel group: one rule each, in both directions.

Packed projections (in_proj, qkv, gate_up) are cut segment by segment: a plain slice of the packed rows would give rank
0 nothing but z. Not for communication (libs.parallel) nor for files; the keys a file should use are here, because a
segment keeps its meaning under every layout and a packed local shard does not.
"""
# H heads  G groups  R rank  N state  P headdim  K head width

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from libs.flags.errors import UserError
from libs.model.config import AttentionConfig, MixerConfig, MlpConfig, ModelConfig
from libs.model.pattern import LayerKind
from libs.parallel.xla.topology import MeshShape, Partition, parameter_partition


class Segment(NamedTuple):
    """`width` consecutive entries of the full parameter that mean one thing; `key` is "" when it is the only one."""

    key: str
    width: int


class ShardRule(NamedTuple):
    """`dim`: the axis that is cut, None for a replicated parameter. `segments`: along it, each cut on its own."""

    dim: int | None
    segments: tuple[Segment, ...] = ()

    def cut(self, full: Tensor, rank: int, size: int) -> Tensor:
        """This rank's shard of the full parameter (`full` itself when nothing is cut)."""
        if self.dim is None or size == 1:
            return full
        parts = torch.split(full, [segment.width for segment in self.segments], self.dim)
        return torch.cat([part.chunk(size, self.dim)[rank] for part in parts], self.dim)

    def full_shape(self, shard: torch.Size, size: int) -> torch.Size:
        """Shape of the full parameter of which `shard` is one of `size`."""
        if self.dim is None:
            return shard
        return torch.Size(width * size if axis == self.dim else width for axis, width in enumerate(shard))


REPLICATED = ShardRule(None)


def _along(dim: int, width: int) -> ShardRule:
    return ShardRule(dim, (Segment("", width),))


def mixer_rules(mixer: MixerConfig) -> dict[str, ShardRule]:
    """Rules of `MambaMixer`: heads for z, x, dd_dt, dd_A, trap and everything per head; groups for B and C."""
    names = ("z", "x", "B", "C", "dd_dt", "dd_A", "trap")
    packed = tuple(Segment(name, width) for name, width in zip(names, mixer.packed_widths, strict=True))
    per_head = ("dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")
    rules = {"in_proj.weight": ShardRule(0, packed), "out_proj.weight": _along(1, mixer.inner)}
    rules |= dict.fromkeys(("angle_proj.weight", "B_norm.weight", "C_norm.weight"), REPLICATED)
    rules |= dict.fromkeys(per_head, _along(0, mixer.nheads))
    return rules | ({"out_norm": _along(0, mixer.nheads)} if mixer.outproj_norm else {})


def attention_rules(attention: AttentionConfig) -> dict[str, ShardRule]:
    """Rules of `Attention`: query heads, key heads and value heads."""
    queries, keys = attention.nheads * attention.head_dim, attention.kv_heads * attention.head_dim
    packed = (Segment("q", queries), Segment("k", keys), Segment("v", keys))
    return {"qkv.weight": ShardRule(0, packed), "out.weight": _along(1, queries)}


def mlp_rules(mlp: MlpConfig) -> dict[str, ShardRule]:
    """Rules of `GatedMlp`: its width."""
    packed = (Segment("gate", mlp.width), Segment("up", mlp.width))
    return {"gate_up.weight": ShardRule(0, packed), "down.weight": _along(1, mlp.width)}


def _layer_rules(config: ModelConfig, kind: LayerKind) -> dict[str, ShardRule]:
    if kind is LayerKind.MAMBA:
        assert config.mixer is not None
        return mixer_rules(config.mixer)
    if kind is LayerKind.ATTENTION:
        assert config.attention is not None
        return attention_rules(config.attention)
    assert kind is LayerKind.MLP
    assert config.mlp is not None
    return mlp_rules(config.mlp)


def _block_rules(config: ModelConfig, kinds: Sequence[LayerKind], prefix: str) -> dict[str, ShardRule]:
    rules: dict[str, ShardRule] = {}
    for index, kind in enumerate(kinds):
        block = f"{prefix}blocks.{index}."
        rules[f"{block}norm.weight"] = REPLICATED
        rules |= {f"{block}layer.{name}": rule for name, rule in _layer_rules(config, kind).items()}
    return rules


def shard_rules(config: ModelConfig) -> dict[str, ShardRule]:
    """{parameter name of `HybridLM(config)`: its rule}, complete."""
    vocab = _along(0, config.vocab_size)
    rules = {"embedding.weight": vocab, "final_norm.weight": REPLICATED}
    if not config.tie_embeddings:
        rules["head.weight"] = vocab
    rules |= _block_rules(config, config.layers.trunk, "")
    for depth, kinds in enumerate(config.layers.mtp):
        prefix = f"mtp.{depth}."
        own = ("hidden_norm.weight", "embedding_norm.weight", "join_proj.weight", "final_norm.weight")
        rules |= {prefix + name: REPLICATED for name in own} | _block_rules(config, kinds, prefix)
    return rules


def model_partitions(model: nn.Module, mesh: MeshShape) -> dict[str, Partition]:
    """How each parameter of a `HybridLM` is cut over an XLA mesh: these rules' axis over tensor, another over fsdp.

    A packed parameter is cut into equal rows there, across its segments: XLA keeps the meaning and moves data instead.
    """
    rules = shard_rules(model.config)  # type: ignore[arg-type]
    return {name: parameter_partition(p.shape, rules[name].dim, mesh) for name, p in model.named_parameters()}


def _demands(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{what must be divisible by tp, with its numbers: the numbers}, for the layers this pattern has."""
    kinds = config.layers.kinds
    demands: dict[str, tuple[int, ...]] = {}
    if LayerKind.MAMBA in kinds and config.mixer is not None:
        mixer = config.mixer
        demands[f"mixer nheads={mixer.nheads} and ngroups={mixer.ngroups}"] = (mixer.nheads, mixer.ngroups)
    if LayerKind.ATTENTION in kinds and config.attention is not None:
        attention = config.attention
        shown = f"attention nheads={attention.nheads} and kv_heads={attention.kv_heads}"
        demands[shown] = (attention.nheads, attention.kv_heads)
    if LayerKind.MLP in kinds and config.mlp is not None:
        demands[f"mlp width={config.mlp.width}"] = (config.mlp.width,)
    demands[f"vocab_size={config.vocab_size}"] = (config.vocab_size,)
    return demands


def legal_tensor_sizes(config: ModelConfig) -> list[int]:
    """Every tp that divides all that is cut, rising."""
    common = math.gcd(*(number for numbers in _demands(config).values() for number in numbers))
    return [size for size in range(1, common + 1) if common % size == 0]


def check_tensor_parallel(config: ModelConfig, size: int) -> None:
    """Refuse a tp that does not divide everything it cuts; heads and groups are never replicated or padded.

    Raises:
        UserError: every failing demand with its numbers, the tp each would allow, and the tp legal for the model.
    """
    if size >= 1 and size in legal_tensor_sizes(config):
        return
    lines = []
    for shown, numbers in _demands(config).items():
        common = math.gcd(*numbers)
        if size < 1 or common % size:
            allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            lines.append(f"{shown} must be divisible by tp, which allows tp = {allowed}")
    legal = ", ".join(str(n) for n in legal_tensor_sizes(config))
    problems = "\n  ".join(lines)
    raise UserError(f"tp={size} cannot shard model {config.name!r}:\n  {problems}\nlegal tp for this model: {legal}")


def local_mixer(mixer: MixerConfig, size: int) -> MixerConfig:
    """The mixer that one of `size` ranks runs: its heads and groups."""
    return mixer.model_copy(update={"nheads": mixer.nheads // size, "ngroups": mixer.ngroups // size})


def local_attention(attention: AttentionConfig, size: int) -> AttentionConfig:
    """The attention that one of `size` ranks runs: its query and key/value heads."""
    return attention.model_copy(update={"nheads": attention.nheads // size, "kv_heads": attention.kv_heads // size})


def local_mlp(mlp: MlpConfig, size: int) -> MlpConfig:
    """The MLP that one of `size` ranks runs."""
    return mlp.model_copy(update={"width": mlp.width // size})


def local_config(config: ModelConfig, size: int) -> ModelConfig:
    """One of `size` ranks as a model of its own, for counting: the parameters of a rank are those of this config.

    It is not for building: heads times headdim no longer equal the hidden size times expand.

    Raises:
        UserError: `size` cannot shard this model.
    """
    check_tensor_parallel(config, size)
    if size == 1:
        return config
    parts: dict[str, object] = {"vocab_size": config.vocab_size // size}
    if config.mixer is not None:
        parts["mixer"] = local_mixer(config.mixer, size)
    if config.attention is not None:
        parts["attention"] = local_attention(config.attention, size)
    if config.mlp is not None:
        parts["mlp"] = local_mlp(config.mlp, size)
    return config.model_copy(update=parts)


class CheckpointTensor(NamedTuple):
    """One rank's part of one checkpoint entry: `tensor` is rows `start`.. along `dim` of `full_shape`.

    `dim` None: replicated, the same on every rank. `tensor` is a view of the parameter it came from.
    """

    tensor: Tensor
    dim: int | None
    start: int
    full_shape: torch.Size


def to_checkpoint(
    local: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int
) -> dict[str, CheckpointTensor]:
    """{checkpoint key: this rank's part}: packed parameters become one entry per segment, as "in_proj.weight.z"."""
    rules, entries = shard_rules(config), {}
    for name, tensor in local.items():
        rule = rules[name]
        if rule.dim is None:
            entries[name] = CheckpointTensor(tensor, None, 0, tensor.shape)
            continue
        parts = torch.split(tensor, [segment.width // size for segment in rule.segments], rule.dim)
        for segment, part in zip(rule.segments, parts, strict=True):
            key = f"{name}.{segment.key}" if segment.key else name
            full_shape = ShardRule(rule.dim).full_shape(part.shape, size)
            entries[key] = CheckpointTensor(part, rule.dim, rank * part.shape[rule.dim], full_shape)
    return entries
