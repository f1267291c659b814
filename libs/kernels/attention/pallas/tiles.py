"""Which shapes the Pallas kernels take, and in blocks of how many tokens. Imports no jax: gates ask it anywhere.

Every row of the table was compiled for v6e by libtpu (tests/tpu/test_pallas_aot.py); none was timed on a chip.
"""
# S tokens  D head width  b tokens of a block

from __future__ import annotations

from typing import NamedTuple

# Scoped VMEM that the kernels ask for, of the 128 MiB of a v6e core.
VMEM_BYTES = 32 * 2**20
# Lanes of a vector register: positions of queries lie along them, so blocks are multiples of it.
LANES = 128


class Row(NamedTuple):
    """Head width and dtype -> the largest block. Smaller ones of `BLOCKS` serve lengths it does not divide."""

    head_dim: int
    dtype: str
    block: int


TABLE = (
    Row(64, "bfloat16", 1024),
    Row(128, "bfloat16", 1024),
    Row(256, "bfloat16", 512),
    Row(64, "float32", 512),
    Row(128, "float32", 512),
)
BLOCKS = (1024, 512, 256, LANES)
# Where it was compiled: the whole range between is the same program with another grid.
LONGEST = 65536


def choose_block(S: int, D: int, dtype: str) -> int:
    """Tokens of a block: the largest one of the table that divides S.

    Raises:
        ValueError: a shape outside the table; names the nearest one inside.
    """
    row = next((row for row in TABLE if (row.head_dim, row.dtype) == (D, dtype)), None)
    if row is None:
        listed = ", ".join(f"{row.head_dim} {row.dtype}" for row in TABLE)
        near = min(TABLE, key=lambda row: (row.dtype != dtype, abs(row.head_dim - D)))
        raise ValueError(
            f"attention backend 'pallas' has no tile for head_dim={D} in {dtype}; it has {listed}; "
            f"the nearest is head_dim={near.head_dim} in {near.dtype}"
        )
    if S % LANES or not LANES <= S <= LONGEST:
        nearest = min(max(round(S / LANES) * LANES, LANES), LONGEST)
        raise ValueError(
            f"attention backend 'pallas' needs a sequence of whole blocks of {LANES} tokens, at most {LONGEST}, got "
            f"S={S}; the nearest is S={nearest}"
        )
    block = next(block for block in BLOCKS if block <= row.block and S % block == 0)
    assert vmem_bytes(block, D, dtype) <= VMEM_BYTES, "a row of the table fits"
    return block


def refusal(S: int, D: int, dtype: str) -> str | None:
    """What `choose_block` would say, or None."""
    try:
        choose_block(S, D, dtype)
    except ValueError as error:
        return str(error)
    return None


def vmem_bytes(block: int, D: int, dtype: str) -> int:
    """Of the kernel that needs most (dk and dv), by formula: operands and results twice, sums, five squares of scores.

    Widths are rounded up to whole registers. libtpu does not keep all of it: 12 MiB were enough for every row.
    """
    size = 2 if dtype == "bfloat16" else 4
    width = -(-D // LANES) * LANES
    operands = 2 * (6 * block * width * size + 3 * 8 * block * 4)
    return operands + 2 * block * width * 4 + 5 * block * block * 4
