"""The checks that gates share: device, capability, package range, memory, shape. All pure, all over `Facts`.

Not for one gate's own rule, which stands beside the gate in `catalog`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from libs.flags.facts import Facts
from libs.flags.registry import GateValue, Precondition

_RELEASE = re.compile(r"[0-9]+(\.[0-9]+)*")


def on_device(*devices: str) -> Precondition:
    """Any one of them."""
    named = " or ".join(devices)

    def check(_value: GateValue, facts: Facts) -> str | None:
        return None if facts.device in devices else f"needs device {named}, this run has {facts.device}"

    return Precondition(f"device.{'.'.join(devices)}", f"device {named}", f"run on a {named} device", check)


def capability(major: int, minor: int) -> Precondition:
    name = f"sm_{major}{minor}"

    def check(_value: GateValue, facts: Facts) -> str | None:
        have = facts.compute_capability
        if have is not None and have >= (major, minor):
            return None
        shown = "no CUDA device" if have is None else f"sm_{have[0]}{have[1]} ({facts.device_name or 'unnamed'})"
        return f"needs compute capability {name} or above, found {shown}"

    return Precondition(f"capability.{name}", f"{name}+", f"run on a GPU of {name} or above (H100, H200)", check)


def package(name: str, at_least: str | None = None, below: str | None = None) -> Precondition:
    limits = [f">={at_least}"] * (at_least is not None) + [f"<{below}"] * (below is not None)
    wanted = f"{name} {','.join(limits)}".strip()

    def check(_value: GateValue, facts: Facts) -> str | None:
        have = facts.packages.get(name)
        if have is None:
            return f"needs {wanted}, which is not installed"
        if limits and not is_version(have):
            return f"needs {wanted}, found {have!r}, which is not a version"
        low = at_least is None or release(have) >= release(at_least)
        high = below is None or release(have) < release(below)
        return None if low and high else f"needs {wanted}, found {have}"

    return Precondition(f"package.{name}", wanted, f"install {wanted}", check)


def fact_true(field: str, requires: str, remedy: str) -> Precondition:
    """A yes-or-no fact; unknown counts as no and says so."""
    assert field in Facts.model_fields, field

    def check(_value: GateValue, facts: Facts) -> str | None:
        have: bool | None = getattr(facts, field)
        if have is True:
            return None
        return f"needs {requires}: {'unknown here' if have is None else 'not so'}"

    return Precondition(f"fact.{field}", requires, remedy, check)


def needs(
    name: str,
    requires: str,
    remedy: str,
    values: tuple[str, ...] = (),
) -> Callable[[Callable[[GateValue, Facts], str | None]], Precondition]:
    """Decorator: a gate's own rule as a precondition."""

    def make(check: Callable[[GateValue, Facts], str | None]) -> Precondition:
        return Precondition(name, requires, remedy, check, values)

    return make


def is_version(text: str) -> bool:
    """Whether `text` begins as a version does, so that it has a `release`."""
    return _RELEASE.match(text) is not None


def release(version: str) -> tuple[int, ...]:
    """The numbers before any suffix, without closing zeros: "2.9.0a0" -> (2, 9)."""
    match = _RELEASE.match(version)
    assert match is not None, f"not a version: {version!r}"
    numbers = [int(part) for part in match.group().split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
