"""One request's memory as the runner sees it: a recurrent state per Mamba layer, keys and values per attention layer.

`PagedLane` is a request in the engine's slots and blocks; `PlainLane` has tensors of its own, for the probe of row
independence, for audits and for tests. Not for what is shared or kept (`prefix`).
"""
# T tokens  G kv heads  K head width

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from libs.kernels.mimo import MimoState
from libs.kernels.mimo.shapes import accumulation_dtype
from libs.model.config import ModelConfig
from libs.model.inference.kv_blocks import PagedKV
from libs.model.inference.state_slots import StateSlots


class Lane(Protocol):
    """Layers are indices of blocks of the trunk. Nothing here says how many tokens are complete."""

    def state(self, layer: int) -> MimoState:
        """Of one row; not to be changed."""
        ...

    def put_state(self, layer: int, state: MimoState) -> None:
        """Replace it by another of one row."""
        ...

    def extend(self, layer: int, start: int, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of the tokens from `start` on; all there are up to their end, to be used at once."""
        ...


def zero_state(config: ModelConfig, dtype: torch.dtype, device: torch.device, rows: int = 1) -> MimoState:
    """The states of a Mamba layer before any token; all four parts in the scan's own dtype, as the slots keep them."""
    mixer = config.mixer
    assert mixer is not None, "a pattern with 'M' has a mixer"
    return MimoState.zeros(
        rows, mixer.nheads, mixer.headdim, mixer.d_state, mixer.mimo_rank, mixer.angles, device,
        accumulation_dtype(dtype),
    )  # fmt: skip


class PagedLane:
    """A request that holds a slot and blocks."""

    def __init__(self, kv: PagedKV, slots: StateSlots, request: int, slot: int) -> None:
        self._kv, self._slots, self.request, self.slot = kv, slots, request, slot

    def state(self, layer: int) -> MimoState:
        parts = self._slots.get_recurrent_state(layer)
        return MimoState(*(part[self.slot : self.slot + 1] for part in parts))

    def put_state(self, layer: int, state: MimoState) -> None:
        self._slots.write_rows(layer, [self.slot], state)

    def extend(self, layer: int, start: int, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        self._kv.write(layer, self.request, start, k_TGK, v_TGK)
        return self._kv.view(layer, self.request, start + len(k_TGK))


class PlainLane:
    """Tensors that grow by copying, outside every plan: for small or rare uses.

    Attributes:
        states, kv: what there is by layer.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self.states: dict[int, MimoState] = {}
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def state(self, layer: int) -> MimoState:
        if layer not in self.states:
            self.states[layer] = zero_state(self._config, self._dtype, self._device)
        return self.states[layer]

    def put_state(self, layer: int, state: MimoState) -> None:
        self.states[layer] = state

    def extend(self, layer: int, start: int, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        before = self.kv.get(layer)
        assert (0 if before is None else len(before[0])) >= start, "a gap before the new tokens"
        if before is not None:
            k_TGK, v_TGK = torch.cat([before[0][:start], k_TGK]), torch.cat([before[1][:start], v_TGK])
        self.kv[layer] = (k_TGK, v_TGK)
        return k_TGK, v_TGK
