"""Runs the model over lanes: prefill of one request piece by piece, and decode of many as rows of fixed tiles.

Why a request's numbers do not depend on what else runs: a piece of prefill is one request's alone, and its shape
follows from the request (`pieces`); in decode every product over weights and every step of the scan works on exactly
`tile` rows, whose independence is probed (`row_tile`), and attention reads one request's keys at a time.
Not for deciding what runs when (`engine`), nor for sampling.
"""
# R rows (one token of one request each)  S tokens  T cached tokens  D hidden  V vocabulary
# H query heads  G kv heads  K head width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from libs.kernels.mimo import MimoState
from libs.model.attention import Attention
from libs.model.block import ResidualBlock
from libs.model.config import ModelConfig
from libs.model.hybrid import HybridLM
from libs.model.inference.lanes import Lane
from libs.model.inference.rollback import Rolled
from libs.model.inference.state_slots import StateSlots
from libs.model.layers import ForwardContext, rope_tables
from libs.model.mixer import MambaMixer, ScanOperands

# Smallest piece of prefill, before rounding up to whole chunks of the scan.
GRID_TOKENS = 64


def grid_tokens(config: ModelConfig) -> int:
    """The prefill grid: the fewest whole chunks of the scan that are at least GRID_TOKENS."""
    chunk = 1 if config.mixer is None else config.mixer.chunk_size
    return -(-GRID_TOKENS // chunk) * chunk


def pieces(start: int, end: int, grid: int) -> Iterator[tuple[int, int]]:
    """[start, end) cut at the multiples of the grid, which count from token 0 of a request."""
    while start < end:
        stop = min((start // grid + 1) * grid, end)
        yield start, stop
        start = stop


class Step(NamedTuple):
    """One request's part of a decode pass: its last output and drafts after it, from position `start` on."""

    lane: Lane
    tokens: tuple[int, ...]
    start: int


class Decoded(NamedTuple):
    """logits (R, V) and hidden (R, D, before the final norm), rows in order of steps and tokens. States are moved by
    `pending.commit` only."""

    logits: Tensor
    hidden: Tensor
    pending: Rolled


class Runner:
    """Stateless but for the model: all memory is the lanes'."""

    def __init__(self, model: HybridLM, tile: int, snapshots: StateSlots | None = None) -> None:
        """tile: rows of a decode product. snapshots: see `rollback.Rolled`."""
        self.model, self.tile, self._snapshots = model, tile, snapshots
        self._dtype = torch.float64 if model.final_norm.weight.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        return self.model.head_weight.device

    @torch.no_grad()
    def prefill(self, lane: Lane, tokens: Sequence[int], start: int) -> Tensor:
        """(S, D) before the final norm, of one piece of one request; moves the lane's states and keys behind it."""
        tokens_1S = torch.tensor([list(tokens)], device=self.device)
        context = self.model.pass_context(tokens_1S, None, offset=start)
        x_1SD = self.model.embed(tokens_1S)
        for index, block in enumerate(self.model.trunk):
            u_1SD, layer = block.norm(x_1SD), block.layer
            if isinstance(layer, MambaMixer):
                y_1SD, state = layer.prefill(u_1SD, context, lane.state(index))
                lane.put_state(index, state)
            elif isinstance(layer, Attention):
                q, k, v = layer.project(u_1SD, context)
                keys, values = lane.extend(index, start, k[0], v[0])
                y_1SD = layer.output(layer.attend(q, keys[None], values[None], context))
            else:
                y_1SD = layer(u_1SD, context)
            x_1SD = x_1SD + y_1SD
        return x_1SD[0]

    @torch.no_grad()
    def logits(self, hidden_SD: Tensor) -> Tensor:
        """(S, V) of hidden states before the final norm; all rows in one product."""
        return F.linear(self.model.final_norm(hidden_SD), self.model.head_weight)

    @torch.no_grad()
    def decode(self, steps: Sequence[Step]) -> Decoded:
        """Advance several requests by a token, or verify drafts after it, in one pass over the weights."""
        tokens = [token for step in steps for token in step.tokens]
        positions = [step.start + i for step in steps for i in range(len(step.tokens))]
        context, ropes = self._context(positions)
        x_RD = self.model.embed(torch.tensor([tokens], device=self.device))[0]
        pending = Rolled([step.lane for step in steps], [len(step.tokens) for step in steps], self._snapshots)
        for index, block in enumerate(self.model.trunk):
            layer = block.layer
            if isinstance(layer, MambaMixer):
                y_RD = self._scan(index, block, layer, x_RD, steps, pending)
            elif isinstance(layer, Attention):
                y_RD = self._attend(index, block, layer, x_RD, steps, context, ropes)
            else:
                (y_RD,) = self._tiled(lambda u, block=block: (block.layer(block.norm(u), context),), x_RD)
            x_RD = x_RD + y_RD
        (logits_RV,) = self._tiled(lambda u: (self.logits(u),), x_RD)
        return Decoded(logits_RV, x_RD, pending)

    def _context(self, positions: Sequence[int]) -> tuple[ForwardContext, tuple[Tensor, ...]]:
        """Shared by all rows; and cos and sin (R, E), each row by itself: the vectorised functions take another path
        when any of the lanes of one vector is large, so a neighbour's position could change a row's bits."""
        context = self.model.pass_context(torch.zeros(1, 1, dtype=torch.int64, device=self.device), None)
        attention = self.model.config.attention
        if context.rope is None or attention is None:
            return context, ()
        rows = [
            rope_tables(
                torch.tensor([position], device=self.device), attention.head_dim, attention.rope_theta, self._dtype
            )
            for position in positions
        ]
        cos, sin = (torch.cat(table) for table in zip(*rows, strict=True))
        return context, (cos, sin)

    def _tiled(self, run: Callable[..., tuple[Tensor, ...]], *rows: Tensor) -> tuple[Tensor, ...]:
        """`run` on exactly `tile` rows at a time, zeros where there are fewer; each (R, ...) in and out."""
        total = len(rows[0])
        outputs = []
        for first in range(0, total, self.tile):
            n = min(self.tile, total - first)
            padded = []
            for whole in rows:
                # Always a copy: a row's alignment must not depend on how many rows there are.
                part = whole.new_zeros(self.tile, *whole.shape[1:])
                part[:n] = whole[first : first + n]
                padded.append(part)
            outputs.append(tuple(out[:n] for out in run(*padded)))
        if len(outputs) == 1:
            return outputs[0]
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

    def _scan(
        self, index: int, block: ResidualBlock, layer: MambaMixer, x_RD: Tensor, steps: Sequence[Step], pending: Rolled
    ) -> Tensor:
        """Projections of all rows at once; the recurrence token after token, all requests that have one together."""

        def operands(u_RD: Tensor) -> tuple[Tensor, ...]:
            return tuple(part.squeeze(1) for part in layer.operands(block.norm(u_RD)[:, None]))

        def advance(*parts: Tensor) -> tuple[Tensor, ...]:
            width = len(ScanOperands._fields)
            y_RHP, state = layer.advance(ScanOperands(*parts[:width]), MimoState(*parts[width:]))
            return y_RHP, *state

        rows = self._tiled(operands, x_RD)
        first = list(accumulate((len(step.tokens) for step in steps[:-1]), initial=0))
        states = [step.lane.state(index) for step in steps]
        pending.begin(index, ScanOperands(*rows), first, states, lambda *parts: self._tiled(advance, *parts))
        y_RHP = rows[ScanOperands._fields.index("v_BSHP")].new_zeros(len(x_RD), *_head_shape(layer))
        for j in range(max(len(step.tokens) for step in steps)):
            active = [i for i, step in enumerate(steps) if len(step.tokens) > j]
            at = torch.tensor([first[i] + j for i in active], device=x_RD.device)
            before = (torch.cat([states[i][part] for i in active]) for part in range(len(MimoState._fields)))
            y_rows, *after = self._tiled(advance, *(part[at] for part in rows), *before)
            y_RHP[at] = y_rows.to(y_RHP.dtype)
            for row, i in enumerate(active):
                states[i] = MimoState(*(part[row : row + 1] for part in after))
                pending.after(index, i, j, states[i])
        (y_RD,) = self._tiled(lambda y: (layer.out_proj(y.flatten(1)),), y_RHP)
        return y_RD

    def _attend(
        self, index: int, block: ResidualBlock, layer: Attention, x_RD: Tensor, steps: Sequence[Step],
        context: ForwardContext, ropes: tuple[Tensor, ...],
    ) -> Tensor:  # fmt: skip
        def project(u_RD: Tensor, cos_RE: Tensor, sin_RE: Tensor) -> tuple[Tensor, ...]:
            # Rows as the tokens of one sequence: each has a position of its own.
            qkv = layer.project(block.norm(u_RD)[None], context._replace(rope=(cos_RE, sin_RE)))
            return tuple(part[0] for part in qkv)

        q_RHK, k_RGK, v_RGK = self._tiled(project, x_RD, *ropes)
        y_RHK, row = torch.empty_like(q_RHK), 0
        for lane, tokens, start in steps:
            n = len(tokens)
            keys, values = lane.extend(index, start, k_RGK[row : row + n], v_RGK[row : row + n])
            for j in range(n):
                y_RHK[row + j] = _one_query(layer, q_RHK[row + j], keys, values, start + j + 1, context)
            row += n
        (y_RD,) = self._tiled(lambda y: (layer.out(y.flatten(1)),), y_RHK)
        return y_RD


def _head_shape(layer: MambaMixer) -> tuple[int, int]:
    return layer.config.nheads, layer.config.headdim


def _one_query(
    layer: Attention, q_HK: Tensor, keys_TGK: Tensor, values_TGK: Tensor, visible: int, context: ForwardContext
) -> Tensor:
    """(H, K): the heads that share keys become the queries of one call, so that keys are read once."""
    groups = keys_TGK.shape[1]
    q_1MGK = q_HK.view(groups, -1, q_HK.shape[-1]).transpose(0, 1)[None].contiguous()
    y_1MGK = layer.attend(q_1MGK, keys_TGK[None, :visible], values_TGK[None, :visible], context, causal=False)
    return y_1MGK[0].transpose(0, 1).reshape(q_HK.shape)
