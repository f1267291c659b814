"""Which layers of a stack are the same layer with other weights, so that one traced copy may stand for all of them.

A loop over layers runs the first unit's code with every unit's weights and never looks at the others: whatever differs
but the weights' values would be wrong without a word. Plain torch; it reads modules and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

# Of modules that draw random numbers or write to themselves in forward.
IMPURE_MODULES = (_DropoutNd, _NormBase, nn.RReLU)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_MODULE_FIELDS = frozenset(vars(nn.Module())) - {"training"}
# Path inside a layer -> what is there, in a form that == compares.
Structure: TypeAlias = dict[str, Any]


class Finding(NamedTuple):
    """Why a layer cannot be in a run. path: inside the layer, "" for the layer itself."""

    layer: int
    path: str
    what: str

    def __str__(self) -> str:
        return f"layer {self.layer}{f', {self.path}' if self.path else ''}: {self.what}"


class Run(NamedTuple):
    """`repeats` units of `unit` layers each from layer `start` on; every unit has the structure of the first."""

    start: int
    unit: int
    repeats: int

    @property
    def stop(self) -> int:
        return self.start + self.unit * self.repeats


class _Typed(NamedTuple):
    """A value with the name of its type, so that True is not 1, nor 1.0. What has no `==` of its own equals itself."""

    kind: str
    value: object

    def __repr__(self) -> str:
        return repr(self.value)


class _HoldsTensor(Exception):
    """An attribute has a tensor in it."""


def structure(layer: nn.Module) -> Structure:
    """Everything about a layer but the values of its parameters: per module its class, attributes (`training` too) and
    hooks, per parameter its shape, dtype, device, whether it is trained and which other name it is shared with.

    Attributes are compared with `==` and by type; what has no `==` of its own is equal to itself alone.
    """
    found: Structure = {}
    first_names: dict[int, str] = {}
    for prefix, module in layer.named_modules(remove_duplicate=False):
        found[prefix or "class"] = _name_of(type(module))
        for name, value in vars(module).items():
            if name not in _MODULE_FIELDS:
                found[_join(prefix, name)] = _comparable(value)
        for field in _HOOKS:
            if hooks := list(getattr(module, field).values()):
                found[_join(prefix, field)] = _comparable(hooks)
        for name, parameter in module._parameters.items():
            path = _join(prefix, name)
            found |= {path: None} if parameter is None else _parameter(path, parameter, first_names)
    return found


def _parameter(path: str, parameter: nn.Parameter, first_names: dict[int, str]) -> Structure:
    return {
        f"{path} shape": tuple(parameter.shape),
        f"{path} dtype": parameter.dtype,
        f"{path} device": parameter.device,
        f"{path} requires_grad": parameter.requires_grad,
        f"{path} is": first_names.setdefault(id(parameter), path),
    }


def obstacles(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, what is in the way) of everything that keeps a layer out of a run even among its equals."""
    for prefix, module in layer.named_modules(remove_duplicate=False):
        if isinstance(module, IMPURE_MODULES):
            yield prefix, f"{type(module).__name__} draws random numbers or updates itself in forward"
        for field in _HOOKS:
            hooks = getattr(module, field).values()
            if any(not getattr(hook, "stateless", False) for hook in hooks):
                yield prefix, f"a hook ({field.strip('_')}): only the first layer's would run, while the loop is traced"
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield _join(prefix, name), "a buffer: only parameters have a value for each layer"
        for name, value in vars(module).items():
            if name in _MODULE_FIELDS:
                continue
            try:
                _comparable(value)
            except _HoldsTensor:
                yield _join(prefix, name), "a tensor that is no parameter: the loop would close over the first layer's"


def difference(layers: Sequence[nn.Module], index: int, like: int) -> Finding | None:
    """The first thing in which two layers differ, None when they are the same layer with other weights."""
    return _difference(structure(layers[index]), structure(layers[like]), index, like)


