"""Recurrent states of the requests in flight: fixed-size device tensors, one row ("slot") per request.

For Mamba-3 layers (four parts that move together) and for layers with a convolution. A slot's state is moved by whoever
runs the model; this file allocates, clears, captures, restores and rolls speculative states back, exactly by bytes.
Not for keys and values (`kv_blocks`) nor for deciding what is kept (`prefix`).
"""
# L layers that have a part  M slots (max_batch)  B rows of one call  J draft tokens

from __future__ import annotations

import hashlib
import heapq
import json
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from libs.flags.errors import UserError
from libs.model.inference.blob import Spec, dtype_name, pack, packed_bytes, unpack
from libs.model.inference.layout import CONV, StateLayout, StatePart
from libs.model.inference.resources import CapacityError, NotCopyable

# What `alloc` returns when there is no recurrent layer: no row exists, and every call on it does nothing.
NO_SLOT = -1
# What a blob may hold; the third is CONV.
ALL, RECURRENT = "all", "recurrent"
_CONTENTS = (ALL, RECURRENT, CONV)

_logger = logging.getLogger(__name__)


class _Carved(NamedTuple):
    """Intermediate states as `reshape_intermediate_states` cut them: (L, B, J, ...) by part name."""

    batch: int
    draft: int
    views: dict[str, Tensor]


