"""How an operator picks its backend: once, with a reason, and never by falling back.

Not for gates (see `libs.flags`): a backend is *which code can run here*, a gate is *what the user asked for*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Choice(NamedTuple):
    """A resolved choice and why it was made, so that a run log can tell both."""

    value: str
    reason: str


# A probe answers "can this backend run on that device type?": None when it can, else the reason it cannot.
Probe = Callable[[str], str | None]


def pick(operator: str, requested: str, device_type: str, backends: Mapping[str, Probe]) -> Choice:
    """Resolve `requested` to a backend of `operator` on `device_type` ("cpu", "cuda", "xla", "meta").

    `backends` is ordered by preference: "auto" takes the first whose probe passes. A named backend is taken
    or refused, never replaced.

    Raises:
        ValueError: unknown backend, or one that cannot run on this device, with the backends that can.
    """
    refusals = {name: probe(device_type) for name, probe in backends.items()}
    able = [name for name, refusal in refusals.items() if refusal is None]
    if requested == "auto":
        if not able:
            why = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items())
            raise ValueError(f"{operator}: no backend can run on device {device_type!r} ({why})")
        skipped = [f"{name} cannot ({refusals[name]})" for name in list(backends)[: list(backends).index(able[0])]]
        reason = f"auto: first of {', '.join(backends)} that runs on {device_type}"
        return Choice(able[0], "; ".join([reason, *skipped]))
    if requested not in backends:
        raise ValueError(f"{operator}: unknown backend {requested!r}; known: auto, {', '.join(backends)}")
    refusal = refusals[requested]
    if refusal is not None:
        raise ValueError(
            f"{operator}: backend {requested!r} cannot run on device {device_type!r}: {refusal}; "
            f"able here: {', '.join(able) or 'none'}"
        )
    return Choice(requested, "requested by name")
