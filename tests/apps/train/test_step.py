"""One step against plain PyTorch: accumulation, clipping, and what is reported."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from apps.train.config import OptimSection, TrainSection
from apps.train.data.loader import Batch, Cursor
from apps.train.lane import Lane, choose_lane
from apps.train.metrics import StepClock
from apps.train.optim import build_optimizer
from apps.train.step import accumulate_gradients, train_step
from libs.model import HybridLM, ModelConfig, preset
from libs.parallel.data import TorchEngine
from libs.parallel.mesh import single


@pytest.fixture
def lane() -> Lane:
    return choose_lane(TrainSection(device="cpu", precision="fp32"))


def config(*, mtp: bool) -> ModelConfig:
    tiny = preset("cpu_tiny")
    return tiny if mtp else ModelConfig.parse({**tiny.model_dump(), "pattern": "M-*-"})


def batch(documents: list[int], seed: int) -> Batch:
    """Documents of the given lengths; the last label of each is no target."""
    total = sum(documents)
    tokens = torch.randint(64, (1, total), generator=torch.Generator().manual_seed(seed))
    bounds = torch.tensor([0, *documents]).cumsum(0).to(torch.int32)
    labels = tokens.roll(-1, 1)
    labels[0, bounds[1:].long() - 1] = -100
    return Batch(tokens, labels, bounds, int((labels >= 0).sum()), Cursor(), (seed,))


def join(parts: list[Batch]) -> Batch:
    tokens = torch.cat([p.tokens for p in parts], 1)
    labels = torch.cat([p.labels for p in parts], 1)
    lengths = [int(b - a) for p in parts for a, b in pairwise(p.cu_seqlens.tolist())]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Batch(tokens, labels, bounds, sum(p.n_bytes for p in parts), Cursor(), ())


def gradients(model: HybridLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_accumulation_equals_one_large_batch(lane: Lane) -> None:
    """Micro-batches of very different numbers of targets: a mean of means would fail here."""
    parts = [batch([30], 1), batch([2, 2, 3, 2], 2), batch([5, 20], 3)]
    model = HybridLM(config(mtp=False))
    small = accumulate_gradients(model, parts, lane)
    apart = gradients(model)
    model.zero_grad()
    large = accumulate_gradients(model, [join(parts)], lane)
    assert small.loss == pytest.approx(large.loss, rel=1e-5)
    assert small.main_nll_sum == pytest.approx(large.main_nll_sum, rel=1e-5)
    assert (small.tokens, small.n_bytes) == (large.tokens, large.n_bytes)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(apart[name], grad, rtol=1e-3, atol=1e-6, msg=name)


def test_reported_losses_are_those_of_the_model(lane: Lane) -> None:
    model, one = HybridLM(config(mtp=True)), batch([20, 12], 5)
    found = accumulate_gradients(model, [one], lane)
    out = model.loss(one.tokens, one.labels, cu_seqlens=one.cu_seqlens)
    assert found.loss == pytest.approx(float(out.loss.detach()))
    assert found.main_loss == pytest.approx(float(out.main_nll_sum) / int(out.n_tokens))
    assert found.mtp_loss == pytest.approx(float(out.mtp_nll_sums[0]) / int(out.mtp_n_tokens[0]))
    assert found.loss == pytest.approx(found.main_loss + 0.3 * (found.mtp_loss or math.nan), rel=1e-5)
    assert accumulate_gradients(HybridLM(config(mtp=False)), [one], lane).mtp_loss is None


def test_clipping_scales_all_gradients_by_one_factor(lane: Lane) -> None:
    model, one = HybridLM(config(mtp=True)), batch([20, 12], 5)
    accumulate_gradients(model, [one], lane)
    free = gradients(model)
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in free.values()))
    clip = norm / 7
    engine = TorchEngine(model, build_optimizer(model, OptimSection()), single())
    result = train_step(model, engine, [one], rate=0.0, clip_norm=clip, lane=lane, clock=StepClock(lane.device))
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, free[name] / 7, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_rate_is_applied_and_the_clock_runs(precision: str) -> None:
    lane = choose_lane(TrainSection.model_validate({"device": "cpu", "precision": precision}))
    model, one = HybridLM(config(mtp=True)), batch([20, 12], 5)
    engine = TorchEngine(model, build_optimizer(model, OptimSection(lr=1.0)), single())
    clock = StepClock(lane.device)
    before = [p.detach().clone() for p in model.parameters()]
    train_step(model, engine, [one], rate=1e-3, clip_norm=None, lane=lane, clock=clock)
    moved = max(float((a - b.detach()).abs().max()) for a, b in zip(before, model.parameters(), strict=True))
    assert 1e-4 < moved < 2e-3  # AdamW's first step moves each weight by the rate
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert clock.seconds["forward_backward"] > 0
    assert clock.seconds["optimizer"] > 0


def test_one_process_is_plain_pytorch_bit_for_bit(lane: Lane) -> None:
    """No exchange, no other order of sums: the engine adds nothing where there is one process."""
    ours, plain, parts = HybridLM(config(mtp=True)), HybridLM(config(mtp=True)), [batch([20, 12], 5), batch([30], 6)]
    optimizers = build_optimizer(ours, OptimSection()), build_optimizer(plain, OptimSection())
    total = sum(int((part.labels >= 0).sum()) for part in parts)
    engine = TorchEngine(ours, optimizers[0], single())
    for _ in range(3):
        train_step(ours, engine, parts, rate=1e-2, clip_norm=0.5, lane=lane, clock=StepClock(lane.device))
        optimizers[1].zero_grad()
        for part in parts:
            share = int((part.labels >= 0).sum()) / total
            (plain.loss(part.tokens, part.labels, cu_seqlens=part.cu_seqlens).loss * share).backward()
        norm = torch.nn.utils.get_total_norm(p.grad for p in plain.parameters() if p.grad is not None)
        torch.nn.utils.clip_grads_with_norm_(plain.parameters(), 0.5, norm)
        for group in optimizers[1].param_groups:
            group["lr"] = 1e-2
        optimizers[1].step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_a_nonfinite_loss_leaves_the_weights(lane: Lane) -> None:
    model, one = HybridLM(config(mtp=True)), batch([20, 12], 5)
    with torch.no_grad():
        model.embedding.weight[int(one.tokens[0, 3])] = float("nan")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, OptimSection())
    engine = TorchEngine(model, optimizer, single())
    result = train_step(model, engine, [one], rate=1.0, clip_norm=1.0, lane=lane, clock=StepClock(lane.device))
    assert result.nonfinite == "loss"
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(7), new.nan_to_num(7))
    assert not optimizer.state
