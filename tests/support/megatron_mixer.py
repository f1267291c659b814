"""What two ranks compute with Megatron-core's own MambaModel around our mixer: tp 2 against tp 1."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.mamba import MambaModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from libs.model.megatron import MegatronMixer, megatron_mixer_spec
from libs.model.sharding import shard_rules
from libs.parallel.mesh import Group, Groups
from libs.parallel.tensor import gather_columns
from tests.support.tensor_parallel import config, error

SEQ_LEN = 24


class Norm(torch.nn.RMSNorm):
    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps)


def build(tp: dist.ProcessGroup, alone: dist.ProcessGroup) -> MambaModel:
    """A MambaModel of two of our mixers."""
    ours = config("MM")
    spec = ModuleSpec(
        module=MambaStack,
        params={"post_layer_norm": False},
        submodules=MambaStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(
                    norm=Norm, mixer=megatron_mixer_spec(ours, seed=3), mamba_bda=get_bias_dropout_add
                ),
            )
        ),
    )
    transformer = TransformerConfig(
        num_layers=2,
        hidden_size=ours.hidden_size,
        num_attention_heads=4,
        tensor_model_parallel_size=tp.size(),
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        hidden_dropout=0.0,
    )
    groups = ProcessGroupCollection(tp=tp, pp=alone, cp=alone, embd=alone, dp=alone, dp_cp=alone)
    torch.manual_seed(1)
    return MambaModel(transformer, spec, ours.vocab_size, SEQ_LEN, hybrid_override_pattern="MM", pg_collection=groups)


def mixers(model: MambaModel) -> list[MegatronMixer]:
    return [layer.mixer for layer in model.decoder.layers]


def loss_of(model: MambaModel, packed: Any, tp: Group) -> Tensor:
    """Cross-entropy of our own: Megatron's asks the global tensor group, which one process cannot have twice."""
    tokens = torch.randint(0, 64, (1, SEQ_LEN), generator=torch.Generator().manual_seed(2))
    weights = torch.linspace(0.5, 2, SEQ_LEN)
    positions = torch.arange(SEQ_LEN)[None]
    logits = gather_columns(model(tokens, positions, None, packed_seq_params=packed), tp)
    nll = torch.nn.functional.cross_entropy(logits[0], tokens.roll(-1, 1)[0], reduction="none")
    return (nll * weights).mean()


class Packed:
    """The one field of Megatron's PackedSeqParams that the mixer reads."""

    cu_seqlens_q = torch.tensor([0, 9, SEQ_LEN], dtype=torch.int32)


def check(groups: Groups) -> dict[str, Any]:
    singles = [dist.new_group([rank]) for rank in range(groups.world.size)]
    alone, tp = singles[groups.world.rank], groups.tp.process_group
    assert tp is not None
    one, two = build(alone, alone), build(tp, alone)
    found: dict[str, Any] = {}
    for name, packed in (("whole", None), ("packed", Packed)):
        losses = [loss_of(one, packed, Group()), loss_of(two, packed, groups.tp)]
        for model, loss in zip((one, two), losses, strict=True):
            model.zero_grad()
            loss.backward()
        found[f"{name} loss"] = error(losses[1], losses[0])
        found[f"{name} value"] = losses[0].item()
        found[f"{name} gradients"] = mixer_errors(one, two, groups)
    found["sequence parallel"] = sequence_parallel(mixers(one)[0], groups)
    entries = mixers(two)[0].sharded_state_dict("mixer.", metadata={"dp_cp_group": alone})
    found["kinds"] = sorted({type(entry).__name__ for entry in entries.values()})
    assert {type(entry) for entry in entries.values()} == {ShardedTensor, ShardedTensorFactory}
    apply_factories(entries)
    packed_entries = entries["mixer.in_proj.weight"]
    found["keys"] = {entry.key: (entry.global_shape[0], entry.global_offset[0]) for entry in packed_entries}
    found["marked"] = [name for name, p in mixers(two)[0].named_parameters() if p.tensor_model_parallel]
    before = mixers(two)[0].dt_bias.detach().clone()
    two.bfloat16()
    found["kept"] = (
        torch.equal(mixers(two)[0].dt_bias, before) and mixers(two)[0].in_proj.weight.dtype == torch.bfloat16
    )
    return found


def sequence_parallel(whole: MegatronMixer, groups: Groups) -> dict[str, float]:
    """The mixer alone on this rank's tokens, as MambaModel would give them to it."""
    tp = groups.tp
    local = MegatronMixer(
        SimpleNamespace(sequence_parallel=True), d_model=32, layer_number=1, backend="auto", model=config("MM"), seed=3,
        pg_collection=SimpleNamespace(tp=tp.process_group),
    )  # fmt: skip
    x_SBD = torch.randn(SEQ_LEN, 2, 32, generator=torch.Generator().manual_seed(4))
    mine = x_SBD.chunk(tp.size)[tp.rank].clone().requires_grad_()
    x_SBD.requires_grad_()
    want, got = whole(x_SBD)[0], local(mine)[0]
    whole.zero_grad()
    want.square().sum().backward()
    got.square().sum().backward()
    return {
        "out": error(got, want.chunk(tp.size)[tp.rank]),
        "input": error(mine.grad, x_SBD.grad.chunk(tp.size)[tp.rank]),
        "angle_proj": error(local.angle_proj.weight.grad, whole.angle_proj.weight.grad),
    }


def mixer_errors(one: MambaModel, two: MambaModel, groups: Groups) -> dict[str, float]:
    rules, errors = shard_rules(config("MM")), {}
    for index, (whole, local) in enumerate(zip(mixers(one), mixers(two), strict=True)):
        full = dict(whole.named_parameters())
        for name, parameter in local.named_parameters():
            path = f"blocks.{index}.layer.{name}"
            want = rules[path].cut(full[name].grad, groups.tp.rank, groups.tp.size)
            errors[path] = error(parameter.grad, want)
    return errors
