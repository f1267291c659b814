"""What the gates may ask about a run: its device, its model, what the scan backend offers, and how much memory is left.

Not for choosing the device (lane.py); a planned device (dry_run.py) is asked in the same way as a real one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from apps.train.config import TrainConfig
from apps.train.lane import Lane, host_memory
from libs.flags.errors import UserError
from libs.flags.facts import Facts
from libs.kernels.attention.pallas import tiles
from libs.kernels.loss.liger_selftest import self_test_if_asked
from libs.kernels.mimo import choose_backend
from libs.kernels.mimo.capabilities import HOPPER, NOTHING, Geometry, capabilities
from libs.model.config import MixerConfig, ModelConfig
from libs.model.fp8 import fp8_elements, fp8_linears
from libs.model.memory import MemoryEstimate, memory_estimate
from libs.model.pattern import LayerKind
from libs.model.scan_layers import loopable
from libs.model.sharding import local_config
from libs.parallel.mesh import Layout
from libs.parallel.xla.topology import V6E

ALONE = Layout()


class Machine(BaseModel):
    """A device, here or planned for. memory_bytes: what a run may use of it. None is unknown."""

    model_config = ConfigDict(frozen=True)

    on_gpu: bool
    on_xla: Literal["tpu", "xla"] | None = None
    name: str
    bf16: bool
    memory_bytes: int
    compute_capability: tuple[int, int] | None = None
    device_count: int | None = None
    multiprocessors: int | None = None


def machine_of(lane: Lane) -> Machine:
    """The device that a run is on, with the memory that is free on it now."""
    bf16 = lane.precision == "bf16"
    if lane.xla is not None:
        free = V6E.usable_bytes if lane.xla.on_tpu else host_memory().available
        kind: Literal["tpu", "xla"] = "tpu" if lane.xla.on_tpu else "xla"
        return Machine(
            on_gpu=False, on_xla=kind, name=lane.device_name, bf16=bf16, memory_bytes=free, device_count=lane.chips
        )
    if lane.device.type != "cuda":
        return Machine(on_gpu=False, name=lane.device_name, bf16=bf16, memory_bytes=host_memory().available)
    properties = torch.cuda.get_device_properties(lane.device)
    return Machine(
        on_gpu=True,
        name=lane.device_name,
        bf16=bf16,
        memory_bytes=torch.cuda.mem_get_info(lane.device)[0],
        compute_capability=(properties.major, properties.minor),
        device_count=torch.cuda.device_count(),
        multiprocessors=properties.multi_processor_count,
    )


def scan_geometry(mixer: MixerConfig) -> Geometry:
    """The mixer's scan in the letters of libs.kernels.mimo."""
    return Geometry(
        H=mixer.nheads,
        G=mixer.ngroups,
        R=mixer.mimo_rank,
        N=mixer.d_state,
        P=mixer.headdim,
        C=mixer.chunk_size,
        divisor=mixer.rotary_dim_divisor,
        norm=mixer.outproj_norm,
    )


def rank_model(config: TrainConfig, layout: Layout) -> ModelConfig:
    """What one rank of a tensor group computes, as a model: its heads, widths and part of the vocabulary."""
    return local_config(config.model.architecture(), layout.tp)


