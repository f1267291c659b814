"""Equal layers as one loop: the first unit's code, traced once, run over the stacked weights of all of them.

Not for deciding which layers are equal (`homogeneous`). Imports torch_xla only on an XLA device.
"""
# U units  then the shape of one layer's parameter

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from libs.kernels.chunk_loop import Body, Driver, Tensors, chunk_loop
from libs.parallel.xla.homogeneous import Run

# Custom calls that are notes to XLA's partitioner.
PARTITIONER_NOTES = frozenset({"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"})
# Operators of torch_xla that say how a tensor is cut.
_SHARDING_OPERATORS = re.compile(r"xla::.*mark_sharding")


class NotLoopable(Exception):
    """The code of a layer does something that a loop over layers would get wrong."""


class OnlyPureOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises NotLoopable at an operator that draws random numbers, and at one that is not torch's own: a kernel of
    somebody's is a custom call."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotLoopable(f"operator {func} draws random numbers: every layer might get the same ones")
        if func.namespace not in ("aten", "prims") and not _SHARDING_OPERATORS.match(func.name()):
            raise NotLoopable(f"operator {func} is a custom call")
        return func(*args, **(kwargs or {}))


def run_units(
    layers: Sequence[nn.Module], run: Run, x: Tensor, tensors: Tensors, rebuild: Callable[[Tensors], Any],
    driver: Driver,
) -> Tensor:  # fmt: skip
    """x after the layers of `run`: `layer(x, rebuild(tensors))` one after the other.

    Kept until backward: what enters each unit; a unit's forward runs again there (`chunk_loop`). Each parameter is
    stacked over the units for the loop: a second copy of the run's weights and of their gradients while it lasts.

    Args:
        layers: the whole stack, of which `run` is homogeneous. x: keeps shape and dtype.
        tensors: what every layer reads beside x. rebuild: makes a layer's second argument of them; it closes over no
            tensor.

    Raises:
        NotLoopable: random numbers or a custom call in the first unit.
    """
    unit = list(layers[run.start : run.start + run.unit])
    names = [[name for name, _ in layer.named_parameters()] for layer in unit]
    kind = x.device.type
    enabled, low = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def body(constants: Tensors, carry: Tensors, weights: Tensors) -> tuple[Tensors, Tensors]:
        given, rest = rebuild(constants), iter(weights)
        (hidden,) = carry
        # Backward runs the body again, outside of the caller's autocast.
        with torch.autocast(kind, low, enabled), OnlyPureOperators():  # type: ignore[no-untyped-call]
            for layer, held in zip(unit, names, strict=True):
                hidden = functional_call(layer, {name: next(rest) for name in held}, (hidden, given))
        assert (hidden.shape, hidden.dtype) == (carry[0].shape, carry[0].dtype), "layers keep the stream's shape"
        return (hidden,), ()

    stacked = tuple(
        torch.stack([layers[first + offset].get_parameter(name) for first in range(run.start, run.stop, run.unit)])
        for offset, held in enumerate(names)
        for name in held
    )
    if driver == "scan":
        refuse_custom_calls(body, tensors, (x,), stacked)
    (out,), _ = chunk_loop(body, tensors, (x,), stacked, driver, weights=True)
    return out


def refuse_custom_calls(body: Body, constants: Tensors, carry: Tensors, xs: Tensors) -> None:
    """Lower one iteration, on tensors without data, and look for calls into kernels, also in loops inside of it.

    Raises:
        NotLoopable: naming their targets.
    """
    # torch_xla is an optional dependency.
    import torch_xla
    import torch_xla.core.xla_builder as xb

    def hollow(tensors: Sequence[Tensor]) -> Tensors:
        # Times one: torch_xla tries to move what has no computation behind it when a layer says how it is cut.
        return tuple(xb.create_placeholder_tensor(u.shape, u.dtype) * 1 for u in tensors)

    with torch.no_grad():
        after, _ = body(hollow(constants), hollow(carry), hollow([u[0] for u in xs]))
    if found := custom_calls(torch_xla._XLAC._get_xla_tensors_hlo(list(after))):
        raise NotLoopable(f"custom call {', '.join(found)}")


def custom_calls(hlo: str) -> list[str]:
    """Targets of the custom calls in a module's text, but for notes to the partitioner."""
    return sorted(set(re.findall(r'custom_call_target="([^"]+)"', hlo)) - PARTITIONER_NOTES)
