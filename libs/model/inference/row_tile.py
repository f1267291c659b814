"""How many rows a decode product has: always the same number, and one for which rows are independent by bits.

A matrix product may round a row differently depending on where it stands among how many. The engine therefore pads
every decode product to one size, and checks here, on this device and with these weights, that then neither a row's
place nor its neighbours change a bit. One row has neither, so there always is an answer.
"""
# R rows  V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from libs.kernels.backend import Choice
from libs.kernels.mimo import MimoState
from libs.model.attention import Attention
from libs.model.hybrid import HybridLM
from libs.model.inference.lanes import PlainLane
from libs.model.inference.runner import Runner, Step
from libs.model.mixer import MambaMixer

TILES = (8, 4, 2, 1)


class _Row(NamedTuple):
    """What one row starts from: a token, and by layer a state or nothing."""

    token: int
    states: dict[int, MimoState]


def choose_row_tile(model: HybridLM, tiles: Sequence[int] = TILES) -> Choice:
    """The largest tile whose rows are independent, and why; the same for every engine over this model and device."""
    refused = list[str]()
    for tile in tiles:
        if tile == 1 or rows_are_independent(model, tile):
            why = f"rows of a decode product of {tile} are independent by bits here"
            return Choice(str(tile), "; ".join([*refused, why if tile > 1 else "one row has no neighbours"]))
        refused.append(f"not {tile}: a row's bits depend on its place or its neighbours")
    raise AssertionError("the last tile is 1")


def rows_are_independent(model: HybridLM, tile: int) -> bool:
    """Whether each of `tile` random rows gives the same logits and states at every place, beside itself or others."""
    runner, source = Runner(model, tile), torch.Generator().manual_seed(0)
    rows = [_random_row(model, source) for _ in range(tile)]
    others = [_random_row(model, source) for _ in range(tile)]
    wanted = _run(runner, rows)
    for shift in range(1, tile):
        # Every row at another place; every second one beside strangers.
        order = [(place + shift) % tile for place in range(tile)]
        mixed = [rows[row] if (row + shift) % 2 else others[row] for row in order]
        found = _run(runner, mixed)
        for place, row in enumerate(order):
            if (row + shift) % 2 and not _equal(found[place], wanted[row]):
                return False
    return True


def _random_row(model: HybridLM, source: torch.Generator) -> _Row:
    device, dtype = model.head_weight.device, model.head_weight.dtype
    states: dict[int, MimoState] = {}
    lane = PlainLane(model.config, dtype, device)
    for index, block in enumerate(model.trunk):
        if isinstance(block.layer, MambaMixer):
            parts = (torch.randn(part.shape, generator=source).to(part) for part in lane.state(index))
            states[index] = MimoState(*parts)
    return _Row(int(torch.randint(model.config.vocab_size, (), generator=source)), states)


def _run(runner: Runner, rows: Sequence[_Row]) -> list[list[Tensor]]:
    """Per row its logits, its new states, and its key and value."""
    model = runner.model
    lanes = []
    for row in rows:
        lane = PlainLane(model.config, model.head_weight.dtype, runner.device)
        lane.states.update(row.states)
        lanes.append(lane)
    decoded = runner.decode([Step(lane, (row.token,), 0) for lane, row in zip(lanes, rows, strict=True)])
    decoded.pending.commit([1] * len(rows))
    attention = [index for index, block in enumerate(model.trunk) if isinstance(block.layer, Attention)]
    found = []
    for lane, logits_V in zip(lanes, decoded.logits, strict=True):
        states = [part for state in lane.states.values() for part in state]
        found.append([logits_V, *states, *(part for index in attention for part in lane.kv[index])])
    return found


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
