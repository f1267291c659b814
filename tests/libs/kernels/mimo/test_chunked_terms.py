"""Angles of the chunked scan without a loop over chunks, against the obvious loop over tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from libs.kernels.mimo.chunked_terms import _STEPS_PER_TURN, _steps, document_masks, wrapped_angles
from libs.kernels.mimo.shapes import TWO_PI

B, H, A, C = 2, 3, 4, 4


def by_token(angles_BSHA: Tensor, dt_BHS: Tensor, start_BHA: Tensor, starts: set[int]) -> Tensor:
    """(B,S,H,A) in fp64, not wrapped: differentiable by autograd."""
    theta, found = start_BHA, []
    for t in range(angles_BSHA.shape[1]):
        theta = torch.zeros_like(theta) if t in starts else theta
        theta = theta + torch.tanh(angles_BSHA[:, t]) * torch.pi * dt_BHS[:, :, t, None]
        found.append(theta)
    return torch.stack(found, dim=1)


def circle(a: Tensor, b: Tensor) -> float:
    """Largest distance of two angles."""
    return float((torch.remainder(a.detach().double() - b.detach().double() + torch.pi, TWO_PI) - torch.pi).abs().max())


@pytest.mark.parametrize("bounds", [None, [0, 1, 3, 9, 16, 17, 29], [0, 29], [0, 8, 16, 29]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_loop(bounds: list[int] | None, dtype: torch.dtype) -> None:
    S, chunks = 29, 8
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, S, H, A), (B, H, S), (B, H, A))
    leaves = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]
    leaves[1] = leaves[1].abs()
    leaves[2] = leaves[2].remainder(TWO_PI)
    weights = (
        torch.randn(B, S, H, A, generator=generator, dtype=torch.float64),
        torch.randn(B, H, A, generator=generator),
    )
    grads = []
    exact = [u.clone().requires_grad_() for u in leaves]
    want = by_token(*exact, set() if bounds is None else set(bounds[1:-1]))
    ((want * weights[0]).sum() + (want[:, -1] * weights[1]).sum()).backward()
    grads.append([u.grad for u in exact])
    ours = [u.to(dtype).requires_grad_() for u in leaves]
    masks = None if bounds is None else document_masks(bounds, chunks, C, torch.device("cpu"))
    theta, end = wrapped_angles(*ours, chunks, C, masks)
    got = theta.permute(0, 1, 4, 2, 3).flatten(1, 2)[:, :S]
    ((got * weights[0]).sum() + (end * weights[1]).sum()).backward()
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    assert circle(got, want) <= tolerance
    assert circle(end, want[:, -1]) <= tolerance
    for mine, u in zip(ours, grads[0], strict=True):
        assert (mine.grad - u).abs().max() <= tolerance * (1 + u.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_state_keeps_the_step_it_was_given(dtype: torch.dtype) -> None:
    """The decode state's dtype tells every step of a turn from the next."""
    per_turn = _STEPS_PER_TURN[dtype]
    edge = torch.arange(4096)
    count = torch.cat([edge, per_turn - 1 - edge, torch.randint(per_turn, (1 << 16,))])
    assert torch.equal(_steps((count.double() * (TWO_PI / per_turn)).to(dtype), per_turn), count)


def test_what_comes_before_a_document_leaves_every_bit() -> None:
    """Also of the gradients, whose sums run the other way."""
    bounds, S, chunks = [0, 6, 13, 29], 29, 8
    masks = document_masks(bounds, chunks, C, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    angles = torch.randn(1, S, H, A, generator=generator)
    runs = []
    for factor in (1.0, 3.0):
        leaf = angles.clone()
        leaf[:, 6:13] *= factor
        leaf.requires_grad_()
        theta, _ = wrapped_angles(leaf, torch.ones(1, H, S), torch.zeros(1, H, A), chunks, C, masks)
        theta = theta.permute(0, 1, 4, 2, 3).flatten(1, 2)[:, :S]
        theta.square().sum().backward()
        runs.append((theta.detach(), leaf.grad))
    for start, end in itertools.pairwise(bounds):
        same = all(torch.equal(a[:, start:end], b[:, start:end]) for a, b in zip(*runs, strict=True))
        assert same == (start != 6)


def test_sixty_four_thousand_tokens_stay_within_a_thousandth() -> None:
    """fp32, in chunks of 16."""
    S = 65_536
    generator = torch.Generator().manual_seed(2)
    angles, dt = torch.randn(1, S, 1, 2, generator=generator), 0.1 * torch.rand(1, 1, S, generator=generator)
    _, end = wrapped_angles(angles, dt, torch.zeros(1, 1, 2), S // 16, 16, None)
    turn = torch.tanh(angles.double()[:, :, 0]) * torch.pi * dt.double()[:, 0, :, None]
    assert circle(end[:, 0], turn.sum(dim=1)) <= 1e-3