def rank_tokens(config: TrainConfig, layout: Layout) -> int:
    """Tokens of a micro-batch that one rank works on."""
    return -(-config.data.window * config.data.windows_per_batch // (layout.dp * layout.cp))


def step_memory(config: TrainConfig, machine: Machine, layout: Layout = ALONE) -> MemoryEstimate:
    """Of one training step on one rank, by formula, without what a gate adds. On XLA of one chip: its rows, and its cut
    of parameters, gradients and moments; by the formula of the other lanes' operators (the compiler's own is `--aot`).
    """
    buffers = config.parallel.engine == "megatron"
    shards = config.parallel.shard_optimizer or buffers
    in_fp8 = 0 if config.parallel.fp8_recipe is None else fp8_elements(config.model.architecture(), layout.tp)
    estimate = memory_estimate(
        rank_model(config, layout),
        tokens=rank_tokens(config, layout),
        dtype_bytes=2 if machine.bf16 else 4,
        optimizer="adamw",
        activation_checkpointing=config.train.activation_checkpointing,
        device_type="cuda" if machine.on_gpu else "cpu" if machine.on_xla is None else "xla",
        token_shards=layout.tp if config.parallel.sequence_parallel else 1,
        optimizer_shards=layout.dp * layout.cp if shards else 1,
        gradients_kept=buffers or config.train.grad_accumulation > 1,
        fp8_parameters=in_fp8,
    )
    if machine.on_xla is None:
        return estimate
    cut = {name: estimate.by_component[name] // config.xla.fsdp for name in ("parameters", "optimizer", "gradients")}
    components = estimate.by_component | cut
    return estimate._replace(by_component=components, total=sum(components.values()))


def gather_facts(config: TrainConfig, lane: Lane, layout: Layout = ALONE) -> Facts:
    """Those of a run, of one of its ranks.

    Raises:
        UserError: a scan backend that is unknown, cannot run here, or has no kernels for the model.
    """
    try:
        backend = choose_backend(config.train.mimo_backend, lane.device).value
    except ValueError as error:
        raise UserError(f"train.mimo_backend: {error}") from error
    liger = self_test_if_asked(lane.device)
    tested = {} if liger is None else {"liger_selftest": liger.passed, "liger_selftest_detail": liger.detail}
    return facts_of(config, machine_of(lane), backend, layout).model_copy(update=tested)


def facts_of(config: TrainConfig, machine: Machine, backend: str, layout: Layout = ALONE) -> Facts:
    """Those of `config` on `machine` with a scan backend, of one rank of the layout.

    Raises:
        UserError: the backend has no kernels for the model's shape or for the precision.
    """
    model, tokens = rank_model(config, layout), rank_tokens(config, layout)
    mixer, layers = model.mixer, model.layers
    offers = NOTHING if mixer is None else capabilities(backend, scan_geometry(mixer))
    if backend == HOPPER and not machine.bf16:
        raise UserError(
            f"train.mimo_backend = {HOPPER!r} computes in bf16, train.precision is fp32 here; "
            "set train.precision = bf16, or train.mimo_backend = chunked"
        )
    return Facts(
        device="cuda" if machine.on_gpu else machine.on_xla or "cpu",
        device_name=machine.name,
        compute_capability=machine.compute_capability,
        device_count=machine.device_count,
        multiprocessors=machine.multiprocessors,
        free_memory_bytes=max(0, machine.memory_bytes - step_memory(config, machine, layout).total),
        mimo_backend=backend,
        psiv_stages=offers.psiv_stages,
        two_d_kernels=offers.two_d_kernels,
        split_scan_kernels=offers.split_kernels,
        psiv_bytes_per_layer=None if mixer is None else tokens * mixer.inner * mixer.mimo_rank * 2,
        n_mamba_layers=sum(kind is LayerKind.MAMBA for kind in layers.trunk),
        batch_heads=None if mixer is None else mixer.nheads,
        bf16=machine.bf16,
        distributed_optimizer=config.parallel.engine == "megatron",
        fp8_recipe=config.parallel.fp8_recipe,
        te_linears=len(fp8_linears(config.model.architecture(), layout.tp)),
        tensor_parallel=layout.tp,
        activation_checkpointing=config.train.activation_checkpointing,
        mtp_depth=config.model.mtp_depth,
        **_stack_facts(config, machine),
        **_attention_facts(config, machine),
    )


def _stack_facts(config: TrainConfig, machine: Machine) -> dict[str, Any]:
    """Of the layers, for gate xla_scan_layers; elsewhere than on XLA nobody asks."""
    if machine.on_xla is None:
        return {}
    found = loopable(config.model.architecture())
    whole = found.difference is None
    return {"homogeneous_stack": whole, "stack_difference": found.difference, "homogeneous_runs": found.runs}


def _attention_facts(config: TrainConfig, machine: Machine) -> dict[str, Any]:
    """Of the shapes that attention is given, in training and validation, for gate pallas_attention."""
    model = config.model.architecture()
    if machine.on_xla is None or model.attention is None or LayerKind.ATTENTION not in model.layers.kinds:
        return {}
    dtype = "bfloat16" if machine.bf16 else "float32"
    lengths = (config.data.window, config.data.valid_document_tokens)
    refused = [said for S in lengths if (said := tiles.refusal(S, model.attention.head_dim, dtype))]
    return {"attention_in_tile_table": not refused, "attention_tile_refusal": refused[0] if refused else None}
