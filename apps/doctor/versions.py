"""Known-bad versions and combinations of packages, each with why and what to install instead.

Not for whether a device is there (lanes.py). A package that is absent is wrong only for a lane that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from libs.flags.facts import Facts
from libs.flags.preconditions import package, release
from libs.parallel.xla.pins import PINS

TORCH, TORCH_TPU, XLA = "2.13.0", PINS["torch"], PINS["torch_xla"]


class Rule(NamedTuple):
    """A range that a package must be in. below is not allowed itself. why: what goes wrong outside of it."""

    package: str
    at_least: str | None
    below: str | None
    why: str
    install: str


class Bad(NamedTuple):
    """Something installed that is known to be wrong."""

    package: str
    found: str
    why: str
    install: str

    def __str__(self) -> str:
        return f"{self.package} {self.found}: {self.why}; install {self.install}"


RULES = (
    Rule(
        "tilelang", "0.1.15", "0.1.15.1", "the Hopper kernels are checked with 0.1.15 alone; its dialect moves",
        "'tilelang==0.1.15'",
    ),
    Rule(
        "liger-kernel", "0.8.3", None, "before 0.8.3 its fused loss has wrong gradients for tokens of unequal weight",
        "'liger-kernel==0.8.5'",
    ),
    Rule(
        "transformer-engine", "2.9", "2.12", "megatron-core 0.16.1 declares 2.9 up to 2.12; a later one needs "
        "FATHOM_FP8_PARAM_GATHER=on_untried_te", "'transformer-engine>=2.9,<2.12'",
    ),
    Rule("megatron-core", "0.16.1", "0.16.2", "libs.parallel is written against 0.16.1", "'megatron-core==0.16.1'"),
    Rule("pydantic", "2.11", "3", "records and configs are pydantic 2 models", "'pydantic>=2.11,<3'"),
    Rule("numpy", "2.1", "3", "shards are read with numpy 2", "'numpy>=2.1,<3'"),
)  # fmt: skip


def known_bad(python: str, packages: Mapping[str, str]) -> list[Bad]:
    """Everything installed that is known to be wrong, whatever lane it belongs to."""
    found = [_judged(rule, packages) for rule in RULES if rule.package in packages]
    found.append(_torch_pair(packages))
    if release(python)[:2] != (3, 11):
        found.append(Bad("python", python, "the project is written for and tested with 3.11", "Python 3.11"))
    return [bad for bad in found if bad is not None]


def _judged(rule: Rule, packages: Mapping[str, str]) -> Bad | None:
    wrong = package(rule.package, rule.at_least, rule.below).check("on", Facts(packages=dict(packages)))
    return None if wrong is None else Bad(rule.package, packages[rule.package], rule.why, rule.install)


def _torch_pair(packages: Mapping[str, str]) -> Bad | None:
    """torch alone is pinned; torch_xla works with the torch of its own release only."""
    torch, xla = packages.get("torch"), packages.get("torch-xla")
    if torch is None:
        return None
    if xla is not None:
        if release(xla)[:2] != release(torch)[:2]:
            why = f"torch_xla {xla} is built against the torch of its own release: it fails when it is loaded"
            return Bad("torch", torch, why, f"'torch=={TORCH_TPU}' 'torch_xla=={XLA}', in an environment of their own")
        return None
    if release(torch) != release(TORCH):
        return Bad("torch", torch, f"the project is tested with {TORCH} (with {TORCH_TPU} beside torch_xla)",
                   f"'torch=={TORCH}'")  # fmt: skip
    return None