class StateSlots(NotCopyable):
    """The recurrent-state manager.

    With no layer that has a state it allocates nothing and every call is a no-op (`alloc` returns NO_SLOT).

    Attributes:
        nbytes: of all tensors, intermediate states included; also logged.
    """

    def __init__(
        self,
        layout: StateLayout,
        *,
        model: str,
        max_batch: int,
        max_draft: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate, zero-initialised.

        Args:
            model: fingerprint of the model (`layout.model_fingerprint`); blobs of another are refused.
            max_batch: slots. max_draft: most tokens of one speculative verification; 0 keeps no intermediate states.

        Raises:
            UserError: max_batch < 1 or max_draft < 0; before anything is allocated.
        """
        if max_batch < 1 or max_draft < 0:
            raise UserError(f"need max_batch >= 1 and max_draft >= 0, got {max_batch} and {max_draft}")
        kinds = layout.kinds
        described = [[part.name, list(part.shape), list(layers)] for part, layers in kinds]
        self._identity = {
            "model": model,
            "layout": hashlib.sha256(json.dumps(described).encode()).hexdigest(),
            "dtype": ",".join(f"{part.name}:{dtype_name(part.dtype)}" for part, _ in kinds),
        }
        self.layout, self.max_batch, self.max_draft = layout, max_batch, max_draft
        self._states = {
            part.name: torch.zeros(len(layers), max_batch, *part.shape, dtype=part.dtype, device=device)
            for part, layers in kinds
        }
        self._intermediate = {
            part.name: torch.zeros(len(layers), max_batch * max_draft, *part.shape, dtype=part.dtype, device=device)
            for part, layers in kinds
            if max_draft
        }
        self._carved: _Carved | None = None
        self._free = list(range(max_batch))
        self._position: dict[int, int] = {}
        self.nbytes = sum(t.untyped_storage().nbytes() for t in (*self._states.values(), *self._intermediate.values()))
        assert self.nbytes == layout.nbytes(max_batch * (1 + max_draft)), "the plan is not what was allocated"
        _logger.info(
            "recurrent states: %d bytes for %d layers, %d slots, %d draft tokens",
            self.nbytes, self.num_layers, max_batch, max_draft,
        )  # fmt: skip

    @property
    def num_layers(self) -> int:
        """Layers with a state; 0 makes every call a no-op."""
        return self.layout.num_layers

    @property
    def has_intermediate_states(self) -> bool:
        return bool(self._intermediate)

    @property
    def active(self) -> tuple[int, ...]:
        """Allocated slots, rising."""
        return tuple(sorted(self._position))

    @property
    def available(self) -> int:
        return len(self._free) if self.num_layers else self.max_batch

    def alloc(self) -> int:
        """A slot whose state is zero, whoever had it before. Raises CapacityError when all are taken."""
        if not self.num_layers:
            return NO_SLOT
        if not self._free:
            raise CapacityError(f"recurrent-state slots (of {self.max_batch})", needed=1, available=0)
        slot = self._free[0]
        self._zero(slot)
        heapq.heappop(self._free)
        self._position[slot] = 0
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back. Raises ValueError when it is not allocated (a double free among others)."""
        if not self.num_layers:
            return
        self._check_active(slot)
        del self._position[slot]
        heapq.heappush(self._free, slot)

    def clear(self, slot: int) -> None:
        """Back to the state before any token; the slot stays allocated."""
        if not self.num_layers:
            return
        self._check_active(slot)
        self._zero(slot)
        self._position[slot] = 0

    def clear_states(self) -> None:
        """`clear` for every slot, and zero intermediate states."""
        for tensor in (*self._states.values(), *self._intermediate.values()):
            tensor.zero_()
        self._carved = None
        self._position = dict.fromkeys(self._position, 0)

    def position(self, slot: int) -> int:
        """Tokens that the slot's state has absorbed, as told by `advance` and `restore`."""
        if not self.num_layers:
            return 0
        self._check_active(slot)
        return self._position[slot]

    def advance(self, slot: int, tokens: int) -> None:
        """Record that the slot's state now includes that many more tokens."""
        if not self.num_layers:
            return
        self._check_active(slot)
        if tokens < 0:
            raise ValueError(f"a state cannot advance by {tokens} tokens")
        self._position[slot] += tokens

    def get_recurrent_state(self, layer: int) -> tuple[Tensor, ...]:
        """Live tensors (M, ...) of one block, one per recurrent part in the layout's order (Mamba-3: as `MimoState`);
        empty for a block that has a convolution only. Raises ValueError for a block without a state."""
        if not self.num_layers:
            return ()
        self._check_layer(layer)
        if layer not in self.layout.layers:
            return ()
        index = self.layout.layers.index(layer)
        return tuple(self._states[part.name][index] for part in self.layout.recurrent)

    def get_conv_state(self, layer: int) -> Tensor | None:
        """The live tensor (M, conv_dim, kernel) of one block, None where it has no convolution. Raises ValueError for a
        block without a state."""
        if not self.num_layers:
            return None
        self._check_layer(layer)
        if layer not in self.layout.conv_layers:
            return None
        return self._states[CONV][self.layout.conv_layers.index(layer)]

    def read_rows(self, layer: int, slots: Sequence[int]) -> tuple[Tensor, ...]:
        """Copies (B, ...) of the recurrent parts of those slots."""
        rows = self._rows(slots)
        return tuple(part.index_select(0, rows.to(part.device)) for part in self.get_recurrent_state(layer))

    def write_rows(self, layer: int, slots: Sequence[int], parts: Sequence[Tensor]) -> None:
        """Replace the recurrent parts of those slots by (B, ...) each. Raises ValueError when a shape or a dtype is not
        the layout's: a state that was rounded on the way is an error, not a conversion."""
        rows, live = self._rows(slots), self.get_recurrent_state(layer)
        if len(parts) != len(live):
            raise ValueError(f"block {layer} has {len(live)} recurrent parts, got {len(parts)}")
        for kind, state, part in zip(self.layout.recurrent, live, parts, strict=False):
            if part.shape != (len(slots), *kind.shape) or part.dtype != state.dtype:
                expected = f"{(len(slots), *kind.shape)} {state.dtype}"
                raise ValueError(f"{kind.name} must be {expected}, got {tuple(part.shape)} {part.dtype}")
        for state, part in zip(live, parts, strict=True):
            state.index_copy_(0, rows.to(state.device), part)

    def capture(self, slot: int) -> bytes:
        """Everything of one slot as a blob (`blob`): what `restore` makes of it is byte-exact."""
        return self._capture(slot, ALL)

    def capture_bytes(self, tokens: int) -> int:
        """The length of what `capture` gives of a slot whose state has absorbed that many tokens."""
        return packed_bytes(self._specs(ALL), contents=ALL, identity=self._identity, tokens=tokens)

    def capture_recurrent_states(self, slot: int) -> bytes:
        """As `capture`, without the convolutions."""
        return self._capture(slot, RECURRENT)

    def capture_conv_states(self, slot: int) -> bytes:
        """As `capture`, the convolutions only; a blob without tensors where no layer has one."""
        return self._capture(slot, CONV)

    def restore(self, slot: int, blob: bytes) -> int:
        """Put a captured state into a slot; other slots, and kinds that the blob does not hold, keep their bytes.

        Returns:
            The tokens that the state has absorbed.

        Raises:
            BlobRefused: a blob of another model, dtype, layout or version, truncated or changed; nothing was written.
            ValueError: the slot is not allocated.
        """
        if self.num_layers:
            self._check_active(slot)
        tensors, tokens = self._unpack(blob)
        for name, tensor in tensors.items():
            self._states[name][:, slot].copy_(tensor)
        if self.num_layers:
            self._position[slot] = tokens
        return tokens

    def read_blob(self, blob: bytes) -> dict[str, Tensor]:
        """What a captured state holds: by part (L, ...), on the CPU. Raises BlobRefused as `restore`."""
        return self._unpack(blob)[0]

    def reshape_intermediate_states(self, active_batch: int, draft_len: int) -> dict[str, Tensor]:
        """Cut the reserved memory into a dense (L, active_batch, draft_len, ...) per part, for a verification to fill:
        entry (row, j) is the state after token j of that row. What it held before is meaningless.

        Raises:
            ValueError: no such memory was reserved, or sizes beyond max_batch and max_draft.
        """
        if not self.num_layers:
            return {}
        if not self.has_intermediate_states:
            raise ValueError("no intermediate states were reserved: max_draft is 0")
        if not 1 <= active_batch <= self.max_batch or not 1 <= draft_len <= self.max_draft:
            raise ValueError(
                f"active_batch={active_batch}, draft_len={draft_len} outside 1..{self.max_batch}, 1..{self.max_draft}"
            )
        rows = active_batch * draft_len
        views = {
            name: tensor[:, :rows].view(len(tensor), active_batch, draft_len, *tensor.shape[2:])
            for name, tensor in self._intermediate.items()
        }
        self._carved = _Carved(active_batch, draft_len, views)
        return views

    def scatter_mtp_states(self, accept_lengths: Sequence[int] | Tensor, slots: Sequence[int] | None = None) -> None:
        """Make the state after the last accepted token the slot's state: one batched operation per kind of state.

        Args:
            accept_lengths: per row of the verification, how many of its tokens stay, 0..draft_len; 0 leaves the slot as
                it is (and its position: `advance` tells). slots: of each row; by default the allocated ones, rising.

        Raises:
            ValueError: no verification to take from, a length out of range, or rows that do not fit; nothing was
                written. Every other row keeps its bits.
        """
        if not self.num_layers:
            return
        if self._carved is None:
            raise ValueError("reshape_intermediate_states comes first: there is no verification to take states from")
        batch, draft, views = self._carved
        lengths = _whole_numbers(accept_lengths)
        chosen = self.active if slots is None else tuple(slots)
        if len(lengths) != batch or len(chosen) != batch:
            raise ValueError(f"{batch} rows were verified: got {len(lengths)} accept lengths and {len(chosen)} slots")
        self._rows(chosen)
        if any(not 0 <= length <= draft for length in lengths):
            raise ValueError(f"accept lengths must be in 0..{draft}, got {lengths}")
        moved = [row for row, length in enumerate(lengths) if length]
        self._carved = None
        if not moved:
            return
        device = next(iter(views.values())).device
        rows = torch.tensor(moved, device=device)
        last = torch.tensor([lengths[row] - 1 for row in moved], device=device)
        into = torch.tensor([chosen[row] for row in moved], device=device)
        for name, view in views.items():
            self._states[name].index_copy_(1, into, view[:, rows, last])

    def _unpack(self, blob: bytes) -> tuple[dict[str, Tensor], int]:
        return unpack(blob, {contents: self._specs(contents) for contents in _CONTENTS}, identity=self._identity)

    def _capture(self, slot: int, contents: str) -> bytes:
        tokens = self.position(slot)
        tensors = {part.name: self._states[part.name][:, slot] for part, _ in self._kinds(contents)}
        return pack(tensors, contents=contents, identity=self._identity, tokens=tokens)

    def _specs(self, contents: str) -> dict[str, Spec]:
        return {part.name: Spec((len(layers), *part.shape), part.dtype) for part, layers in self._kinds(contents)}

    def _kinds(self, contents: str) -> tuple[tuple[StatePart, tuple[int, ...]], ...]:
        kinds = self.layout.kinds
        return kinds if contents == ALL else tuple(k for k in kinds if (k[0].name == CONV) == (contents == CONV))

    def _zero(self, slot: int) -> None:
        for tensor in self._states.values():
            tensor[:, slot].zero_()

    def _rows(self, slots: Sequence[int]) -> Tensor:
        """(B,) the slots as an index. Raises ValueError unless all are allocated and different."""
        if self.num_layers:
            for slot in slots:
                self._check_active(slot)
            if len(set(slots)) != len(slots):
                raise ValueError(f"a slot occurs twice: {list(slots)}")
        return torch.tensor(list(slots), dtype=torch.int64)

    def _check_active(self, slot: int) -> None:
        if slot not in self._position:
            raise ValueError(f"slot {slot} is not allocated (allocated: {list(self.active)})")

    def _check_layer(self, layer: int) -> None:
        known = sorted({*self.layout.layers, *self.layout.conv_layers})
        if layer not in known:
            raise ValueError(f"block {layer} has no recurrent state (blocks that have one: {known})")


def _whole_numbers(values: Sequence[int] | Tensor) -> list[int]:
    """Python integers of a 1-D integer tensor or a sequence of integers. Raises ValueError for anything else."""
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.dtype is torch.bool:
            raise ValueError(f"accept lengths must be a 1-D integer tensor, got {values.dtype} {tuple(values.shape)}")
        return [int(value) for value in values.tolist()]
    if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
        raise ValueError(f"accept lengths must be whole numbers, got {list(values)}")
    return list(values)