def _difference(found: Structure, expected: Structure, index: int, like: int) -> Finding | None:
    absent = "not there"
    for path in [*expected, *(path for path in found if path not in expected)]:
        if path not in found or path not in expected or found[path] != expected[path]:
            here, there = (repr(parts[path]) if path in parts else absent for parts in (found, expected))
            return Finding(index, path, f"{here}, but {there} in layer {like}")
    return None


def find_obstacle(layers: Sequence[nn.Module]) -> Finding | None:
    """The first obstacle in a stack."""
    for index, layer in enumerate(layers):
        for path, what in obstacles(layer):
            return Finding(index, path, what)
    return None


def whole_stack(layers: Sequence[nn.Module]) -> Run | Finding:
    """The stack as one run of its shortest unit: a group of consecutive layers that, repeated at least twice, is the
    whole stack. Otherwise the first thing in the way.

    Among the groups whose length divides the stack's, it is the first difference of the one that comes closest: the
    fewest layers differ from their counterparts in the first unit.
    """
    if (obstacle := find_obstacle(layers)) is not None:
        return obstacle
    structures = [structure(layer) for layer in layers]
    closest: list[Finding] = []
    for unit in (length for length in range(1, len(layers) // 2 + 1) if len(layers) % length == 0):
        pairs = ((index, index % unit) for index in range(unit, len(layers)))
        compared = (_difference(structures[index], structures[like], index, like) for index, like in pairs)
        findings = [finding for finding in compared if finding is not None]
        if not findings:
            return Run(0, unit, len(layers) // unit)
        if not closest or len(findings) < len(closest):
            closest = findings
    return closest[0] if closest else Finding(0, "", f"a stack of {len(layers)} has nothing that repeats")


def homogeneous_runs(layers: Sequence[nn.Module]) -> list[Run] | Finding:
    """From the first layer on, always the run that takes in most layers, of the shortest unit; layers between runs are
    in none. The first obstacle if there is one, and a finding when nothing repeats."""
    if (obstacle := find_obstacle(layers)) is not None:
        return obstacle
    kinds = _kinds(layers)
    runs: list[Run] = []
    at = 0
    while at < len(kinds):
        units = range(1, (len(kinds) - at) // 2 + 1)
        best = max((_run_at(kinds, at, unit) for unit in units), key=_taken, default=None)
        if best is None or best.repeats < 2:
            at += 1
            continue
        runs.append(best)
        at = best.stop
    return runs or Finding(0, "", f"no group of layers in this stack of {len(layers)} repeats")


def _kinds(layers: Sequence[nn.Module]) -> list[int]:
    """Equal numbers for layers that are the same but for their weights."""
    known: list[Structure] = []
    kinds = []
    for layer in layers:
        found = structure(layer)
        number = next((n for n, other in enumerate(known) if found == other), len(known))
        if number == len(known):
            known.append(found)
        kinds.append(number)
    return kinds


def _run_at(kinds: Sequence[int], start: int, unit: int) -> Run:
    repeats = 1
    while kinds[start + repeats * unit : start + (repeats + 1) * unit] == kinds[start : start + unit]:
        repeats += 1
    return Run(start, unit, repeats)


def _taken(run: Run) -> tuple[int, int]:
    """Most layers first, then the shortest unit."""
    return (run.unit * run.repeats if run.repeats > 1 else 0, -run.unit)


def _comparable(value: Any) -> _Typed:
    """Raises _HoldsTensor: a tensor, or a collection of some."""
    if isinstance(value, Tensor):
        raise _HoldsTensor
    if isinstance(value, dict):
        return _Typed(_name_of(type(value)), [(_comparable(k), _comparable(v)) for k, v in value.items()])
    if isinstance(value, tuple | list):
        return _Typed(_name_of(type(value)), [_comparable(item) for item in value])
    return _Typed(_name_of(type(value)), value)


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
