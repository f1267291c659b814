"""Chunked linear cross-entropy: equal to log_softmax, exact gradients, and no T x V tensor anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from libs.kernels.loss import choose_backend, linear_cross_entropy
from libs.kernels.loss.chunked import default_chunk_tokens


def operands(T: int, V: int, D: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T + V)
    hidden = torch.randn(T, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[::4] = -100
    return hidden, weight, labels


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("chunk", [1, 3, 8, 21, 64])
def test_equals_log_softmax_for_every_chunk(chunk: int) -> None:
    hidden, weight, labels = operands(21, 13, 5)
    got = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)
    log_probs = torch.log_softmax(hidden @ weight.T, -1)
    want = torch.stack([-log_probs[t, y] if y != -100 else torch.zeros(()) for t, y in enumerate(labels.tolist())])
    torch.testing.assert_close(got, want.double(), rtol=1e-12, atol=1e-12)
    assert (got[::4] == 0).all()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_gradcheck(backend: str) -> None:
    hidden, weight, labels = operands(7, 6, 4)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, chunk_tokens=3, backend=backend)

    assert torch.autograd.gradcheck(run, (hidden, weight))


def test_each_token_has_its_own_gradient() -> None:
    hidden, weight, labels = operands(21, 13, 5, torch.float32)
    scale = torch.linspace(-2, 3, 21)

    def grads(backend: str) -> tuple[Tensor, ...]:
        nll = linear_cross_entropy(hidden, weight, labels, chunk_tokens=4, backend=backend)
        return torch.autograd.grad((nll * scale).sum(), (hidden, weight))

    for got, want in zip(grads("chunked"), grads("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (grads("chunked")[0][::4] == 0).all()


def test_never_holds_tokens_times_vocabulary() -> None:
    T, V, chunk = 96, 80, 8
    hidden, weight, labels = operands(T, V, 4, torch.float32)
    with LargestTensor() as watch:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk).mean().backward()
    assert watch.elements == chunk * V
    with LargestTensor() as watch:  # the watch itself can fail: the reference does hold them
        linear_cross_entropy(hidden, weight, labels, backend="reference")
    assert watch.elements >= T * V


def test_default_chunk_stays_within_a_budget() -> None:
    assert default_chunk_tokens(4096, "cpu") * 4096 == 2**20
    assert default_chunk_tokens(65_536, "cuda") == 2048
    assert default_chunk_tokens(10**9, "cpu") == 16
    assert default_chunk_tokens(1, "cuda") == 8192


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = operands(9, 7, 4, torch.float32)
    nll = linear_cross_entropy(hidden * 1000, weight, labels)
    assert torch.isfinite(nll).all()
    torch.testing.assert_close(nll, linear_cross_entropy(hidden * 1000, weight, labels, backend="reference"))


def test_bf16_accumulates_in_fp32() -> None:
    hidden, weight, labels = operands(64, 48, 16, torch.float32)
    exact = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).sum(), (hidden, weight))
    low = [hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()]
    nll = linear_cross_entropy(low[0], low[1], labels, chunk_tokens=4)
    assert nll.dtype == torch.float32
    for got, want in zip(torch.autograd.grad(nll.sum(), low), exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_autocast_runs_products_in_its_dtype(backend: str) -> None:
    hidden, weight, labels = operands(64, 48, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        nll = linear_cross_entropy(hidden, weight, labels, backend=backend)
        got = torch.autograd.grad(nll.sum(), (hidden, weight))  # backward inside the region as well
    assert nll.dtype == torch.float32
    assert {grad.dtype for grad in got} == {torch.float32}
    exact = linear_cross_entropy(hidden, weight, labels)
    assert 0 < (nll - exact).abs().max() < 0.1


def test_only_the_needed_gradient_is_computed() -> None:
    hidden, weight, labels = operands(8, 6, 4)
    nll = linear_cross_entropy(hidden, weight.detach(), labels)
    assert nll.requires_grad
    nll.sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_refusals_show_the_value() -> None:
    hidden, weight, labels = operands(8, 6, 4)
    with pytest.raises(ValueError, match=r"\(8, 4\), \(6, 3\)"):
        linear_cross_entropy(hidden, weight[:, :3], labels)
    with pytest.raises(ValueError, match=r"shape \(8,\)"):
        linear_cross_entropy(hidden, weight, labels[:5])
    with pytest.raises(ValueError, match="one dtype"):
        linear_cross_entropy(hidden, weight.float(), labels)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=0)
    with pytest.raises(ValueError, match="unknown backend 'cutlass'"):
        linear_cross_entropy(hidden, weight, labels, backend="cutlass")
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, torch.full_like(labels, 6))
    assert choose_backend("auto", torch.device("cpu")).value == "chunked"
