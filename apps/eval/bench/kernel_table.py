"""What `fathom bench kernels` found, as its JSON has it: one row for each compiled kernel and for each launch.

Not for finding it out (kernels.py): no compiler is needed to read a table.
"""
# N state  P head width  R rank  C tokens of a chunk  B sequences  S tokens  H heads

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from apps.eval.bench.receipt import Aim

# As in `libs.kernels.mimo.sm90`, which needs torch and the compilers; a test compares the names.
KernelName = Literal["states", "combine", "fwd", "bwd_fwd", "bwd_states", "bwd_combine", "bwd_bwd"]
Mode = Literal["plain", "tma", "ws"]
Split = Literal["off", "auto", "on"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KernelRow(_Record):
    """One compiled kernel. `registers_needed`: without the ceiling that setmaxnreg or a wanted occupancy sets.
    `problems`: wrong code, spills beyond the tile table's allowance, or code that is not what the gates ask for."""

    kernel: KernelName
    gates: str
    mode: Mode
    N: int
    P: int
    R: int
    C: int
    threads: int
    registers: int
    registers_needed: int
    spill_bytes: int
    spill_bytes_allowed: int
    shared_bytes: int
    blocks_per_multiprocessor: int
    occupancy: float = Field(description="resident threads over those a multiprocessor can hold")
    tma_loads: int = Field(description="sites, by descriptor")
    bulk_copies: int = Field(description="sites, TMA without a descriptor: contiguous pieces")
    tma_stores: int
    async_copies: int
    wgmma: int
    mma: int
    tma_ranks: list[int]
    problems: list[str]

    @property
    def tma_sites(self) -> int:
        """All of them."""
        return self.tma_loads + self.bulk_copies + self.tma_stores


class GridRow(_Record):
    """Thread blocks of one launch, and the multiprocessors that get one."""

    kernel: KernelName
    B: int
    S: int
    H: int
    split: Split
    splits: int
    grid: tuple[int, int, int]
    blocks: int
    busy_multiprocessors: int


class KernelTable(_Record):
    """Everything the command found. Not a receipt: no time was measured."""

    schema_version: Literal[1] = 1
    target: Literal["sm_90a"] = "sm_90a"
    versions: dict[str, str]
    multiprocessors: int
    kernels: list[KernelRow]
    grids: list[GridRow]
    aims: list[Aim]

    @property
    def problems(self) -> list[str]:
        """One line for each, with the kernel it is in."""
        return [f"{row.kernel} ({row.gates}, N={row.N}): {p}" for row in self.kernels for p in row.problems]
