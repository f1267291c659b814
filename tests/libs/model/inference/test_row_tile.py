"""The probe of row independence: it takes the largest tile that holds, and sees rows that are not independent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from libs.model import HybridLM
from libs.model.inference.row_tile import choose_row_tile, rows_are_independent
from libs.model.mlp import GatedMlp


def test_the_largest_tile_that_holds(build: Callable[..., HybridLM]) -> None:
    model = build("M-*-")
    choice = choose_row_tile(model)
    assert rows_are_independent(model, int(choice.value))
    assert "independent" in choice.reason or choice.value == "1"


def by_place(out: Tensor) -> Tensor:
    """A product whose last row is rounded differently."""
    out[-1] *= 1 + 2**-22
    return out


def by_neighbours(out: Tensor) -> Tensor:
    """A product in which the largest row shifts the others in their last bits."""
    return out * (1 + 2**-22 * float(out.abs().max() > out[0].abs().max()))


@pytest.mark.parametrize("breaks", [by_place, by_neighbours])
def test_dependent_rows_are_seen(
    build: Callable[..., HybridLM], monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Tensor], Tensor]
) -> None:
    model, whole = build("M-*-"), GatedMlp.forward

    def forward(self: GatedMlp, x: Tensor, context: object) -> Tensor:
        out = whole(self, x, context)  # type: ignore[arg-type]
        return breaks(out) if len(out) > 1 else out

    monkeypatch.setattr(GatedMlp, "forward", forward)
    with torch.no_grad():
        assert not rows_are_independent(model, 4)
        choice = choose_row_tile(model)
    assert choice.value == "1"
    assert "not 8" in choice.reason
