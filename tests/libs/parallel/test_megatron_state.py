"""Pieces of parameters against whole tensors, without Megatron: what a rank takes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from libs.flags.errors import UserError
from libs.parallel.megatron_state import Piece, Whole, collect, collect_weights, restore, restore_weights
from libs.parallel.mesh import Group

PARAMETERS = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
WHOLES = {name: Whole([parameter]) for name, parameter in PARAMETERS.items()}


def whole(**changes: Tensor) -> dict[str, Tensor]:
    found = {f"step/{name}": torch.tensor(5.0) for name in PARAMETERS}
    for number, part in enumerate(("exp_avg", "exp_avg_sq")):
        for name, parameter in PARAMETERS.items():
            found[f"{part}/{name}"] = torch.arange(parameter.numel()).float().view(parameter.shape) + 10 * number
    return found | changes


def held() -> dict[str, list[Piece]]:
    """The end of one parameter; the other is another rank's."""
    return {"a": [Piece(PARAMETERS["a"].view(-1)[2:5], 2, 5)], "b": []}


def inner(pieces: dict[str, list[Piece]], kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    shards = [piece.shard for of_whole in pieces.values() for piece in of_whole]
    made: torch.optim.Optimizer = kind([{"params": shards}], lr=0.1)  # type: ignore[call-arg]
    made.param_groups.append({**made.param_groups[0], "params": []})
    return made


def test_torchs_adam_gets_its_entries_and_a_step_of_each() -> None:
    pieces = held()
    optimizer = inner(pieces, torch.optim.AdamW)
    assert restore(WHOLES, pieces, optimizer, whole()) == 5
    state = optimizer.state[pieces["a"][0].shard]
    assert state["exp_avg"].tolist() == [2, 3, 4]
    assert state["exp_avg_sq"].tolist() == [12, 13, 14]
    assert state["step"].item() == 5
    assert "step" not in optimizer.param_groups[0]


def test_another_adam_gets_a_step_of_each_group_that_is_not_empty() -> None:
    """transformer-engine's FusedAdam counts there, and not at all for an empty group."""
    pieces = held()
    optimizer = inner(pieces, torch.optim.SGD)
    restore(WHOLES, pieces, optimizer, whole())
    assert [group.get("step") for group in optimizer.param_groups] == [5, None]
    assert set(optimizer.state[pieces["a"][0].shard]) == {"exp_avg", "exp_avg_sq"}


def test_what_does_not_fit_is_refused() -> None:
    pieces = held()
    optimizer = inner(pieces, torch.optim.AdamW)
    with pytest.raises(UserError, match=r"'exp_avg/a' is \(3, 2\), the parameter \(2, 3\)"):
        restore(WHOLES, pieces, optimizer, whole(**{"exp_avg/a": torch.zeros(3, 2)}))
    with pytest.raises(UserError, match=r"'b' was updated 4 times, others 5 times.*engine = torch"):
        restore(WHOLES, pieces, optimizer, whole(**{"step/b": torch.tensor(4.0)}))


def test_a_group_of_one_collects_what_it_was_given() -> None:
    pieces = {name: [Piece(p.view(-1), 0, p.numel())] for name, p in PARAMETERS.items()}
    optimizer = inner(pieces, torch.optim.AdamW)
    step = restore(WHOLES, pieces, optimizer, whole())
    found = collect(WHOLES, pieces, optimizer, step, Group())
    assert found.keys() == whole().keys()
    assert all(torch.equal(tensor, whole()[key]) for key, tensor in found.items())


def test_a_whole_of_several_parameters_is_their_rows() -> None:
    """As a packed projection's, taken apart: state and values of each part lie where its rows do."""
    first, second = torch.arange(6.0).view(2, 3), 10 + torch.arange(3.0).view(1, 3)
    wholes = {"packed": Whole([first, second])}
    pieces = {"packed": [Piece(first.view(-1), 0, 6), Piece(second.view(-1)[1:], 7, 9)]}
    assert wholes["packed"].shape == (3, 3)
    (found,) = collect_weights(wholes, pieces, Group(), keep=True).values()
    assert found.tolist() == [[0, 1, 2], [3, 4, 5], [0, 11, 12]]
    assert collect_weights(wholes, pieces, Group(), keep=False) == {}
    restore_weights(wholes, pieces, {"packed": -torch.arange(9.0).view(3, 3)})
    assert first.tolist() == [[0, -1, -2], [-3, -4, -5]]
    assert second.tolist() == [[10, -7, -8]]
    optimizer = inner(pieces, torch.optim.AdamW)
    state = {f"{part}/packed": torch.arange(9.0).view(3, 3) for part in ("exp_avg", "exp_avg_sq")}
    restore(wholes, pieces, optimizer, {"step/packed": torch.tensor(2.0), **state})
    assert optimizer.state[pieces["packed"][1].shard]["exp_avg"].tolist() == [7, 8]
    with pytest.raises(UserError, match=r"tensor 'packed' is \(9,\), the parameter \(3, 3\)"):
        restore_weights(wholes, pieces, {"packed": torch.zeros(9)})
