"""How many bytes the engine's memory takes, before any of it is allocated: the managers allocate by the same layouts.

Not for the model's parameters and activations (`libs.model.memory`), nor for states kept by the prefix cache, which
have a limit of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from libs.flags.errors import UserError
from libs.model.inference.layout import KvLayout, StateLayout
from libs.model.inference.resources import CapacityError


class MemoryPlan(NamedTuple):
    """What to build and its bytes.

    by_component: kv_blocks, states, intermediate_states, and others that the caller adds. blocks: the dummy among them.
    """

    requests: int
    max_draft: int
    blocks: int
    by_component: dict[str, int]
    total: int

    def require(self, available: int) -> None:
        """Raises CapacityError when that many bytes are not enough."""
        if self.total > available:
            raise CapacityError("bytes for KV blocks and recurrent states", needed=self.total, available=available)


def plan_memory(
    states: StateLayout,
    kv: KvLayout,
    *,
    requests: int,
    max_tokens: int,
    max_draft: int = 0,
    blocks: int | None = None,
    others: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """Room for that many requests at a time, each of up to `max_tokens` tokens (prompt and generated) and the drafts
    after them, sharing nothing; or for `blocks` blocks (the dummy not among them).

    others: bytes of further components, by name.

    Raises:
        UserError: a count below 1, or a negative draft length.
    """
    if blocks is not None and blocks < 1:
        raise UserError(f"need at least 1 KV block, got {blocks}")
    if requests < 1 or max_tokens < 1 or max_draft < 0:
        raise UserError(
            f"need requests >= 1, max_tokens >= 1 and max_draft >= 0, got {requests}, {max_tokens} and {max_draft}"
        )
    blocks = 1 + (requests * kv.blocks_for(max_tokens + max_draft) if blocks is None else blocks)
    by_component = {
        "kv_blocks": kv.nbytes(blocks),
        "states": states.nbytes(requests),
        "intermediate_states": states.nbytes(requests * max_draft),
        **(others or {}),
    }
    return MemoryPlan(requests, max_draft, blocks, by_component, sum(by_component.values()))
