"""Pieces of parameters against whole tensors, without Megatron: what a rank takes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from libs.flags.errors import UserError
from libs.parallel.megatron_state import Piece, collect, restore
from libs.parallel.mesh import Group

PARAMETERS = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


def whole(**changes: Tensor) -> dict[str, Tensor]:
    found = {f"step/{name}": torch.tensor(5.0) for name in PARAMETERS}
    for number, part in enumerate(("exp_avg", "exp_avg_sq")):
        for name, parameter in PARAMETERS.items():
            found[f"{part}/{name}"] = torch.arange(parameter.numel()).float().view(parameter.shape) + 10 * number
    return found | changes


def held() -> dict[str, Piece]:
    """The end of one parameter; the other is another rank's."""
    return {"a": Piece(PARAMETERS["a"].view(-1)[2:5], 2, 5)}


def inner(pieces: dict[str, Piece], kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = kind([{"params": [piece.shard for piece in pieces.values()]}], lr=0.1)  # type: ignore[call-arg]
    made.param_groups.append({**made.param_groups[0], "params": []})
    return made


def test_torchs_adam_gets_its_entries_and_a_step_of_each() -> None:
    pieces = held()
    optimizer = inner(pieces, torch.optim.AdamW)
    assert restore(PARAMETERS, pieces, optimizer, whole()) == 5
    state = optimizer.state[pieces["a"].shard]
    assert state["exp_avg"].tolist() == [2, 3, 4]
    assert state["exp_avg_sq"].tolist() == [12, 13, 14]
    assert state["step"].item() == 5
    assert "step" not in optimizer.param_groups[0]


def test_another_adam_gets_a_step_of_each_group_that_is_not_empty() -> None:
    """transformer-engine's FusedAdam counts there, and not at all for an empty group."""
    pieces = held()
    optimizer = inner(pieces, torch.optim.SGD)
    restore(PARAMETERS, pieces, optimizer, whole())
    assert [group.get("step") for group in optimizer.param_groups] == [5, None]
    assert set(optimizer.state[pieces["a"].shard]) == {"exp_avg", "exp_avg_sq"}


def test_what_does_not_fit_is_refused() -> None:
    pieces = held()
    optimizer = inner(pieces, torch.optim.AdamW)
    with pytest.raises(UserError, match=r"'exp_avg/a' is \(3, 2\), the parameter \(2, 3\)"):
        restore(PARAMETERS, pieces, optimizer, whole(**{"exp_avg/a": torch.zeros(3, 2)}))
    with pytest.raises(UserError, match=r"'b' was updated 4 times, others 5 times.*engine = torch"):
        restore(PARAMETERS, pieces, optimizer, whole(**{"step/b": torch.tensor(4.0)}))


def test_a_group_of_one_collects_what_it_was_given() -> None:
    pieces = {name: Piece(p.view(-1), 0, p.numel()) for name, p in PARAMETERS.items()}
    optimizer = inner(pieces, torch.optim.AdamW)
    step = restore(PARAMETERS, pieces, optimizer, whole())
    found = collect(PARAMETERS, pieces, optimizer, step, Group())
    assert found.keys() == whole().keys()
    assert all(torch.equal(tensor, whole()[key]) for key, tensor in found.items())
