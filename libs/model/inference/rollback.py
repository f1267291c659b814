"""The states behind a decode pass: which of its tokens they include is decided after the outputs are known.

Two ways to have the state after j of the tokens, equal by bits: replay the logged operands of the recurrence from the
state before the pass (a few KB per token and layer), or keep the state after every token in the slots' intermediate
states (a MiB per token and layer at hidden 1024).
Not for keys and values: those of rejected tokens are overwritten.
"""
# R rows  H heads  P head width

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

import torch
from torch import Tensor

from libs.kernels.mimo import MimoState
from libs.model.inference.lanes import Lane, PagedLane
from libs.model.inference.state_slots import StateSlots
from libs.model.mixer import ScanOperands

Advance = Callable[..., tuple[Tensor, ...]]
# Operands that move a state; queries and gates do not.
LOGGED = ("k_BSRGN", "v_BSHP", "adt_BSH", "dt_BSH", "trap_BSH", "angles_BSHA")


class Rollback(StrEnum):
    """How the state before rejected drafts is made."""

    REPLAY = "replay"
    SNAPSHOT = "snapshot"


class _Layer:
    """One layer's part of a pass: rows of operands, and by request the states before it and after its last token."""

    def __init__(self, operands: ScanOperands, first: Sequence[int], states: Sequence[MimoState], run: Advance) -> None:
        self.operands, self.first, self.run = operands, first, run
        # Nothing is copied: the slots are written by `commit` only, after this was read.
        self.before, self.last = list(states), list(states)


class Rolled:
    """Collects a pass; `commit` then moves the states of every lane."""

    def __init__(self, lanes: Sequence[Lane], lengths: Sequence[int], snapshots: StateSlots | None) -> None:
        """lengths: tokens of each request. snapshots: keep the state after every token there; None: log and replay."""
        self._lanes, self._lengths = lanes, lengths
        self._slots = snapshots if max(lengths) > 1 else None
        self._kept = {} if self._slots is None else self._slots.reshape_intermediate_states(len(lanes), max(lengths))
        self._layers: dict[int, _Layer] = {}

    def begin(
        self, layer: int, operands: ScanOperands, first: Sequence[int], states: Sequence[MimoState], run: Advance
    ) -> None:
        """operands: (R, ...) of all rows; first: each request's first row; run: one step, of operands and states."""
        self._layers[layer] = _Layer(operands, first, states, run)

    def after(self, layer: int, request: int, token: int, state: MimoState) -> None:
        """The state of a request (its place in the pass) after its token number `token`."""
        self._layers[layer].last[request] = state
        if self._slots is not None:
            index = self._slots.layout.layers.index(layer)
            for part, value in zip(self._slots.layout.recurrent, state, strict=True):
                self._kept[part.name][index, request, token] = value[0]

    @property
    def nbytes(self) -> int:
        """What it takes to go back: of the states kept, or of the logged operands."""
        if self._slots is not None:
            return sum(view.numel() * view.element_size() for view in self._kept.values())
        logs = [getattr(layer.operands, name) for layer in self._layers.values() for name in LOGGED]
        return sum(part.numel() * part.element_size() for part in logs)

    @torch.no_grad()
    def commit(self, accepted: Sequence[int]) -> None:
        """Make the state after the first `accepted` tokens of each request its lane's state; 0 leaves it."""
        for count, length in zip(accepted, self._lengths, strict=True):
            assert 0 <= count <= length, "more tokens than were run"
        if self._slots is not None:
            self._slots.scatter_mtp_states(accepted, [lane.slot for lane in self._lanes if isinstance(lane, PagedLane)])
        else:
            for request, count in enumerate(accepted):
                for index, layer in self._layers.items():
                    if count:
                        self._lanes[request].put_state(index, self._state(layer, request, count))
        self._layers.clear()

    def _state(self, layer: _Layer, request: int, count: int) -> MimoState:
        if count == self._lengths[request]:
            return layer.last[request]
        state, first = layer.before[request], layer.first[request]
        for row in range(first, first + count):
            _, *parts = layer.run(*(operand[row : row + 1] for operand in layer.operands), *state)
            state = MimoState(*parts)
        return state
