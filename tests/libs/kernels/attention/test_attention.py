"""Attention against plain loops: causality, groups, documents, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from libs.kernels.attention import attention, choose_backend

BACKENDS = ("reference", "sdpa")


def operands(S: int, H: int, G: int, D: int = 8, B: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(S * 100 + H)
    shapes = ((B, S, H, D), (B, S, G, D), (B, S, G, D))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def slow(q: Tensor, k: Tensor, v: Tensor, bounds: list[int] | None, causal: bool = True) -> Tensor:
    """One query and head at a time, summed by hand."""
    out = torch.zeros_like(q)
    B, S, H, D = q.shape
    group = H // k.shape[2]
    for b in range(B):
        for t in range(S):
            start = 0 if bounds is None else max(bound for bound in bounds[:-1] if bound <= t)
            end = t + 1 if causal else (S if bounds is None else min(bound for bound in bounds if bound > t))
            for h in range(H):
                scores = k[b, start:end, h // group] @ q[b, t, h] / D**0.5
                weights = (scores - scores.max()).exp()
                out[b, t, h] = (weights / weights.sum()) @ v[b, start:end, h // group]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [None, [0, 11], [0, 1, 5, 11]])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (4, 1)])
def test_equals_plain_loops(backend: str, bounds: list[int] | None, causal: bool, H: int, G: int) -> None:
    q, k, v = operands(11, H, G)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    with torch.no_grad():
        got = attention(q, k, v, cu_seqlens=cu_seqlens, causal=causal, backend=backend)
        torch.testing.assert_close(got, slow(q, k, v, bounds, causal), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bounds", [None, [0, 3, 20, 33]])
def test_sdpa_gradients_equal_reference(bounds: list[int] | None) -> None:
    def run(backend: str) -> list[Tensor]:
        leaves = operands(33, 6, 2, dtype=torch.float32)
        out = attention(*leaves, cu_seqlens=bounds, backend=backend)
        return [out, *torch.autograd.grad((out * torch.arange(33.0)[None, :, None, None]).sum(), leaves)]

    for got, want in zip(run("sdpa"), run("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_query_sees_another_document_or_the_future(backend: str) -> None:
    q, k, v = operands(12, 2, 1)
    bounds = [0, 5, 12]
    for t in range(12):
        out = attention(q, k, v, cu_seqlens=bounds, backend=backend)
        d_k, d_v = torch.autograd.grad(out[0, t].sum(), (k, v))
        seen = (d_v[0].abs().sum((1, 2)) > 0).nonzero()[:, 0].tolist()
        assert seen == list(range(0 if t < 5 else 5, t + 1))
        hidden = [key for key in range(12) if key not in seen]
        assert d_k[0, hidden].abs().sum() == 0


def test_one_query_over_a_cache() -> None:
    q, k, v = operands(9, 4, 2)
    full = attention(q, k, v)
    for backend in BACKENDS:
        torch.testing.assert_close(attention(q[:, -1:], k, v, causal=False, backend=backend), full[:, -1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_queries_alone_give_what_all_give(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("libs.kernels.attention.sdpa.QUERY_BLOCK", 4)
    q, k, v = operands(17, 4, 2, B=2)
    weights = torch.arange(7.0 * 8).view(7, 1, 8)
    full = attention(q, k, v, backend="reference")[:, -7:]
    got = attention(q[:, -7:], k, v, backend=backend)
    torch.testing.assert_close(got, full, rtol=1e-10, atol=1e-10)
    for ours, want in zip(
        torch.autograd.grad((got * weights).sum(), (q, k, v)),
        torch.autograd.grad((full * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-10)


def test_backend_choice_states_its_reason_and_never_falls_back() -> None:
    choice = choose_backend("auto", torch.device("cpu"))
    assert choice.value == "sdpa"
    assert "sdpa" in choice.reason
    with pytest.raises(ValueError, match=r"unknown backend 'flash'.*sdpa, reference"):
        choose_backend("flash", torch.device("cpu"))
    with pytest.raises(ValueError, match="cannot run on device 'xla'"):
        choose_backend("sdpa", torch.device("xla"))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 5], "0 to S=11"),
        ([0, 5, 5, 11], "rise strictly"),
        ([1, 11], "0 to S=11"),
        ([0, 7, 5, 11], "rise"),
    ],
)
def test_refuses_boundaries_that_do_not_fit(bounds: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*operands(11, 2, 1), cu_seqlens=torch.tensor(bounds))


def test_refuses_shapes_that_do_not_fit() -> None:
    q, k, v = operands(11, 4, 2)
    with pytest.raises(ValueError, match=r"H % G == 0"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="a key for every query"):
        attention(q, k[:, :5], v[:, :5])
    with pytest.raises(ValueError, match="as many keys as queries"):
        attention(q[:, :5], k, v, cu_seqlens=[0, 5])
    with pytest.raises(ValueError, match="with B=2"):
        attention(*operands(11, 4, 2, B=2), cu_seqlens=[0, 11])
