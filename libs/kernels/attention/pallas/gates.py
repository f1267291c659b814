"""What the `pallas_attention` gate means for attention: which backend a program asks for.

Not for resolving gates (see `libs.flags`), nor for which shapes the kernels take (see `tiles`).
"""

from __future__ import annotations

from libs.flags.catalog import CATALOG
from libs.flags.installed import is_enabled

GATE = "pallas_attention"


def requested_backend(configured: str) -> str:
    """The backend to request when the config says `configured`: "pallas" exactly when the gate is in force.

    Asking records the gate's exposure.

    Raises:
        ValueError: as `backend_under`. GatesNotInstalled: the program has not resolved its gates.
    """
    return backend_under(is_enabled(GATE), configured)


def backend_under(gated: bool, configured: str) -> str:
    """The same by whether the gate is on, before gates are installed.

    Raises:
        ValueError: config and gate contradict each other.
    """
    variable = CATALOG[GATE].variable
    if configured == "pallas" and not gated:
        raise ValueError(f"attention backend 'pallas' is behind a gate: set {variable}=on, or choose auto or xla")
    if gated and configured not in ("auto", "pallas"):
        raise ValueError(f"{variable}=on contradicts attention backend {configured!r}: unset one, or choose auto")
    return "pallas" if gated else configured
