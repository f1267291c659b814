"""What an engine is told, and the bytes it will take: validated and planned before anything is allocated.

Not for what one request asks for (`sampler.Sampling`), nor for the gates, which the engine reads itself.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from libs.flags.errors import UserError
from libs.model.config import ModelConfig
from libs.model.inference.drafts import DRAFT_WINDOW
from libs.model.inference.layout import MAX_BLOCK, MIN_BLOCK, kv_layout, state_layout
from libs.model.inference.plan import MemoryPlan, plan_memory
from libs.model.inference.rollback import Rollback
from libs.model.inference.sampler import explain

_AT_LEAST_ONE = ("max_batch", "max_tokens", "prefill_chunk")


class EngineConfig(BaseModel):
    """max_batch: requests in flight. max_tokens: longest request, prompt and generated. block_size: tokens of a KV
    block. prefill_chunk: prompt tokens per scheduler step, a multiple of the prefill grid. kv_blocks: less the dummy;
    None: room for max_batch requests of max_tokens. audit_share: of the cache hits that are recomputed without the
    cache. snapshot_bytes: limit of states kept. draft_length: tokens drafted per step; 0: no speculation. rollback:
    how states behind rejected drafts are made.

    Raises:
        UserError: a value out of its range, with the field's name and the range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_batch: int = 8
    max_tokens: int
    block_size: int = 64
    prefill_chunk: int = 512
    kv_blocks: int | None = None
    audit_share: float = 0.0
    snapshot_bytes: int = 1 << 30
    draft_length: int = 0
    rollback: Rollback = Rollback.REPLAY

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(explain("engine", error)) from error

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        low = {**dict.fromkeys(_AT_LEAST_ONE, 1), "snapshot_bytes": 0, "draft_length": 0}
        for field, least in low.items():
            if getattr(self, field) < least:
                raise UserError(f"{field}={getattr(self, field)}; allowed are {least} and above")
        if self.kv_blocks is not None and self.kv_blocks < 1:
            raise UserError(f"kv_blocks={self.kv_blocks}; allowed are 1 and above")
        if not 0 <= self.audit_share <= 1:
            raise UserError(f"audit_share={self.audit_share} is outside 0 to 1")
        if not MIN_BLOCK <= self.block_size <= MAX_BLOCK:
            raise UserError(f"block_size={self.block_size} tokens is outside {MIN_BLOCK} to {MAX_BLOCK}")
        if self.draft_length >= self.block_size:
            raise UserError(f"draft_length={self.draft_length} must be below block_size={self.block_size}")
        return self

    @property
    def intermediate(self) -> int:
        """Tokens per request whose states are kept during a verification: the last output and the drafts."""
        return self.draft_length + 1 if self.draft_length and self.rollback is Rollback.SNAPSHOT else 0

    def check_model(self, model: ModelConfig, *, grid: int, speculation: bool) -> None:
        """Whether it goes with a model, its prefill grid in tokens and the gate `mtp_speculation`.

        Raises:
            UserError: a prefill chunk off the grid, drafts without the gate or without MTP depths.
        """
        length = self.draft_length
        if self.prefill_chunk % grid:
            raise UserError(f"prefill_chunk={self.prefill_chunk} must be a multiple of the grid of {grid} tokens")
        if length and not speculation:
            raise UserError(
                f"draft_length={length} needs the gate mtp_speculation: set FATHOM_MTP_SPECULATION=on or draft_length=0"
            )
        if length and not model.mtp_depth:
            raise UserError(f"draft_length={length} needs a model with MTP depths; {model.name!r} has none")

    def plan(self, model: ModelConfig, dtype: torch.dtype) -> MemoryPlan:
        """Bytes of everything the engine allocates for good, before it does: blocks, states, draft windows.

        Raises:
            UserError: as `plan_memory`.
        """
        window = self.max_batch * DRAFT_WINDOW * model.hidden_size * dtype.itemsize if self.draft_length else 0
        blocks = self.kv_blocks
        kv = kv_layout(model, dtype, self.block_size)
        if blocks is None:
            blocks = self.max_batch * kv.blocks_for(self.max_tokens)
        return plan_memory(
            state_layout(model, dtype),
            kv,
            requests=self.max_batch,
            max_tokens=self.max_tokens,
            max_draft=self.intermediate,
            blocks=blocks,
            others={"draft_windows": window},
        )
