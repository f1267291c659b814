"""Whether a model that should hold FP8 parameters does: checked after it is built, and again after its first step.

megatron-core falls back to bf16 without a word, so what was asked for (see `fp8`) proves nothing about what was built.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libs.parallel.fp8 import Finding, Fp8, Word, refuse
from libs.parallel.mesh import Group

# transformer-engine's class of parameter for each recipe, by module and name.
TENSOR_CLASSES = {
    "tensorwise": ("transformer_engine.pytorch.tensor.float8_tensor", "Float8Tensor"),
    "blockwise": ("transformer_engine.pytorch.tensor.float8_blockwise_tensor", "Float8BlockwiseQTensor"),
}
# Where those classes keep their bytes: the first, or one row-wise copy.
_STORAGE = ("_data", "_rowwise_data")
_SHOWN = 8


class Buffer(Protocol):
    """What is asked of megatron's `_ParamAndGradBuffer`."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    params: Sequence[nn.Parameter]


class Expected(NamedTuple):
    """What the built model must hold: these parameters, no others, all of `tensor_class`."""

    names: frozenset[str]
    tensor_class: type[Tensor]
    quantized_class: type[Tensor]


def expected(names: Iterable[str], recipe: str) -> Expected:
    """The expectation for a recipe. Imports transformer-engine."""
    module, name = TENSOR_CLASSES[recipe]
    base = importlib.import_module("transformer_engine.pytorch.tensor").QuantizedTensor
    return Expected(frozenset(names), getattr(importlib.import_module(module), name), base)


def refuse_unless_built(
    model: nn.Module, buffers: Sequence[Buffer], wanted: Expected, word: Word, *, before_optimizer: bool
) -> None:
    """After building, before step 1.

    Args:
        model: one chunk, with parameter names as in `wanted`. buffers: of its DistributedDataParallel.
        before_optimizer: the optimizer does not exist yet, so each FP8 parameter still holds the values in high
            precision that the optimizer's master weights begin with.

    Raises:
        GateRefused: with everything that is not as it should be.
    """
    found = [*_mocks(model), *_parameters(model, wanted, before_optimizer), *_buffers(model, buffers, wanted)]
    refuse(found, word)


def _mocks(model: nn.Module) -> Iterator[Finding]:
    found = [name for name, value in _attributes(model) if _is_mock(value)]
    if found:
        yield Finding(f"{_some(found)}: a mock stands in for a class of transformer-engine", "install its extension")


