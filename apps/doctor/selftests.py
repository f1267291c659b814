"""Quick self-tests of the CPU kernels: scan, attention and loss against their references, in a second or two.

Not for the start-up check of a run, which is at its own geometry, nor for GPUs: a run on one tests its kernels itself.
"""
# T tokens  V vocabulary  D hidden  S tokens  H heads  B batch

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from apps.doctor.machine import UNUSABLE, why

_SEED = 2026
_TOLERANCE = 1e-5  # of the largest entry, fp32: other orders of summation


class SelfTest(NamedTuple):
    """One kernel against its reference. detail: the error, or what went wrong."""

    what: str
    passed: bool
    detail: str
    seconds: float


def run_selftests() -> list[SelfTest]:
    """All of them. A kernel that cannot even be imported is a failed test."""
    tests: tuple[tuple[str, Callable[[], str | None]], ...] = (
        ("the scan, chunked against reference", _scan),
        ("attention, sdpa against reference", _attention),
        ("the loss, chunked against reference", _loss),
    )
    return [_timed(what, test) for what, test in tests]


def _timed(what: str, test: Callable[[], str | None]) -> SelfTest:
    started = time.perf_counter()
    try:
        wrong = test()
    except (*UNUSABLE, ValueError) as error:
        wrong = why(error)
    seconds = time.perf_counter() - started
    return SelfTest(what, wrong is None, wrong or "agrees", seconds)


def _scan() -> str | None:
    import torch

    from libs.kernels.mimo.capabilities import Geometry
    from libs.kernels.mimo.selftest import SelfTestFailed, self_test

    small = Geometry(H=2, G=1, R=2, N=8, P=8, C=8, divisor=2, norm=True)
    try:
        self_test(small, "chunked", torch.device("cpu"), torch.float32)
    except SelfTestFailed as failed:
        return failed.result.describe()
    return None


def _attention() -> str | None:
    import torch

    from libs.kernels.attention.api import attention

    generator = torch.Generator().manual_seed(_SEED)
    q, k, v = (torch.randn(1, 40, heads, 16, generator=generator) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 17, 40], dtype=torch.int32)
    got, want = (attention(q, k, v, cu_seqlens=bounds, backend=name) for name in ("sdpa", "reference"))
    return _difference(float((got - want).abs().max() / want.abs().max()))


def _loss() -> str | None:
    import torch

    from libs.kernels.loss.api import linear_cross_entropy

    generator = torch.Generator().manual_seed(_SEED)
    hidden, weight = torch.randn(30, 16, generator=generator), torch.randn(64, 16, generator=generator)
    labels = torch.randint(0, 64, (30,), generator=generator)
    labels[3] = -100
    got, want = (linear_cross_entropy(hidden, weight, labels, backend=name) for name in ("chunked", "reference"))
    return _difference(float((got - want).abs().max() / want.abs().max()))


def _difference(error: float) -> str | None:
    return None if error <= _TOLERANCE else f"relative error {error:.2g}, allowed {_TOLERANCE:g}"
