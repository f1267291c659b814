"""`--dry-run`: what a run needs, by formula and on the meta device, and whether it fits the stated device.

Not a measurement: nothing is allocated and no data is read.
"""

from __future__ import annotations

import sys
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from apps.train.backends import refuse_backends
from apps.train.config import TrainConfig
from apps.train.facts import Machine, facts_of, rank_model, rank_tokens, step_memory
from apps.train.fp8 import fp8_plan_line
from apps.train.lane import XLA_RUNTIMES, host_memory
from libs.flags.environment import fathom_variables
from libs.flags.errors import ExitStatus, UserError
from libs.flags.facts import Facts
from libs.flags.resolve import resolve
from libs.kernels.mimo import choose_backend
from libs.kernels.mimo.capabilities import HOPPER
from libs.model import HybridLM, flops_per_token, parameter_count
from libs.model.communication import step_communication
from libs.model.flops import ParameterCount
from libs.model.fp8 import fp8_elements
from libs.model.memory import MemoryEstimate
from libs.model.sharding import check_tensor_parallel, shard_rules
from libs.parallel.mesh import Layout
from libs.parallel.xla.topology import MeshShape, slice_of

MIB, GIB = 2**20, 2**30
# What a process can have of the device's memory, rounded down, by the name the driver gives the device.
DEVICE_MEMORY = {
    "NVIDIA H100 80GB HBM3": 78 * GIB,
    "NVIDIA H200": 139 * GIB,
}
# What else is known of these: both are Hopper.
CAPABILITY, MULTIPROCESSORS = (9, 0), 132


class Target(NamedTuple):
    """The device a plan is for, and where its memory size comes from. The last two: None is unknown."""

    name: str
    memory_bytes: int
    source: str
    compute_capability: tuple[int, int] | None = None
    multiprocessors: int | None = None


def target_device(config: TrainConfig) -> Target:
    """train.device_memory if stated, else the memory of a known train.device_name, of a chip of the TPU slice that
    `[xla]` asks for, or of this machine.

    Raises:
        UserError: a device that is not here and whose memory is not stated, or a slice that is not known.
    """
    settings = config.train
    name = settings.device_name or ("this machine" if settings.device != "cuda" else "the CUDA device")
    if settings.device in XLA_RUNTIMES and settings.device_memory is None:
        return _xla_target(config)
    known = (CAPABILITY, MULTIPROCESSORS) if name in DEVICE_MEMORY else (None, None)
    if settings.device_memory is not None:
        return Target(name, int(settings.device_memory), "train.device_memory", *known)
    if settings.device_name is not None:
        if settings.device_name not in DEVICE_MEMORY:
            names = ", ".join(DEVICE_MEMORY)
            raise UserError(
                f"train.device_name = {settings.device_name!r}: its memory is not known (known: {names}); "
                "state it with --train.device_memory 80GB"
            )
        return Target(name, DEVICE_MEMORY[settings.device_name], "known for this device name", *known)
    if settings.device != "cpu" and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        capability = (found.major, found.minor)
        source = "reported by the driver"
        return Target(found.name, found.total_memory, source, capability, found.multi_processor_count)
    if settings.device == "cuda":
        raise UserError("no CUDA device is here: state what to plan for with --train.device_memory 80GB")
    return Target("this machine", host_memory().total, "all memory of this machine")


