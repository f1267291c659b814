"""Compile a lazily built program for a TPU slice that is not here: lowered by torch_xla on the CPU, compiled by libtpu.

Imports torch_xla, and jax for its compile-only client. Private names of both are used; the versions are pinned
(`pins`). Nothing is executed, and tensors need no memory: `placeholder` gives ones without data.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_builder as xb
from jax._src import compiler
from jax._src.interpreters import mlir as jax_mlir
from jax._src.lib import _jax, xla_client
from jax.experimental import topologies
from jaxlib.mlir import ir
from torch import Tensor

from libs.parallel.xla.cycles import Modelled, modelled_cycles
from libs.parallel.xla.hlo import parse
from libs.parallel.xla.roofline import Counted, count
from libs.parallel.xla.topology import MeshShape, Partition, Topology, op_sharding


class Argument(NamedTuple):
    """A tensor that the program reads. kind: under which its bytes are listed. result: the place among the results of
    what replaces it, whose memory it then shares; None: it is kept."""

    tensor: Tensor
    kind: str
    partition: Partition
    result: int | None = None


class Lowered(NamedTuple):
    """A program as bytecode, with shardings and shared memory written to its arguments. bytes_by_kind: of one chip."""

    bytecode: bytes
    bytes_by_kind: dict[str, int]


class Compiled(NamedTuple):
    """What libtpu says. Bytes of one chip: temporaries, results, results that share an argument's memory, code.

    flops, accessed: as XLA counts them, which is once for the body of a loop; counted has loops.
    """

    temporaries: int
    arguments: int
    results: int
    shared: int
    code: int
    flops: float
    accessed: float
    modelled: Modelled
    counted: Counted
    seconds: float

    @property
    def peak(self) -> int:
        return self.arguments + self.results - self.shared + self.temporaries + self.code


class DoesNotFit(Exception):
    """libtpu found no place in memory for the program; the message is its own."""


def placeholder(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of the XLA device without data, to build a program on."""
    made: Tensor = xb.create_placeholder_tensor(tuple(shape), dtype)
    return made


def leaf(tensor: Tensor) -> Tensor:
    """A tensor of the same data that stays what it is when `tensor` is updated in place."""
    _ids, leaves = torch_xla._XLAC._get_tensors_xla_device_data_node([tensor])
    assert len(leaves) == 1, "not a tensor without a computation behind it"
    made: Tensor = leaves[0]
    return made


def lower(arguments: Sequence[Argument], results: Sequence[Tensor], mesh: MeshShape) -> Lowered:
    """The program that computes `results`; what it reads besides `arguments` (small tables) is listed as "other"."""
    context = torch_xla._XLAC.lowering.LoweringContext("Step")
    context.build(list(results))
    module = _jax.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(context.hlo()))
    by_id = {context.tensor_parameter_id(argument.tensor): argument for argument in arguments}
    by_id.pop(-1, None)
    with jax_mlir.make_ir_context(), ir.Location.unknown():
        parsed = ir.Module.parse(module)
        main = next(op for op in parsed.body.operations if str(getattr(op, "name", "")).strip('"') == "main")
        types, n_results = main.type.inputs, len(main.type.results)
        given: list[dict[str, Any]] = [{} for _ in types]
        made: list[dict[str, Any]] = [{} for _ in range(n_results)]
        sizes: dict[str, int] = {}
        for number, kind_of in enumerate(types):
            argument = by_id.get(number)
            whole = _bytes_of(kind_of)
            if argument is None:
                sizes["other"] = sizes.get("other", 0) + whole
                continue
            cut = int(np.prod([mesh.size(entry) for entry in argument.partition]))
            sizes[argument.kind] = sizes.get(argument.kind, 0) + whole // cut
            sharding = ir.StringAttr.get(op_sharding(argument.partition, mesh))
            if mesh.chips > 1:
                given[number]["mhlo.sharding"] = sharding
            if argument.result is not None:
                index = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), argument.result)
                given[number]["tf.aliasing_output"] = index
                if mesh.chips > 1:
                    made[argument.result]["mhlo.sharding"] = sharding
        main.arg_attrs = ir.ArrayAttr.get([ir.DictAttr.get(attributes) for attributes in given])
        main.res_attrs = ir.ArrayAttr.get([ir.DictAttr.get(attributes) for attributes in made])
        return Lowered(jax_mlir.module_to_bytecode(parsed), sizes)


def _bytes_of(kind: Any) -> int:
    tensor = ir.RankedTensorType(kind)
    width = ir.IntegerType(tensor.element_type).width if ir.IntegerType.isinstance(tensor.element_type) else None
    bits = {"f64": 64, "f32": 32, "bf16": 16, "f16": 16}.get(str(tensor.element_type), width or 8)
    return int(np.prod(tensor.shape)) * max(bits, 8) // 8


def compile_for(lowered: Lowered, topology: Topology, *, quick: bool = False) -> Compiled:
    """Compile for all chips of a slice.

    Args:
        quick: the least effort of the compiler, about a third of the time: the memory is near, the code is slower.

    Raises:
        DoesNotFit: more memory than a chip has.
    """
    start = time.perf_counter()
    described = topologies.get_topology_desc(topology_name=topology.libtpu_name, platform="tpu")
    devices = list(described.devices)[: topology.chips]
    client = devices[0].client
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=topology.chips, use_spmd_partitioning=True, backend=client,
        device_assignment=np.array([[device.id for device in devices]]),
    )  # fmt: skip
    if quick:
        options.executable_build_options.exec_time_optimization_effort = -1.0
    try:
        program = client.compile(lowered.bytecode, xla_client.DeviceList(tuple(devices)), options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error)) from error
    seconds = time.perf_counter() - start
    memory, cost = program.get_compiled_memory_stats(), program.cost_analysis()
    text = parse(program.hlo_modules()[0].to_string())
    cost = cost[0] if isinstance(cost, list | tuple) else cost
    return Compiled(
        temporaries=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        shared=memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=float(cost.get("flops", 0.0)),
        accessed=float(cost.get("bytes accessed", 0.0)),
        modelled=modelled_cycles(text),
        counted=count(text),
        seconds=seconds,
    )
