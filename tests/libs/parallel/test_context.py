"""Context parallelism against one rank: outputs, every gradient, documents inside and across slices, mutations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from libs.flags.errors import UserError
from libs.kernels.attention import attention
from libs.kernels.mimo import handover, mamba3_mimo
from libs.parallel import context
from libs.parallel.context import ContextShard, attention_context, mamba3_mimo_context, slice_offsets
from libs.parallel.mesh import Group
from tests.support.mimo import TOKEN_AXIS, Shape, operands, relative_error, require_grad, slice_tokens
from tests.support.threads import Exchange, ThreadGroup, on_threads

Grads = dict[str, Tensor]
OPTIONS: dict[str, Any] = {"chunk_size": 8, "rotary_dim_divisor": 4, "dtype": None, "backend": "chunked"}


def weigh(out: Tensor, first: int = 0) -> Tensor:
    """A loss in which every output counts differently; `first` is the place of the first token in the row."""
    tokens = torch.arange(first, first + out.shape[1], dtype=out.dtype)
    return (out * (1 + (tokens[:, None, None] * 0.37).sin()) * torch.linspace(-1, 1, out.shape[-1])).sum()


def on_one_rank(
    tensors: dict[str, Tensor | None], bounds: Sequence[int] | None, **options: Any
) -> tuple[Tensor, Grads]:
    leaves = require_grad(tensors)
    edges = None if bounds is None else torch.tensor(bounds)
    out = mamba3_mimo(**leaves, **(OPTIONS | options), cu_seqlens=edges)
    weigh(out).backward()
    return out.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}


def on_slices(
    tensors: dict[str, Tensor | None], size: int, bounds: Sequence[int] | None, offsets: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, Grads, Exchange]:  # fmt: skip
    """The same from `size` slices: outputs and token gradients joined, parameter gradients summed."""
    total = tensors["V"].shape[1]
    offsets = slice_offsets(total, size) if offsets is None else offsets

    def work(group: Group) -> tuple[Tensor, Grads]:
        shard = ContextShard(group, offsets, None if bounds is None else tuple(bounds))
        leaves = require_grad(slice_tokens(tensors, shard.start, shard.stop))
        out = mamba3_mimo_context(**leaves, **(OPTIONS | options), shard=shard)
        weigh(out, shard.start).backward()
        return out.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}

    ranks, exchange = on_threads(size, work)
    grads = {}
    for name in ranks[0][1]:
        parts = [rank[1][name] for rank in ranks]
        grads[name] = torch.cat(parts, TOKEN_AXIS[name]) if name in TOKEN_AXIS else torch.stack(parts).sum(0)
    return torch.cat([rank[0] for rank in ranks], dim=1), grads, exchange


def check(got: tuple[Tensor, Grads], want: tuple[Tensor, Grads], tolerance: float) -> None:
    assert relative_error(got[0], want[0]) <= tolerance
    for name, grad in want[1].items():
        assert relative_error(got[1][name], grad) <= tolerance, name


# Boundaries in a row of 61 tokens; with 2 slices the cut is at 30, with 4 at 15, 30, 45.
DOCUMENTS = {
    "one document": None,
    "inside slices and across": [0, 5, 21, 37, 38, 50, 61],
    "two starts in one slice, none in the next": [0, 16, 18, 29, 61],
    "a start on every cut and one inside": [0, 15, 30, 33, 45, 61],
    "one cut of several": [0, 30, 61],
    "one token documents around a cut": [0, 29, 30, 31, 32, 61],
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bounds", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_equals_one_rank_in_outputs_and_all_gradients(size: int, bounds: list[int] | None) -> None:
    tensors = operands(Shape(S=61), torch.float64)
    got = on_slices(tensors, size, bounds)
    check(got[:2], on_one_rank(tensors, bounds), 1e-11)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(S=61, B=2, G=2, R=2, divisor=2),
        Shape(S=61, R=1, z=False, d=False),
        Shape(S=61, norm=True),
        Shape(S=61, G=4, out=False, R=2),
    ],
    ids=["rows and groups", "no gate", "output norm", "no sum over ranks"],
)
def test_every_option(shape: Shape) -> None:
    tensors = operands(shape, torch.float64)
    if not shape.out:
        with torch.no_grad():
            want = mamba3_mimo(**tensors, **(OPTIONS | {"rotary_dim_divisor": shape.divisor}))
            ranks, _ = on_threads(4, lambda group: _outputs_only(tensors, group, shape.divisor))
        assert relative_error(torch.cat(ranks, dim=1), want) <= 1e-11
        return
    options = {"rotary_dim_divisor": shape.divisor}
    got = on_slices(tensors, 4, None, **options)
    check(got[:2], on_one_rank(tensors, None, **options), 1e-11)


def _outputs_only(tensors: dict[str, Tensor | None], group: Group, divisor: int) -> Tensor:
    shard = ContextShard(group, slice_offsets(61, group.size))
    with torch.no_grad():
        mine = slice_tokens(tensors, shard.start, shard.stop)
        return mamba3_mimo_context(**mine, **(OPTIONS | {"rotary_dim_divisor": divisor}), shard=shard)


@pytest.mark.parametrize("size", [2, 4])
def test_equals_one_rank_in_fp32_over_many_blocks(size: int) -> None:
    """The acceptance figure, at a length where the angle has gone round many times and every slice has blocks."""
    tensors = operands(Shape(S=2411, H=2, R=2, N=8, P=4), torch.float32)
    bounds = [0, 700, 2000, 2411]
    for documents in (None, bounds):
        got = on_slices(tensors, size, documents, backend="chunked", chunk_size=16)
        want = on_one_rank(tensors, documents, chunk_size=16)
        assert relative_error(got[0], want[0]) <= 1e-5
        for name, grad in want[1].items():
            assert relative_error(got[1][name], grad) <= 1e-5, name


def test_bf16_operands_under_autocast_keep_an_fp32_state() -> None:
    shape = Shape(S=61)
    kept = ("ADT", "DT", "Trap", "Q_bias", "K_bias", "MIMO_V", "MIMO_Z", "MIMO_Out", "D")
    tensors = {
        name: u if name in kept or u is None else u.bfloat16() for name, u in operands(shape, torch.float32).items()
    }
    exact = {name: None if u is None else u.float() for name, u in tensors.items()}

    def work(group: Group) -> tuple[Tensor, Tensor]:
        shard = ContextShard(group, slice_offsets(61, 4))
        leaves = require_grad(slice_tokens(tensors, shard.start, shard.stop))
        with torch.autocast("cpu", torch.bfloat16):
            out = mamba3_mimo_context(**leaves, **(OPTIONS | {"dtype": torch.float32}), shard=shard)
        weigh(out, shard.start).backward()
        return out.detach(), leaves["MIMO_V"].grad

    ranks, _ = on_threads(4, work)
    out, grads = on_one_rank(exact, None)
    assert relative_error(torch.cat([rank[0] for rank in ranks], dim=1), out) <= 1e-5
    assert relative_error(torch.stack([rank[1] for rank in ranks]).sum(0), grads["MIMO_V"]) <= 1e-5


def test_slices_of_very_different_length_and_the_oracle_as_backend() -> None:
    tensors = operands(Shape(S=40), torch.float64)
    got = on_slices(tensors, 4, [0, 3, 40], (0, 1, 2, 33, 40), backend="reference")
    check(got[:2], on_one_rank(tensors, [0, 3, 40], backend="reference"), 1e-11)


def test_a_decay_to_zero_is_no_obstacle() -> None:
    """Weights that underflow must give zero, not NaN: the hand-over takes no quotient."""
    tensors = operands(Shape(S=61), torch.float32)
    tensors["ADT"] = tensors["ADT"] * 2000
    out, grads, _ = on_slices(tensors, 4, None)
    want, exact = on_one_rank(tensors, None)
    # No token sees another, so an angle has no effect: its gradient is rounding noise, and finite.
    assert torch.isfinite(grads.pop("Angles")).all()
    exact.pop("Angles")
    check((out, grads), (want, exact), 1e-5)


def test_bytes_exchanged_do_not_grow_with_the_sequence() -> None:
    logs = []
    for tokens in (64, 256):
        shape = Shape(S=tokens)
        logs.append(on_slices(operands(shape), 4, None)[2].log)
    per_rank = 4 * (4 + 2 + 16 * 8 + 16 * 4 + 8) * 8  # H (A + 2 + N P + N R + P) numbers of 8 bytes
    assert logs[0] == logs[1] == [("all_gather", per_rank), ("reduce_scatter", 4 * per_rank)]


def test_nothing_is_exchanged_when_no_document_crosses() -> None:
    tensors = operands(Shape(S=61), torch.float64)
    bounds = [0, 7, 30, 40, 61]
    *got, exchange = on_slices(tensors, 2, bounds)
    check((got[0], got[1]), on_one_rank(tensors, bounds), 1e-11)
    assert exchange.log == []


def test_a_frozen_input_and_no_grad_need_no_way_back() -> None:
    tensors = operands(Shape(S=61))
    ranks, exchange = on_threads(2, lambda group: _outputs_only(tensors, group, 4))
    assert relative_error(torch.cat(ranks, dim=1), mamba3_mimo(**tensors, **OPTIONS)) <= 1e-11
    assert [name for name, _ in exchange.log] == ["all_gather"]


# --- attention


def _attend(size: int, bounds: list[int] | None, B: int, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((B, 61, 4, 8), (B, 61, 2, 8), (B, 61, 2, 8))
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def work(group: Group) -> list[Tensor]:
        shard = ContextShard(group, slice_offsets(61, size), None if bounds is None else tuple(bounds))
        mine = [shard.cut(leaf).clone().requires_grad_() for leaf in leaves]
        out = attention_context(*mine, shard=shard, backend=backend)
        return [out, *torch.autograd.grad(weigh(out, shard.start), mine)]

    ranks, _ = on_threads(size, work)
    whole = [leaf.requires_grad_() for leaf in leaves]
    out = attention(*whole, cu_seqlens=bounds, backend="reference")
    want = [out, *torch.autograd.grad(weigh(out), whole)]
    return [torch.cat(parts, dim=1) for parts in zip(*ranks, strict=True)], want


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bounds", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_attention_equals_one_rank(size: int, bounds: list[int] | None, backend: str) -> None:
    for got, want in zip(*_attend(size, bounds, 1 if bounds else 2, backend), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# --- mutations: each must be caught by the comparison above


def no_correction(patch: pytest.MonkeyPatch) -> None:
    original = context._entering
    patch.setattr(context, "_entering", lambda *a: original(*a)._replace(ssm=torch.zeros_like(original(*a).ssm)))


def angle_not_handed_over(patch: pytest.MonkeyPatch) -> None:
    original = context._entering
    patch.setattr(context, "_entering", lambda *a: original(*a)._replace(angle=torch.zeros_like(original(*a).angle)))


def later_slices_not_turned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(handover, "rotate_rows", lambda u, angle, divisor: u)


def shifted_term_dropped(patch: pytest.MonkeyPatch) -> None:
    original = context._entering
    patch.setattr(context, "_entering", lambda *a: original(*a)._replace(x=torch.zeros_like(original(*a).x)))


def shifted_term_dropped_between_other_ranks(patch: pytest.MonkeyPatch) -> None:
    original = handover.advance
    patch.setattr(
        handover,
        "advance",
        lambda state, summary, *a: original(state, summary._replace(first_BH=torch.zeros_like(summary.first_BH)), *a),
    )


def decay_of_the_slice_between_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = handover.advance
    patch.setattr(
        handover,
        "advance",
        lambda state, summary, *a: original(
            state, summary._replace(log_decay_BH=torch.zeros_like(summary.log_decay_BH)), *a
        ),
    )


def gradient_exchange_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ThreadGroup, "reduce_scatter", lambda self, tensor: tensor[self.rank])


def documents_leak_over_the_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ContextShard, "passes", lambda self, rank: True)
    patch.setattr(ContextShard, "starts_document", lambda self, rank: rank == 0)


MUTANTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    no_correction,
    angle_not_handed_over,
    later_slices_not_turned,
    shifted_term_dropped,
    shifted_term_dropped_between_other_ranks,
    decay_of_the_slice_between_forgotten,
    gradient_exchange_dropped,
    documents_leak_over_the_cut,
]


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_each_mutant_is_caught(
    mutant: Callable[[pytest.MonkeyPatch], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = operands(Shape(S=61), torch.float32)

    def verdict() -> None:
        for bounds in (None, DOCUMENTS["a start on every cut and one inside"], DOCUMENTS["one cut of several"]):
            got = on_slices(tensors, 4, bounds)
            check(got[:2], on_one_rank(tensors, bounds), 1e-4)

    if mutant is None:
        verdict()
        return
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        verdict()


# --- refusals


def test_offsets_cover_the_row_and_keep_the_grid() -> None:
    assert slice_offsets(61, 4) == (0, 15, 30, 45, 61)
    assert slice_offsets(61, 4, multiple=16) == (0, 16, 32, 48, 61)
    assert slice_offsets(3, 1, multiple=16) == (0, 3)
    with pytest.raises(UserError, match=r"size 4: 40 tokens are only 3 blocks of 16.*at most 3 ranks.*49 tokens"):
        slice_offsets(40, 4, multiple=16)


def test_a_slice_of_the_wrong_length_is_refused() -> None:
    def work(group: Group) -> None:
        shard = ContextShard(group, (0, 10, 61))
        mamba3_mimo_context(**slice_tokens(operands(Shape(S=61)), 0, 30), **OPTIONS, shard=shard)

    with pytest.raises(ValueError, match=r"holds tokens \d+ to \d+ of the row, got 30 tokens"):
        on_threads(2, work)
