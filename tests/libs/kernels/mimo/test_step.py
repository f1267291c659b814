"""Decode against prefill and the oracle: the state moves one token at a time, exactly."""

from __future__ import annotations

import pytest
import torch

from libs.kernels.mimo import MimoState, mamba3_mimo, mamba3_mimo_step
from tests.support.mimo import Shape, operands, random_state, relative_error, slice_tokens

SHAPES = [
    Shape(B=2, S=24, norm=True),
    Shape(B=2, S=24, G=2, R=2, divisor=2, z=False),
    Shape(B=1, S=24, G=4, R=8, out=False, d=False),
]


def decode(tensors, shape: Shape, state: MimoState, first: int, last: int):
    outputs = []
    for t in range(first, last):
        one = slice_tokens(tensors, t, t + 1)
        out, state = mamba3_mimo_step(
            state, one["Q"][:, 0], one["K"][:, 0], one["V"][:, 0], one["ADT"][..., 0], one["DT"][..., 0],
            one["Trap"][..., 0], one["Q_bias"], one["K_bias"], one["MIMO_V"], one["MIMO_Z"], one["MIMO_Out"],
            one["Angles"][:, 0], one["D"], None if one["Z"] is None else one["Z"][:, 0],
            rotary_dim_divisor=shape.divisor, norm_weight=one["norm_weight"],
        )  # fmt: skip
        outputs.append(out)
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_steps_equal_the_oracle(shape: Shape, dtype: torch.dtype, tolerance: float) -> None:
    state = random_state(shape, shape.B, dtype)
    want, want_state = mamba3_mimo(
        **operands(shape), chunk_size=8, rotary_dim_divisor=shape.divisor, dtype=None, return_state=True,
        initial_state=random_state(shape, shape.B), backend="reference",
    )  # fmt: skip
    before = [part.clone() for part in state]
    got, got_state = decode(operands(shape, dtype), shape, state, 0, shape.S)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True)), "step wrote into its input state"
    assert relative_error(got, want) <= tolerance
    for part, wanted in zip(got_state, want_state, strict=True):
        assert relative_error(part, wanted) <= tolerance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_then_steps_equal_one_prefill(shape: Shape) -> None:
    tensors = operands(shape, torch.float32)

    def prefill(part, length):
        return mamba3_mimo(
            **part, chunk_size=8, rotary_dim_divisor=shape.divisor, dtype=None, return_state=True, backend="chunked"
        )

    whole, whole_state = prefill(tensors, shape.S)
    for cut in (1, 7, 8, 9, 23):
        first, state = prefill(slice_tokens(tensors, 0, cut), cut)
        rest, state = decode(tensors, shape, state, cut, shape.S)
        assert relative_error(torch.cat([first, rest], dim=1), whole) <= 1e-5
        for part, wanted in zip(state, whole_state, strict=True):
            assert relative_error(part, wanted) <= 1e-5


@pytest.mark.slow
def test_angle_after_64k_steps_stays_on_the_circle() -> None:
    """The figure: within 1e-3 rad on the circle of fp64 after 65,536 tokens, for prefill and for decode."""
    shape = Shape(S=65536, H=1, R=1, N=4, P=1, z=False, out=False, d=False)
    exact = operands(shape)
    turns = torch.tanh(exact["Angles"])[0, :, 0] * torch.pi * exact["DT"][0, 0][:, None]
    want = torch.remainder(turns.sum(dim=0), 2 * torch.pi)
    tensors = operands(shape, torch.float32)
    _, state = mamba3_mimo(**tensors, chunk_size=16, rotary_dim_divisor=4, dtype=None, return_state=True)
    stepped = torch.zeros(want.shape)
    for turn in turns.float():
        stepped = torch.remainder(stepped + turn, 2 * torch.pi)
    for got in (state.angle[0, 0], stepped):
        gap = (got.double() - want).abs()
        assert torch.minimum(gap, 2 * torch.pi - gap).max() <= 1e-3
        assert got.min() >= 0
        assert got.max() <= 2 * torch.pi
