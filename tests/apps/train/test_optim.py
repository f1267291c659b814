"""Decay groups, and optimizer state that survives a round trip bit for bit."""

from __future__ import annotations

import pytest
import torch

from apps.train.config import OptimSection
from apps.train.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from libs.flags.errors import UserError
from libs.model import HybridLM, preset


def step(model: HybridLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_only_matrices_decay() -> None:
    model = HybridLM(preset("cpu_tiny"))
    optimizer = build_optimizer(model, OptimSection(weight_decay=0.5, lr=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decays) == set(dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        vector = parameter.dim() < 2 or name.endswith(("bias", "norm"))
        assert decays[name] == (0.0 if vector else 0.5), name
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * decays[name])
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_adamw_is_the_formula() -> None:
    model = torch.nn.Linear(3, 2, bias=False).double()
    settings = OptimSection(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
    optimizer = build_optimizer(model, settings)
    weight, m, v = model.weight.detach().clone(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    for t in range(1, 5):
        grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(t)).double()
        rate = 0.1 / t
        model.weight.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate
        optimizer.step()
        m, v = 0.8 * m + 0.2 * grad, 0.9 * v + 0.1 * grad**2
        update = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
        weight = weight * (1 - rate * 0.2) - rate * update
        torch.testing.assert_close(model.weight.detach(), weight)


def test_state_round_trip_continues_bit_for_bit() -> None:
    first, second = HybridLM(preset("cpu_tiny")), HybridLM(preset("cpu_tiny"))
    optimizer = build_optimizer(first, OptimSection())
    assert optimizer_tensors(first, optimizer) == {}
    step(first, optimizer, 1)
    second.load_state_dict(first.state_dict())
    again = build_optimizer(second, OptimSection())
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(first, optimizer).items()}
    load_optimizer_tensors(second, again, saved)
    step(first, optimizer, 2)
    step(second, again, 2)
    for (name, left), right in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_state_of_another_model_is_refused() -> None:
    model = HybridLM(preset("cpu_tiny"))
    optimizer = build_optimizer(model, OptimSection())
    step(model, optimizer, 1)
    tensors = dict(optimizer_tensors(model, optimizer))
    name = next(key for key in tensors if key.startswith("exp_avg/"))
    with pytest.raises(UserError, match="names differ"):
        load_optimizer_tensors(model, optimizer, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(UserError, match="parameter"):
        load_optimizer_tensors(model, optimizer, {**tensors, name: torch.zeros(1, 1)})
