"""Numbers of a step, against slow obvious versions; MFU that refuses."""

from __future__ import annotations

import math
import time

import pytest
import torch

from apps.train.metrics import StepClock, bits_per_byte, mean_context, mfu, peak_memory_bytes


def test_mfu_of_a_known_device_is_achieved_over_peak() -> None:
    found = mfu(flops_per_token=6e9, tokens_per_s=50_000, device_name="NVIDIA H200", precision="bf16")
    assert found.reason is None
    assert found.value == pytest.approx(6e9 * 50_000 / 989.4e12)


@pytest.mark.parametrize(
    ("name", "precision", "said"),
    [("AMD EPYC", "fp32", "AMD EPYC"), ("NVIDIA H200", "fp32", "bf16"), ("NVIDIA H2000", "bf16", "H2000")],
)
def test_mfu_is_refused_with_a_reason(name: str, precision: str, said: str) -> None:
    found = mfu(flops_per_token=1.0, tokens_per_s=1.0, device_name=name, precision=precision)
    assert found.value is None
    assert found.reason is not None
    assert said in found.reason


def test_bits_per_byte() -> None:
    assert bits_per_byte(8 * math.log(2) * 100, 100) == pytest.approx(8.0)


def test_mean_context_counts_keys_per_query() -> None:
    bounds = [torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)]
    keys = [1, 2, 3, 1, 2, 1]
    assert mean_context(bounds) == pytest.approx(sum(keys) / len(keys))


def test_clock_splits_the_time_and_loses_none() -> None:
    clock = StepClock(torch.device("cpu"))
    with clock.phase("data"):
        time.sleep(0.02)
    with clock.phase("optimizer"):
        time.sleep(0.01)
    time.sleep(0.01)
    total = clock.total()
    assert clock.seconds["data"] >= 0.02
    assert clock.seconds["forward_backward"] == 0.0
    assert clock.other(total) >= 0.01
    assert sum(clock.seconds.values()) + clock.other(total) == pytest.approx(total)


def test_peak_memory_is_at_least_what_is_held() -> None:
    held = torch.ones(32 * 2**20, dtype=torch.uint8)
    assert peak_memory_bytes(torch.device("cpu")) > held.numel()