def _attributes(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Every module, and every attribute of one, one container deep."""
    for prefix, module in model.named_modules():
        yield prefix, module
        for name, value in vars(module).items():
            path = f"{prefix}.{name}".lstrip(".")
            yield path, value
            inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
            yield from ((f"{path}[{i}]", part) for i, part in enumerate(inner))


def _is_mock(value: object) -> bool:
    return any(base.__module__.partition(".")[0] == "unittest" for base in type(value).__mro__)


def _parameters(model: nn.Module, wanted: Expected, before_optimizer: bool) -> Iterator[Finding]:
    held = {name: p for name, p in model.named_parameters() if isinstance(p, wanted.quantized_class)}
    shown = f"{len(held)} FP8 parameters of {len(wanted.names)} expected"
    if not wanted.names:
        yield Finding("no FP8 parameters are expected: nothing would be gathered", "leave the gate off")
    missing, extra = sorted(wanted.names - set(held)), sorted(set(held) - wanted.names)
    if missing:
        yield Finding(f"{shown}; in high precision or absent: {_some(missing)}", "build these as TE linears")
    if extra:
        yield Finding(f"{shown}; not expected to be: {_some(extra)}", "correct the list of linears")
    other = [f"{name} ({type(p).__name__})" for name, p in held.items() if not isinstance(p, wanted.tensor_class)]
    if other:
        yield Finding(f"not {wanted.tensor_class.__name__}: {_some(other)}", "build the model with the run's recipe")
    if before_optimizer:
        bare = [n for n, p in held.items() if not callable(getattr(p, "get_high_precision_init_val", None))]
        if bare:
            yield Finding(
                f"initial values in high precision are gone: {_some(bare)}",
                "build with preserve_high_precision_init_val, and check before the optimizer is made",
            )


def _buffers(model: nn.Module, buffers: Sequence[Buffer], wanted: Expected) -> Iterator[Finding]:
    fitting = [b for b in buffers if b.param_dtype is torch.uint8 and b.grad_dtype is torch.float32]
    if not fitting:
        shown = ", ".join(f"({b.param_dtype}, {b.grad_dtype})" for b in buffers) or "none"
        yield Finding(f"no (torch.uint8, torch.float32) buffer to gather; there are: {shown}", "wrap the model in DDP")
        return
    inside = {id(p) for buffer in fitting for p in buffer.params}
    named = dict(model.named_parameters())
    outside = sorted(name for name in wanted.names if name in named and id(named[name]) not in inside)
    if outside:
        yield Finding(f"not in the uint8 buffer: {_some(outside)}", "build the model before DDP wraps it")


def digests(model: nn.Module, quantized_class: type[Tensor]) -> dict[str, Tensor]:
    """For each FP8 parameter a 64-bit sum of its bytes by position, on its device: equal bytes, equal digest."""
    held = ((name, p) for name, p in model.named_parameters() if isinstance(p, quantized_class))
    return {name: _digest(_bytes_of(parameter)) for name, parameter in held}


def _bytes_of(parameter: Any) -> Tensor:
    found = [value for name in _STORAGE if isinstance(value := getattr(parameter, name, None), Tensor)]
    assert found, f"{type(parameter).__name__} keeps its bytes elsewhere: not in {', '.join(_STORAGE)}"
    return found[0].detach()


def _digest(data: Tensor) -> Tensor:
    flat = data.contiguous().view(torch.uint8).flatten()
    words = F.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    # Odd factors, so that no word's top bits are lost; sums wrap around, which is what a checksum may do.
    factors = torch.arange(words.numel(), device=words.device).mul_(2654435761 * 2).add_(2654435761)
    return words.mul(factors).sum()


def refuse_unless_trained(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], loss: float, replicas: Group, word: Word
) -> None:
    """After step 1: FP8 parameters have changed, are the same on all replicas, and the loss is finite.

    All ranks of `replicas` (those that hold the same parameters) call this together, and all refuse together.

    Args:
        before, after: `digests` of the same model before and after the step.

    Raises:
        GateRefused: with everything that is not so.
    """
    assert list(before) == list(after), "digests of two models"
    found: list[Finding] = []
    if not math.isfinite(loss):
        found.append(Finding(f"loss of step 1 is {loss}", "try recipe tensorwise, or leave the gate off"))
    if before and all(torch.equal(before[name], after[name]) for name in before):
        found.append(Finding("no FP8 parameter has changed in step 1", "see that the optimizer holds these parameters"))
    names = list(after)
    if names:
        mine = torch.stack([*after.values(), torch.tensor(len(found), device=after[names[0]].device)])
        ranks = replicas.all_gather(mine)
        pairs = itertools.product(range(replicas.size), enumerate(names))
        apart = [f"{name} on rank {replicas.members[r]}" for r, (i, name) in pairs if ranks[r, i] != ranks[0, i]]
        if apart:
            found.append(Finding(f"replicas differ: {_some(apart)}", "report this: the gather is wrong"))
        failed = [str(replicas.members[r]) for r in range(replicas.size) if ranks[r, -1] and r != replicas.rank]
        if failed:
            found.append(Finding(f"refused on rank {', '.join(failed)}", "see that rank's log"))
    else:
        found.append(Finding("there is no FP8 parameter", "see the check after building"))
    refuse(found, word)


class FirstUpdate:
    """What FP8 parameters were before the first update of an attempt, to be compared with what they are after it."""

    def __init__(self, model: nn.Module, replicas: Group, asked: Fp8) -> None:
        """replicas: the ranks that hold the same parameters."""
        self._model, self._replicas, self._word = model, replicas, asked.word
        self._kind = expected((), asked.recipe).quantized_class
        self._before = digests(model, self._kind)

    def refuse_unless_trained(self, loss: float) -> None:
        """After the update, with no gather under way; a collective. Raises as the function of this name."""
        refuse_unless_trained(self._before, digests(self._model, self._kind), loss, self._replicas, self._word)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
