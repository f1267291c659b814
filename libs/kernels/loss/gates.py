"""What the `fused_linear_ce` gate means for the loss: which backend a program asks for.

Not for resolving gates (see `libs.flags`), nor for what a backend can do (see `api`).
"""

from __future__ import annotations

from libs.flags.catalog import CATALOG
from libs.flags.installed import value_of
from libs.flags.registry import GateValue
from libs.kernels.loss.liger import GATE


def requested_backend(configured: str) -> str:
    """The backend to request when the config says `configured`: "liger" exactly when the gate is in force.

    Asking records the gate's exposure.

    Raises:
        ValueError: as `backend_under`. GatesNotInstalled: the program has not resolved its gates.
    """
    return backend_under(value_of(GATE), configured)


def backend_under(value: GateValue, configured: str) -> str:
    """The same by the gate's value, before gates are installed.

    Raises:
        ValueError: config and gate contradict each other.
    """
    variable, gated = CATALOG[GATE].variable, value == "liger"
    if configured == "liger" and not gated:
        raise ValueError(f"loss backend 'liger' is behind a gate: set {variable}=liger, or choose auto or chunked")
    if gated and configured not in ("auto", "liger"):
        raise ValueError(f"{variable}=liger contradicts loss backend {configured!r}: unset one, or choose auto")
    return "liger" if gated else configured
