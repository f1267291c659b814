"""The versions that this lane works with, and the refusal that names the fix. Imports nothing of what it checks.

torch_xla 2.9.0 is the last release of PyTorch/XLA and loads with torch 2.9 only, so the lane has an environment of its
own (`make setup-tpu`, infra/tpu).
"""

from __future__ import annotations

import importlib.metadata

from libs.flags.errors import UserError

PINS = {
    "torch": "2.9.0",
    "torch_xla": "2.9.0",
    "jax": "0.7.1",
    "jaxlib": "0.7.1",
    "libtpu": "0.0.21",
    "torchax": "0.0.7",
}
# What each use of the lane needs. SPMD needs jax and torchax to differentiate loops; ahead-of-time compilation libtpu.
RUNTIME = ("torch", "torch_xla", "jax", "torchax")
AHEAD_OF_TIME = ("torch", "torch_xla", "jax", "jaxlib", "libtpu")


def refuse_other_versions(names: tuple[str, ...], what: str) -> None:
    """Raises UserError: a package that `what` needs is missing or of another version, naming all of them."""
    wrong = []
    for name in names:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name}=={PINS[name]} is not installed")
            continue
        if found.partition("+")[0] != PINS[name]:
            wrong.append(f"{name}=={PINS[name]} is needed, {found} is installed")
    if wrong:
        listed = "; ".join(wrong)
        raise UserError(
            f"{what}: {listed}. torch_xla works with one version of torch, so it has an environment of its own: "
            "`make setup-tpu`, then .venv-tpu/bin/fathom (infra/tpu/README.md)"
        )
