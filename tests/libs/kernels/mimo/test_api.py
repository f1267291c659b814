"""What the public operator refuses, and how it picks a backend."""

from __future__ import annotations

import re

import pytest
import torch

from libs.kernels.mimo import choose_backend, mamba3_mimo
from tests.support.mimo import Shape, operands, random_state

SHAPE = Shape(S=8)


def call(tensors=None, **changes):
    options = {"chunk_size": 4, "rotary_dim_divisor": 4, "dtype": None} | changes
    return mamba3_mimo(**(operands(SHAPE) if tensors is None else tensors), **options)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("K", (1, 8, 4, 1, 12), "K must be (B,S,R,G,N) = (1, 8, 4, 1, 16), got (1, 8, 4, 1, 12)"),
        ("ADT", (1, 8, 4), "ADT must be (B,H,S)"),
        ("Angles", (1, 8, 4, 8), "Angles must be (B,S,H,A) = (1, 8, 4, 4)"),
        ("MIMO_Z", (4, 2, 8), "MIMO_Z must be (H,R,P)"),
        ("norm_weight", (4, 16), "norm_weight must be (H,P)"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        call(operands(SHAPE) | {name: torch.zeros(shape, dtype=torch.float64)})


def test_other_refusals() -> None:
    tensors = operands(SHAPE)
    with pytest.raises(ValueError, match="Z and MIMO_Z go together"):
        call(tensors | {"Z": None})
    with pytest.raises(ValueError, match="MIMO rank R=3"):
        call(operands(SHAPE._replace(R=3)))
    with pytest.raises(ValueError, match="H % G must be 0"):
        call(operands(SHAPE) | {"Q": torch.zeros(1, 8, 4, 3, 16), "K": torch.zeros(1, 8, 4, 3, 16)})
    with pytest.raises(ValueError, match="rotary_dim_divisor=3"):
        call(rotary_dim_divisor=3)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        call(chunk_size=0)
    with pytest.raises(ValueError, match="S = 0"):
        call(operands(SHAPE._replace(S=0)))
    with pytest.raises(ValueError, match=r"initial_state.angle must be \(B,H,A\) = \(1, 4, 4\)"):
        call(initial_state=random_state(SHAPE, 2))


@pytest.mark.parametrize("bounds", [[0, 9], [1, 8], [0, 4, 4, 8], [0, 5, 3, 8], [0]])
def test_boundaries_must_rise_from_zero_to_the_end(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must rise strictly from 0 to S=8"):
        call(cu_seqlens=torch.tensor(bounds))


def test_packing_needs_one_row_and_integers() -> None:
    with pytest.raises(ValueError, match="B must be 1, got B=2"):
        call(operands(SHAPE._replace(B=2)), cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="1-D integer"):
        call(cu_seqlens=torch.tensor([0.0, 8.0]))


def test_backends_are_taken_or_refused_never_replaced() -> None:
    assert choose_backend("auto", "cpu").value == "chunked"
    assert "cpu" in choose_backend("auto", "cpu").reason
    assert choose_backend("reference", "cpu") == ("reference", "requested by name")
    known = "auto, chunked, reference, xla, xla_loop, tilelang"
    with pytest.raises(ValueError, match=f"unknown backend 'triton'; known: {known}"):
        choose_backend("triton", "cpu")
    with pytest.raises(ValueError, match="cannot run on device 'xla'"):
        choose_backend("chunked", "xla")
    assert choose_backend("auto", "xla").value == "xla"
    with pytest.raises(ValueError, match="no backend can run on device 'mps'"):
        choose_backend("auto", "mps")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        call(backend="fast")
