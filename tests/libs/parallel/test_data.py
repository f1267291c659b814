"""How gradients are packed for the reduction; sums over real ranks are in tests/integration/test_layouts.py."""

from __future__ import annotations

import torch

from libs.parallel.data import TorchEngine, buckets
from libs.parallel.mesh import single


def test_buckets_keep_order_limit_and_dtype() -> None:
    tensors = [torch.zeros(n) for n in (3, 3, 5, 1)] + [torch.zeros(1, dtype=torch.float64), torch.zeros(1)]
    packed = list(buckets(tensors, limit=24))
    assert [[t.numel() for t in bucket] for bucket in packed] == [[3, 3], [5, 1], [1], [1]]
    assert all(a is b for a, b in zip([t for bucket in packed for t in bucket], tensors, strict=True))
    assert list(buckets([])) == []


def test_local_norm_sees_what_is_not_finite() -> None:
    model = torch.nn.Linear(2, 2)
    engine = TorchEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), single())
    model(torch.ones(1, 2)).sum().backward()
    assert engine.local_norm() == float(engine.reduce())
    assert model.weight.grad is not None
    model.weight.grad[0, 0] = float("inf")
    assert engine.local_norm() == float("inf")
    engine.zero_grad()
    assert model.weight.grad is None