def _xla_target(config: TrainConfig) -> Target:
    chips = _xla_mesh(config).chips
    if config.train.device == "xla":
        return Target("this machine", host_memory().total // chips, f"shared by {chips} virtual devices")
    found = slice_of(chips)
    source = f"one of {found.chips} chips of {found.name}: what a program can have of it"
    return Target(found.chip.name, found.chip.usable_bytes, source)


def _xla_mesh(config: TrainConfig) -> MeshShape:
    return MeshShape(config.xla.data, config.xla.fsdp, config.xla.tensor)


def dry_run(config: TrainConfig) -> ExitStatus:
    """Print parameters, FLOPs per token, memory of a rank by component, and what it sends; USAGE when the step does not
    fit.

    The job planned for has dp * cp * tp processes, with one replica where parallel.dp is none; none of them is started.

    Raises:
        GateRefused: a gate that the planned device could not honour. UserError: as `target_device`.
    """
    architecture = config.model.architecture()
    target = target_device(config)
    machine, layout = planned_machine(config, target), planned_layout(config)
    facts = facts_of(config, machine, planned_backend(config.train.mimo_backend, machine), layout)
    gates = resolve(fathom_variables(), facts)
    refuse_backends(config.train, torch.device(facts.device if facts.device != "tpu" else "xla"), gates)
    with torch.device("meta"):
        model = HybridLM(architecture, activation_checkpointing=config.train.activation_checkpointing)
    counted, of_rank = parameter_count(architecture), parameter_count(rank_model(config, layout))
    _check_counts(model, counted, of_rank, layout)
    flops = flops_per_token(architecture, config.data.window)
    memory, cache = step_memory(config, machine, layout), _psiv_memory(facts, machine)
    cached = gates.is_enabled("psiv_cache")
    needed = memory.total + (cache if cached else 0)
    out = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
    counts = {kind: f"{count:,}" for kind, count in counted.by_layer_type.items()}
    out.print(_table("parameters", counts, f"{counted.total:,}"))
    if layout.world_size > 1:
        shares = {kind: f"{count:,}" for kind, count in of_rank.by_layer_type.items()}
        title = f"parameters of one of {layout.world_size} ranks ({layout})"
        out.print(_table(title, shares, f"{of_rank.total:,}"))
    shown = {kind: f"{value:,.0f}" for kind, value in flops.by_layer_type.items()}
    shown["forward"] = f"{flops.forward:,.0f}"
    title = f"FLOPs per token, window {config.data.window} (formula version {flops.formula_version})"
    out.print(_table(title, shown, f"{flops.train:,.0f}", total_name="training"))
    out.print(_memory_table(memory, cache, cached, layout))
    _print_line(
        out, f"most is held in {memory.at}; not in it: what allocators, BLAS and collectives keep for themselves"
    )
    if config.parallel.fp8_recipe is not None:
        _print_line(out, fp8_plan_line(config, layout))
    if machine.on_xla is not None:
        _print_line(out, "by the formula of the other lanes' operators; the compiler's own figure: --aot SLICE")
    elif layout.world_size > 1:
        out.print(_communication(config, machine, layout))
    _print_line(out, f"{target.name}: {_size(target.memory_bytes)} ({target.source}): {_verdict(needed, target)}")
    if cache:
        other = memory.total + (0 if cached else cache)
        _print_line(out, f"with gate psiv_cache {'off' if cached else 'on'} instead: {_verdict(other, target)}")
    return ExitStatus.OK if needed <= target.memory_bytes else ExitStatus.USAGE


def planned_layout(config: TrainConfig) -> Layout:
    """The layout that is asked for, whatever the number of processes here.

    Raises:
        UserError: a tp that cannot shard the model, or micro-batches that the replicas cannot share.
    """
    parallel = config.parallel
    layout, rows_cut_by = Layout(parallel.dp or 1, parallel.cp, parallel.tp), "parallel.dp"
    if config.train.device in XLA_RUNTIMES:
        # One process drives all chips; each has its rows, and its cut of a layer where there is a tensor axis.
        mesh = _xla_mesh(config)
        layout, rows_cut_by = Layout(mesh.data * mesh.fsdp, 1, mesh.tensor), "xla.data * xla.fsdp"
    check_tensor_parallel(config.model.architecture(), layout.tp)
    config.data.refuse_uneven(layout.dp, rows_cut_by)
    return layout


def _check_counts(model: HybridLM, counted: ParameterCount, of_rank: ParameterCount, layout: Layout) -> None:
    """The formulas against the modules and the rules by which they are cut."""
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built == counted.total, f"the model has {built} parameters, the formula says {counted.total}"
    rules = shard_rules(model.config)
    cut = sum(p.numel() // (1 if rules[n].dim is None else layout.tp) for n, p in model.named_parameters())
    assert cut == of_rank.total, f"a rank has {cut} parameters, the formula says {of_rank.total}"


def _communication(config: TrainConfig, machine: Machine, layout: Layout) -> Table:
    sent = step_communication(
        config.model.architecture(),
        layout,
        tokens=rank_tokens(config, layout),
        micro_batches=config.train.grad_accumulation,
        dtype_bytes=2 if machine.bf16 else 4,
        recompute=config.train.activation_checkpointing == "block",
        gradients_whole=config.parallel.engine != "megatron",
        optimizer_sharded=config.parallel.engine == "megatron" or config.parallel.shard_optimizer,
        fp8_elements=fp8_elements(config.model.architecture(), layout.tp) if config.parallel.fp8_recipe else 0,
    )
    total = sum(sent.values())
    rows = {name: _size(nbytes, total) for name, nbytes in sent.items()}
    return _table("sent by each rank per optimizer step (estimate)", rows, _size(total))


def _memory_table(memory: MemoryEstimate, cache: int, cached: bool, layout: Layout) -> Table:
    """A column for psiv_cache off and one for on, where there is something to cache."""
    ranks = " on each rank" if layout.world_size > 1 else ""
    table = Table(title=f"memory of one training step{ranks} at its peak (estimate)", title_justify="left")
    table.add_column()
    columns = [0, cache] if cache else [0]
    for extra in columns:
        here = " (as set)" if bool(extra) == cached else ""
        table.add_column(f"psiv_cache {'on' if extra else 'off'}{here}" if cache else "", justify="right")
    whole = memory.total + cache
    for name, size in memory.by_component.items():
        table.add_row(name, *[_size(size, whole)] * len(columns))
    if cache:
        table.add_row("psiv_cache", *(_size(extra, whole) for extra in columns))
    table.add_section()
    table.add_row("total", *(_size(memory.total + extra, whole) for extra in columns))
    table.show_header = bool(cache)
    return table


def _size(nbytes: int, whole: int | None = None) -> str:
    """In GiB, or in MiB where the whole of which it is a part is less than one."""
    unit, name = (GIB, "GiB") if (nbytes if whole is None else whole) >= GIB else (MIB, "MiB")
    return f"{nbytes / unit:,.{3 if unit == GIB else 1}f} {name}"


def _verdict(needed: int, target: Target) -> str:
    if needed <= target.memory_bytes:
        return f"the estimate of {_size(needed)} fits, {_size(target.memory_bytes - needed)} to spare"
    return f"the estimate of {_size(needed)} DOES NOT FIT"


def _print_line(out: Console, text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def planned_machine(config: TrainConfig, target: Target) -> Machine:
    """The target as the gates ask about it."""
    device, precision = config.train.device, config.train.precision
    on_gpu = device == "cuda" or (device == "auto" and target.name.startswith("NVIDIA"))
    on_xla: Literal["tpu", "xla"] | None = "tpu" if device == "tpu" else "xla" if device == "xla" else None
    return Machine(
        on_gpu=on_gpu,
        on_xla=on_xla,
        name=target.name,
        bf16=precision == "bf16" or (precision == "auto" and (on_gpu or on_xla == "tpu")),
        device_count=None if on_xla is None else _xla_mesh(config).chips,
        memory_bytes=target.memory_bytes,
        compute_capability=target.compute_capability,
        multiprocessors=target.multiprocessors,
    )


def planned_backend(requested: str, machine: Machine) -> str:
    """The scan backend on a device that need not be here.

    Raises:
        UserError: unknown, or the Hopper kernels on what is not known to be one.
    """
    if requested != HOPPER:
        try:
            # The others run everywhere, but for those of XLA.
            return choose_backend(requested, "cpu" if machine.on_xla is None else "xla").value
        except ValueError as error:
            raise UserError(f"train.mimo_backend: {error}") from error
    if machine.compute_capability is None or machine.compute_capability[0] != CAPABILITY[0]:
        raise UserError(
            f"train.mimo_backend = {HOPPER!r} needs a Hopper GPU, which {machine.name} is not known to be; plan for "
            f"one with --train.device_name (known: {', '.join(DEVICE_MEMORY)})"
        )
    return requested


def _psiv_memory(facts: Facts, machine: Machine) -> int:
    """What gate psiv_cache keeps from forward to backward; 0 where it cannot be on."""
    if not machine.on_gpu or facts.psiv_bytes_per_layer is None:
        return 0
    assert facts.n_mamba_layers is not None, "counted in facts_of"
    return facts.psiv_bytes_per_layer * facts.n_mamba_layers


def _table(title: str, rows: dict[str, str], total: str, *, total_name: str = "total") -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    table.add_section()
    table.add_row(total_name, total)
    return table
