"""Documents as tensors of static shape say what boundaries say."""

from __future__ import annotations

import pytest
import torch

from libs.model.layers import document_positions
from libs.model.mtp import within_document
from libs.model.packing import packed_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("bounds", [[0, 12], [0, 1, 12], [0, 3, 4, 9, 12]])
@pytest.mark.parametrize("ahead", [1, 2, 5, 12, 20])
def test_one_row_equals_its_boundaries(bounds: list[int], ahead: int) -> None:
    packed = packed_rows(1, 12, torch.tensor(bounds))
    assert torch.equal(packed.positions[0].long(), document_positions(12, bounds, CPU))
    assert torch.equal(packed.within(ahead)[0], within_document(12, ahead, bounds, CPU))
    assert packed.ids_BS is not None
    assert (packed.ids_BS[0].diff() != 0).nonzero().flatten().add(1).tolist() == bounds[1:-1]


def test_rows_are_packed_end_to_end() -> None:
    packed = packed_rows(2, 6, torch.tensor([0, 2, 6, 12], dtype=torch.int32))
    assert packed.positions.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert packed.within(1).tolist() == [[True, False, True, True, True, False], [True] * 5 + [False]]


def test_rows_without_boundaries_are_documents() -> None:
    packed = packed_rows(3, 4, None)
    assert packed.ids_BS is None
    assert packed.within(1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("bounds", [[0, 5], [1, 12], [0, 4, 4, 12], [0], [0, 7, 12]])
def test_boundaries_that_do_not_fit_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        packed_rows(2, 6, torch.tensor(bounds))


def test_shapes_do_not_depend_on_the_number_of_documents() -> None:
    few, many = (packed_rows(1, 12, torch.tensor(bounds)) for bounds in ([0, 12], [0, 1, 2, 3, 12]))
    assert [u.shape for u in few if u is not None] == [u.shape for u in many if u is not None]
