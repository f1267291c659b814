"""What a process knows about its machine, its model and its kernels when the gates are resolved.

Not for finding out: there is no torch here, so the caller fills in what it has probed. None means unknown,
and a precondition on an unknown fact fails.
"""

from __future__ import annotations

import importlib.metadata
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# Distributions that preconditions ask for.
RELEVANT_PACKAGES = ("jax", "liger-kernel", "megatron-core", "tilelang", "torch-xla", "transformer-engine")


def installed_packages() -> dict[str, str]:
    """Name -> version of the relevant distributions that are installed (nothing is imported)."""
    found: dict[str, str] = {}
    for name in RELEVANT_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Facts(BaseModel):
    """Frozen facts. Sizes in bytes; compute_capability as (major, minor)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # xla: torch_xla on a CPU, which can do what a TPU does but for its kernels.
    device: Literal["cpu", "cuda", "tpu", "xla"] = "cpu"
    device_name: str | None = None
    compute_capability: tuple[int, int] | None = None
    device_count: int | None = None
    multiprocessors: int | None = None
    free_memory_bytes: int | None = None
    packages: dict[str, str] = Field(default_factory=installed_packages)

    # The scan kernels. batch_heads: B*H of one launch. psiv_stages: what mimo_backend has of psiv_cache.
    # two_d_kernels: kernels whose shared tiles are rank 2, of "fwd", "bwd_fwd", "bwd_bwd".
    mimo_backend: str | None = None
    psiv_stages: tuple[str, ...] = ()
    psiv_bytes_per_layer: int | None = None
    n_mamba_layers: int | None = None
    batch_heads: int | None = None
    two_d_kernels: tuple[str, ...] = ()
    split_scan_kernels: bool | None = None

    # Training.
    bf16: bool | None = None
    distributed_optimizer: bool | None = None
    fp8_recipe: str | None = None
    te_linears: int | None = None
    liger_selftest: bool | None = None
    liger_selftest_detail: str | None = None
    tensor_parallel: int | None = None

    # The model and its inference.
    # stack_difference: where the stack stops being one unit of layers repeated. homogeneous_runs: how many runs of
    # equal units it has.
    homogeneous_stack: bool | None = None
    stack_difference: str | None = None
    homogeneous_runs: int | None = None
    activation_checkpointing: str | None = None
    # attention_tile_refusal: why not, with the nearest shape that is.
    attention_in_tile_table: bool | None = None
    attention_tile_refusal: str | None = None
    mtp_depth: int | None = None
    state_slots: bool | None = None
    draft_length: int | None = None
    kv_block_size: int | None = None
