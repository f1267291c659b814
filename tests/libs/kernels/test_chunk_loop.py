"""The loop over chunks with recomputation: values and gradients of plain autograd, at what memory it claims."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from libs.kernels.attention.reference import attention_reference
from libs.kernels.attention.xla import attention_xla
from libs.kernels.chunk_loop import Tensors, chunk_loop
from libs.kernels.loss.reference import linear_cross_entropy_reference
from libs.kernels.loss.xla import linear_cross_entropy_xla
from libs.kernels.mimo.xla.scan import document_ids
from tests.support.mimo import relative_error


def body(constants: Tensors, carry: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
    weight, kept = constants
    (state,), (u, number) = carry, x
    state = torch.tanh(state @ weight + u) + number.to(u.dtype)
    return (state,), (state * kept, u.sum(-1))


def operands() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 4), (4,), (3, 4), (5, 3, 4))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)


def run(weight: Tensor, kept: Tensor, state: Tensor, xs: Tensor) -> Tensors:
    number = torch.arange(5)
    carry, ys = chunk_loop(body, (weight, kept), (state,), (xs, number), "loop")
    return (*carry, *ys)


def plain(weight: Tensor, kept: Tensor, state: Tensor, xs: Tensor) -> Tensors:
    ys = []
    for i in range(5):
        (state,), y = body((weight, kept), (state,), (xs[i], torch.tensor(i)))
        ys.append(y)
    return (state, *(torch.stack(column) for column in zip(*ys, strict=True)))


def test_values_and_gradients_are_those_of_a_plain_loop() -> None:
    found = []
    for function in (run, plain):
        leaves = operands()
        out = function(*leaves)
        sum((u * (i + 1)).sum() for i, u in enumerate(out)).backward()  # type: ignore[union-attr]
        found.append([*out, *(u.grad for u in leaves)])
    for got, want in zip(*found, strict=True):
        assert got is not None
        assert want is not None
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_gradients_by_differences() -> None:
    assert torch.autograd.gradcheck(run, operands())


def test_what_needs_no_gradient_gets_none() -> None:
    weight, kept, state, xs = operands()
    kept.requires_grad_(False)
    run(weight, kept, state, xs)[1].sum().backward()
    assert kept.grad is None
    assert xs.grad is not None


def test_nothing_of_a_chunk_outlives_the_forward() -> None:
    """Saved are constants, xs and entering carries: what the body makes is gone."""
    made: list[weakref.ref[Tensor]] = []

    def watched(constants: Tensors, carry: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
        inner = x[0] * constants[0]
        made.append(weakref.ref(inner))
        return carry, (inner.exp(),)

    _, (out,) = chunk_loop(watched, (torch.ones(1, requires_grad=True),), (), (torch.randn(3, 2),), "loop")
    gc.collect()
    assert out.requires_grad
    assert [ref() for ref in made] == [None] * 3


def attend(block: int, cu: list[int] | None, causal: bool = True, queries: int = 37) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 37, h, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    ids = None if cu is None else document_ids(cu, 37)
    found = []
    for which in range(2):
        leaves = [u.clone().requires_grad_() for u in (q[:, 37 - queries :], k, v)]
        if which == 0:
            out = attention_xla(*leaves, ids, causal, 0.3, driver="loop", block=block)
        else:
            out = attention_reference(*leaves, cu, causal, 0.3)
        out.square().sum().backward()
        found.append([out, *(u.grad for u in leaves)])
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) <= 1e-12


def test_attention_equals_the_reference() -> None:
    for block in (1, 8, 16, 64):
        attend(block, None)
        attend(block, [0, 3, 8, 20, 21, 37])
    attend(8, None, causal=False)
    attend(8, None, queries=5)


def test_loss_equals_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (23, 11))
    labels = torch.randint(0, 11, (23,), generator=generator)
    labels[[0, 7, 22]] = -100
    scale = torch.randn(23, generator=generator, dtype=torch.float64)
    for chunk in (1, 4, 8, 32):
        found = []
        for which in range(2):
            leaves = [u.clone().requires_grad_() for u in (hidden, weight)]
            if which == 0:
                nll = linear_cross_entropy_xla(*leaves, labels, -100, chunk, driver="loop")
            else:
                nll = linear_cross_entropy_reference(*leaves, labels, -100)
            (nll * scale).sum().backward()
            found.append([nll, *(u.grad for u in leaves)])
        for got, want in zip(*found, strict=True):
            assert relative_error(got, want) <= 1e-12
