"""What may be asked of the Hopper kernels, as one frozen value, and what it means for a kernel's build.

Only the meaning: who resolves gates from the environment, and refuses what a backend lacks, is `libs.flags`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from libs.flags.installed import value_of

Reach = Literal["off", "fwd", "all"]
Split = Literal["off", "auto", "on"]
Psiv = Literal["off", "python_precompute", "gmem_pool", "bwd_fwd_reuse", "bwd_bwd_reuse"]
Side = Literal["fwd", "bwd"]

# How tiles reach shared memory: "plain" by cp.async, "tma" by TMA that the same warps wait for, "ws" by TMA from a
# producer warp group of its own.
Mode = Literal["plain", "tma", "ws"]
MODES: tuple[Mode, ...] = ("plain", "tma", "ws")

# Field of `KernelGates` -> gate of the catalogue.
GATES = {
    "tma": "tma",
    "warp_specialization": "warp_specialization",
    "split_scan": "split_scan",
    "psiv": "psiv_cache",
}


@dataclass(frozen=True)
class KernelGates:
    """Requested stages. `tma` and `warp_specialization` reach no kernel, the forward ones, or all of them."""

    tma: Reach = "off"
    warp_specialization: Reach = "off"
    split_scan: Split = "off"
    psiv: Psiv = "off"

    def __post_init__(self) -> None:
        for side in ("fwd", "bwd"):
            reached = self.warp_specialization in ("all", side)
            assert not reached or self.tma in ("all", side), "warp specialization needs tma on the same kernels"

    @classmethod
    def from_installed(cls) -> KernelGates:
        """Those in force in this process. Asking records the exposure of all four: each shapes every kernel.

        Raises:
            GatesNotInstalled: the program has not resolved its gates; there is no default to fall back on.
        """
        # Refused outside their vocabulary when they were resolved, so the words fit the types.
        words: dict[str, Any] = {field: value_of(gate) for field, gate in GATES.items()}
        return cls(**words)

    def mode(self, side: Side) -> Mode:
        """How kernels of one side are built."""
        if self.warp_specialization in ("all", side):
            return "ws"
        return "tma" if self.tma in ("all", side) else "plain"


def pass_configs(mode: Mode) -> dict[str, object]:
    """TileLang's pass configs of a mode. `disable_tma_lower` alone leaves TMA on: the specialization must go too.

    `tl.enable_aggressive_shared_memory_merge` stays off: with a producer group it lays tiles of the consumer over
    tiles that the producer already refills for the next chunk (0.1.15; `inspect.lint` finds it).
    """
    configs: dict[Mode, dict[str, object]] = {
        "ws": {},
        "tma": {"tl.disable_warp_specialized": True},
        "plain": {"tl.disable_warp_specialized": True, "tl.disable_tma_lower": True},
    }
    return configs[mode]
