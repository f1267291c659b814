"""`--aot SLICE`: the whole training step, compiled by libtpu for a TPU slice that is not here. Does it fit, and what
would it cost?

Not a measurement: bytes are the compiler's, time is modelled. The trainer runs the step as two programs, cut where the
host looks at loss and norm; compiled here is the one that they make together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from apps.train.config import TrainConfig
from apps.train.facts import Machine, facts_of
from apps.train.optim import build_optimizer
from libs.flags.environment import choose_xla_platform, compile_without_a_tpu, fathom_variables
from libs.flags.errors import ExitStatus, UserError
from libs.flags.installed import install
from libs.flags.provenance import git_state, redact_command
from libs.flags.resolve import resolve
from libs.kernels.attention.pallas.gates import requested_backend as requested_attention
from libs.kernels.mimo import choose_backend
from libs.model import HybridLM, flops_per_token, parameter_count
from libs.model.hybrid import between_blocks
from libs.model.sharding import model_partitions
from libs.parallel.xla.pins import AHEAD_OF_TIME, PINS, refuse_other_versions
from libs.parallel.xla.topology import MeshShape, Topology, row_partition, topology

if TYPE_CHECKING:
    from libs.parallel.xla.aot import Argument, Compiled, Lowered
    from libs.parallel.xla.cycles import Modelled

GIB = 2**30
# What the two times of a record are, in the record itself.
MODELLED_TIME = (
    "libtpu's estimated cycles, loops counted, at an inferred clock: never measured; to rank programs of full effort. "
    "Least effort leaves operations untiled, at many times their cost; kernel calls and waits for chips count nothing"
)
BOUND_TIME = (
    "counted in the compiled program, loops counted: matrix products at the chip's peak or bytes to and from HBM at "
    "its bandwidth, whichever takes longer; no estimate but a bound from below. Kernel calls and exchange count nothing"
)
RECORDS = Path("runs") / "aot"


class Program(NamedTuple):
    """The step as a program: what it reads and what it makes."""

    arguments: list[Argument]
    results: list[Tensor]


def aot(
    config: TrainConfig, recipe: str, slice_name: str, *, command: Sequence[str], quick: bool = False
) -> ExitStatus:
    """Lower, compile, print and record; USAGE when the step does not fit.

    command: to be recorded. quick: least effort of the compiler: memory is near, modelled time is not to be compared.

    Raises:
        UserError: an unknown slice, a mesh of another size, a package missing or of another version. GateRefused: a
            gate that the slice could not honour.
    """
    target = topology(slice_name)
    mesh = MeshShape(config.xla.data, config.xla.fsdp, config.xla.tensor)
    if mesh.chips != target.chips:
        raise UserError(
            f"--aot {target.name} has {target.chips} chips, but xla.data * xla.fsdp * xla.tensor = {mesh.data} * "
            f"{mesh.fsdp} * {mesh.tensor} = {mesh.chips}; make the product {target.chips}, for example by --xla.fsdp"
        )
    refuse_other_versions(AHEAD_OF_TIME, f"--aot {target.name}")
    compile_without_a_tpu()
    choose_xla_platform("CPU", mesh.chips)
    bf16 = config.train.precision != "fp32"
    machine = Machine(
        on_gpu=False, on_xla="tpu", name=target.chip.name, bf16=bf16, memory_bytes=target.chip.usable_bytes,
        device_count=target.chips,
    )  # fmt: skip
    backend = choose_backend(config.train.mimo_backend, "xla").value
    gates = resolve(fathom_variables(), facts_of(config, machine, backend))
    install(gates)
    # torch_xla and jax are not in the main environment.
    from libs.parallel.xla import aot as compiling

    program = build_step(config, mesh)
    lowered = compiling.lower(program.arguments, program.results, mesh)
    record = _record(config, recipe, target, mesh, lowered, quick)
    record["command"] = redact_command(command)
    record["gates"] = {one.gate: one.value for one in gates.resolutions if one.value != one.default}
    try:
        compiled = compiling.compile_for(lowered, target, quick=quick)
    except compiling.DoesNotFit as error:
        record["does_not_fit"] = str(error)
        _write(record)
        print(f"{target.name}: DOES NOT FIT: {_first_lines(str(error))}", file=sys.stderr)
        return ExitStatus.USAGE
    record |= _measures(compiled, target)
    _write(record)
    _show(config, target, lowered, compiled, quick)
    return ExitStatus.OK if compiled.peak <= target.chip.usable_bytes else ExitStatus.USAGE


def build_step(config: TrainConfig, mesh: MeshShape) -> Program:
    """One optimizer step on tensors without data: forward, backward, norm, clipping, AdamW."""
    from libs.parallel.xla.aot import Argument, leaf, placeholder
    from libs.parallel.xla.mesh import open_mesh

    # Before the first tensor, as in a run.
    laid = open_mesh(mesh) if mesh.chips > 1 else None
    with torch.device("meta"):
        model = HybridLM(config.model.architecture(), activation_checkpointing=config.train.activation_checkpointing)
    _put_placeholders(model, placeholder)
    if laid is not None:
        laid.keep_rows(between_blocks(model))
    train = config.train
    try:
        attention = requested_attention(train.attention_backend)
        model.request_backends(mimo=train.mimo_backend, attention=attention, loss=train.loss_backend)
    except ValueError as error:
        raise UserError(f"train: {error}") from error
    optimizer = build_optimizer(model, config.optim)
    rows, window = config.data.windows_per_batch, config.data.window
    tokens, labels = (placeholder((rows, window), torch.int64) for _ in range(2))
    rate = placeholder((), torch.float32)
    for group in optimizer.param_groups:
        group["lr"] = rate
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": placeholder((), torch.float32),
                "exp_avg": placeholder(parameter.shape, torch.float32),
                "exp_avg_sq": placeholder(parameter.shape, torch.float32),
            }
    before = {key: leaf(tensor) for key, tensor in _held(model, optimizer).items()}
    loss, norm = _step(config, model, optimizer, tokens, labels)
    partitions, cut = model_partitions(model, mesh), row_partition(2, rows, mesh)
    results, arguments = [loss, norm], [Argument(tokens, "batch", cut), Argument(labels, "batch", cut)]
    for (name, part), after in _held(model, optimizer).items():
        partition = () if part == "step" else partitions[name]
        kind = "parameters" if part == "" else "optimizer"
        arguments.append(Argument(before[name, part], kind, partition, len(results)))
        results.append(after)
    return Program(arguments, results)


def _put_placeholders(model: nn.Module, placeholder: Any) -> None:
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(placeholder(parameter.shape, torch.float32)))


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[str, str], Tensor]:
    """(parameter name, "" or part of its state) -> the tensor."""
    found: dict[tuple[str, str], Tensor] = {}
    for name, parameter in model.named_parameters():
        found[name, ""] = parameter
        for part, tensor in optimizer.state[parameter].items():
            found[name, part] = tensor
    return found


def _step(
    config: TrainConfig, model: HybridLM, optimizer: torch.optim.Optimizer, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    rows, window = tokens.shape
    bounds = torch.arange(0, rows * window + 1, max(1, window // 2), dtype=torch.int32)
    precise = config.train.precision == "fp32"
    with torch.autocast("xla", dtype=torch.bfloat16, enabled=not precise):
        out = model.loss(tokens, labels, cu_seqlens=bounds)
    out.loss.backward()  # type: ignore[no-untyped-call]
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    if config.optim.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.optim.clip_norm, norm)
    optimizer.step()
    return out.loss.detach(), norm


def _record(
    config: TrainConfig, recipe: str, target: Topology, mesh: MeshShape, lowered: Lowered, quick: bool
) -> dict[str, Any]:
    architecture = config.model.architecture()
    tokens = config.data.windows_per_batch * config.data.window
    git = git_state()
    return {
        "recipe": recipe,
        "slice": target.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git.commit,
        "git_dirty": git.dirty,
        "git_dirty_hash": git.dirty_hash,
        "versions": {name: PINS[name] for name in AHEAD_OF_TIME},
        "config_hash": config.hash(),
        "mesh": mesh._asdict(),
        "effort": "quick" if quick else "full",
        "window": config.data.window,
        "tokens_per_step": tokens,
        "parameters": parameter_count(architecture).total,
        "model_flops_per_step": flops_per_token(architecture, config.data.window).train * tokens,
        "argument_bytes_per_chip": lowered.bytes_by_kind,
    }


def _measures(compiled: Compiled, target: Topology) -> dict[str, Any]:
    """What the compiler says, under names that say what it is."""
    found = compiled._asdict() | {"modelled": compiled.modelled._asdict(), "counted": compiled.counted._asdict()}
    found["modelled"] |= {key: [one._asdict() for one in found["modelled"][key]] for key in ("loops", "costly")}
    return {
        "compiled": found,
        "peak_bytes_per_chip": compiled.peak,
        "usable_bytes_per_chip": target.chip.usable_bytes,
        "modelled_seconds": compiled.modelled.cycles / target.chip.clock,
        "modelled_seconds_are": MODELLED_TIME,
        "bound_seconds": compiled.counted.seconds(target.chip),
        "bound_seconds_are": BOUND_TIME,
    }


def _write(record: dict[str, Any]) -> None:
    RECORDS.mkdir(parents=True, exist_ok=True)
    name = "_".join([Path(record["recipe"]).stem, record["slice"], record["effort"], *sorted(record["gates"])])
    (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _show(config: TrainConfig, target: Topology, lowered: Lowered, compiled: Compiled, quick: bool) -> None:
    out = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100)
    rows = {f"arguments: {kind}": size for kind, size in sorted(lowered.bytes_by_kind.items())}
    rows["results of their own"] = compiled.results - compiled.shared
    rows["temporaries"] = compiled.temporaries
    rows["code"] = compiled.code
    table = Table(
        title=f"one step on each of {target.chips} chips of {target.name}", title_justify="left", show_header=False
    )
    for name, size in rows.items():
        table.add_row(name, f"{size / GIB:,.3f} GiB")
    table.add_section()
    table.add_row("peak", f"{compiled.peak / GIB:,.3f} GiB")
    table.add_row("a program can have", f"{target.chip.usable_bytes / GIB:,.3f} GiB")
    out.print(table)
    modelled, counted = compiled.modelled, compiled.counted
    seconds = modelled.cycles / target.chip.clock
    tokens = config.data.windows_per_batch * config.data.window
    lines = [
        f"MODELLED time of a step: {seconds * 1e3:,.1f} ms ({modelled.cycles:,} estimated cycles at "
        f"{target.chip.clock / 1e9} GHz), {tokens / seconds:,.0f} tokens/s; never measured"
        + ("; not to be compared: with --aot-quick operations are not tiled" if quick else ""),
        "most of it: " + "; ".join(_costs(modelled)),
        f"not in it: {modelled.uncounted} kernel calls, {modelled.unestimated} operations without an estimate, waits "
        f"for other chips; loops: {len(modelled.loops)}, of unknown length: {len(modelled.unknown)}",
        f"BOUND from below: {counted.seconds(target.chip) * 1e3:,.1f} ms: products {counted.flops:.3e} FLOPs at peak "
        f"{counted.flops / target.chip.peak_bf16 * 1e3:,.1f} ms, HBM {counted.hbm_bytes:.3e} bytes "
        f"{counted.hbm_bytes / target.chip.bandwidth * 1e3:,.1f} ms",
        f"collectives: {counted.collectives}, of these in loops {sum(counted.in_loops.values())}; bytes "
        f"{sum(counted.exchanged.values()):.3e}",
        f"XLA counts, bodies of loops once: {compiled.flops:.3e} FLOPs, {compiled.accessed:.3e} bytes per chip",
        f"compiled in {compiled.seconds:.0f} s; record in {RECORDS}",
        "it fits" if compiled.peak <= target.chip.usable_bytes else "it DOES NOT FIT",
    ]
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _costs(modelled: Modelled, count: int = 3) -> list[str]:
    """The operations that take most of the modelled time, with their share of it."""
    return [
        f"{one.cycles / modelled.cycles:.0%} {one.operation} {one.result}, {one.times:,} times"
        for one in modelled.costly[:count]
    ]


def _first_lines(text: str, count: int = 3) -> str:
    return " ".join(text.splitlines()[:count])[:400]
