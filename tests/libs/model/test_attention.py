"""The attention layer: rotary positions are rotations, relative, and restart at documents."""

from __future__ import annotations

import torch

from libs.model.attention import rotate
from libs.model.layers import document_positions, rope_tables


def test_rotation_is_multiplication_by_a_unit_complex_number() -> None:
    x = torch.randn(2, 7, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 30, 4, 5, 1000])
    got = rotate(x, rope_tables(positions, 10, 50.0, torch.float64))
    turned = torch.complex(x[..., :5], x[..., 5:])
    for pair in range(5):
        angle = positions.double() * 50.0 ** (-2 * pair / 10)
        turned[..., pair] *= torch.polar(torch.ones_like(angle), angle)[:, None]
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1))


def test_scores_depend_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 1, 1, 8, dtype=torch.float64, generator=generator) for _ in range(2))

    def score(query_at: int, key_at: int) -> torch.Tensor:
        tables = [rope_tables(torch.tensor([at]), 8, 100.0, torch.float64) for at in (query_at, key_at)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    torch.testing.assert_close(score(5, 2), score(905, 902))
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3


def test_positions_restart_at_documents() -> None:
    cpu = torch.device("cpu")
    assert document_positions(7, [0, 3, 4, 7], cpu).tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert document_positions(4, None, cpu).tolist() == [0, 1, 2, 3]
