"""The chunked scan against the oracle: outputs, states and every gradient, at every chunk size and option."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from libs.kernels.mimo import MimoState, chunked_layout, mamba3_mimo
from tests.support.mimo import (
    Shape,
    operands,
    random_state,
    relative_error,
    require_grad,
    slice_tokens,
)

FP64 = 1e-11
FP32 = 1e-5  # acceptance figure for fp32 against the oracle


def run(tensors, shape, chunk, backend, *, state=None, cu=None, return_state=True):
    return mamba3_mimo(
        **tensors, chunk_size=chunk, rotary_dim_divisor=shape.divisor, dtype=None, return_state=return_state,
        cu_seqlens=cu, initial_state=state, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 5, 8, 16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_equals_oracle_at_every_chunk_size(chunk: int, dtype: torch.dtype) -> None:
    shape = Shape(B=2, S=75)  # not a multiple of any chunk above 5
    want, want_state = run(operands(shape), shape, chunk, "reference")
    got, got_state = run(operands(shape, dtype), shape, chunk, "chunked")
    tolerance = FP64 if dtype == torch.float64 else FP32
    assert got.dtype == dtype
    assert relative_error(got, want) <= tolerance
    for part, wanted in zip(got_state, want_state, strict=True):
        assert relative_error(part, wanted) <= tolerance


OPTIONS = [
    Shape(G=1, R=1, z=False, d=False),
    Shape(G=2, R=2, divisor=2),
    Shape(G=4, R=4, norm=True),
    Shape(G=1, R=8, divisor=2, norm=True, z=False),
    Shape(G=2, R=4, out=False),
    Shape(G=1, R=2, out=False, norm=True, d=False),
    Shape(B=2, G=4, R=1, out=False, z=False),
]


@pytest.mark.parametrize("shape", OPTIONS, ids=str)
@pytest.mark.parametrize("cu", [None, [0, 3, 8, 20, 21, 37]])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("tile_elements", [2**18, 2**11])  # one tile; several tiles and blocks of heads
def test_every_gradient_equals_oracle(
    shape: Shape, cu: list[int] | None, with_state: bool, tile_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_layout, "TILE_ELEMENTS", tile_elements)
    if cu is not None and shape.B != 1:
        shape = shape._replace(B=1)
    bounds = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    rows = shape.B if cu is None else len(cu) - 1
    results = []
    for backend in ("reference", "chunked"):
        leaves = require_grad(operands(shape))
        state = (
            MimoState(*(p.requires_grad_() for p in random_state(shape, rows, torch.float64))) if with_state else None
        )
        outputs = run(leaves, shape, 8, backend, state=state, cu=bounds, return_state=with_state)
        flat = [outputs[0], *outputs[1]] if with_state else [outputs]
        g = torch.Generator().manual_seed(11)
        weights = [torch.randn(u.shape, generator=g, dtype=torch.float64) for u in flat]
        torch.autograd.backward(sum((u * w).sum() for u, w in zip(flat, weights, strict=True)))
        grads = {name: u.grad for name, u in leaves.items() if u is not None}
        if state is not None:
            grads |= {f"state.{name}": part.grad for name, part in state._asdict().items()}
        results.append((flat, grads))
    (want_out, want), (got_out, got) = results
    for g_part, w_part in zip(got_out, want_out, strict=True):
        assert relative_error(g_part, w_part) <= FP64
    for name, grad in want.items():
        assert grad is not None, name
        assert got[name] is not None, name
        assert relative_error(got[name], grad) <= FP64, name


def test_gradients_in_fp32_meet_the_figure() -> None:
    shape = Shape(S=130, H=4, G=2, R=4, N=32, P=16, norm=True)
    grads = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "chunked")):
        leaves = require_grad(operands(shape, dtype))
        run(leaves, shape, 16, backend, return_state=False).square().sum().backward()
        grads.append({name: u.grad for name, u in leaves.items() if u is not None})
    for name, want in grads[0].items():
        assert relative_error(grads[1][name], want) <= FP32, name


@pytest.mark.parametrize("cu", [None, [0, 2, 5]])
def test_gradcheck(cu: list[int] | None) -> None:
    shape = Shape(B=1, S=5, H=2, G=1, R=2, N=4, P=3, norm=True)
    names = [name for name, u in operands(shape).items() if u is not None]
    bounds = None if cu is None else torch.tensor(cu)

    def function(*tensors: Tensor) -> Tensor:
        given = operands(shape) | dict(zip(names, tensors, strict=True))
        return run(given, shape, 2, "chunked", cu=bounds, return_state=False)

    leaves = [operands(shape)[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-5)


def test_state_carried_over_a_split_at_every_point() -> None:
    shape = Shape(B=2, S=41)
    tensors = operands(shape, torch.float32)
    whole, whole_state = run(tensors, shape, 8, "chunked")
    for cut in range(1, shape.S):
        parts, state = [], None
        for start, end in ((0, cut), (cut, shape.S)):
            out, state = run(slice_tokens(tensors, start, end), shape, 8, "chunked", state=state)
            parts.append(out)
        joined = torch.cat(parts, dim=1)
        if cut % 8 == 0:
            assert torch.equal(joined, whole), f"cut on the chunk grid at {cut} is not bitwise"
            assert all(torch.equal(a, b) for a, b in zip(state, whole_state, strict=True))
        assert relative_error(joined, whole) <= FP32
        for part, wanted in zip(state, whole_state, strict=True):
            assert relative_error(part, wanted) <= FP32


def test_split_on_the_grid_is_bitwise_when_tiles_differ() -> None:
    """Long enough for several tiles, cut where a tile is not: states must not depend on how tiles are laid."""
    shape = Shape(S=1024, H=16, R=4, N=64, P=64)
    tensors = operands(shape, torch.float32)
    whole, whole_state = run(tensors, shape, 16, "chunked")
    parts, state = [], None
    for start, end in ((0, 16), (16, 336), (336, 1024)):
        out, state = run(slice_tokens(tensors, start, end), shape, 16, "chunked", state=state)
        parts.append(out)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert all(torch.equal(a, b) for a, b in zip(state, whole_state, strict=True))


def test_packed_documents_equal_single_runs_and_do_not_leak() -> None:
    shape = Shape(S=50)
    cu = [0, 1, 17, 32, 48, 50]  # starts, ends and crossings of chunks of 16
    bounds = torch.tensor(cu)
    tensors = operands(shape)
    packed, states = run(tensors, shape, 16, "chunked", cu=bounds)
    fused = run(tensors, shape, 16, "chunked", cu=bounds, return_state=False)
    assert relative_error(fused, packed) <= FP64
    for row, (start, end) in enumerate(itertools.pairwise(cu)):
        out, state = run(slice_tokens(tensors, start, end), shape, 16, "reference")
        assert relative_error(fused[:, start:end], out) <= FP64
        for part, wanted in zip(states, state, strict=True):
            assert relative_error(part[row : row + 1], wanted) <= FP64
    changed = {n: u if u is None else u.clone() for n, u in tensors.items()}
    for name in ("Q", "K", "V", "Angles", "Z"):
        changed[name][:, 17:32] += 1.0
    for name in ("ADT", "DT", "Trap"):
        changed[name][..., 17:32] *= 1.5
    other = run(changed, shape, 16, "chunked", cu=bounds, return_state=False)
    assert torch.equal(other[:, :17], fused[:, :17])
    assert torch.equal(other[:, 32:], fused[:, 32:])
    assert not torch.equal(other[:, 17:32], fused[:, 17:32])


def test_checkpointed_and_autocast_runs_equal_the_plain_one() -> None:
    shape = Shape(S=70, norm=True)
    grads = []
    for mode in ("plain", "checkpoint", "autocast"):
        leaves = require_grad(operands(shape, torch.float32))

        def call(leaves=leaves) -> Tensor:
            return run(leaves, shape, 16, "chunked", return_state=False)

        if mode == "checkpoint":
            out = torch.utils.checkpoint.checkpoint(call, use_reentrant=False)
        elif mode == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = call()
        else:
            out = call()
        out.square().sum().backward()
        grads.append([out, *(u.grad for u in leaves.values() if u is not None)])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_checkpointing_keeps_no_scan_state_between_forward_and_backward() -> None:
    """Tensors kept outside autograd's saved tensors would survive the checkpoint; count what is packed."""
    shape = Shape(S=64)
    leaves = require_grad(operands(shape, torch.float32))
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda u: packed.append(u) or u, lambda u: u):
        out = run(leaves, shape, 16, "chunked", return_state=False)
    scan = next(f for f in _graph(out.grad_fn) if f.name() == "_ScanBackward")
    held = [value for value in vars(scan).values() if isinstance(value, Tensor | list)]
    assert packed
    assert not held


def _graph(root):
    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo += [parent for parent, _ in node.next_functions]


def test_bf16_operands_accumulate_in_fp32() -> None:
    shape = Shape(S=70)
    exact = operands(shape, torch.bfloat16)
    want = run(
        {n: None if u is None else u.double() for n, u in exact.items()}, shape, 16, "reference", return_state=False
    )
    got = run(exact, shape, 16, "chunked", return_state=False)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, want) <= 0.01
    full = mamba3_mimo(**exact, chunk_size=16, rotary_dim_divisor=4, dtype=torch.float32, backend="chunked")
    assert relative_error(full, want) <= FP32


def test_deep_decay_and_large_steps_stay_finite() -> None:
    shape = Shape(S=40)
    tensors = operands(shape, torch.float32)
    tensors["DT"] = tensors["DT"] * 400
    tensors["ADT"] = tensors["ADT"] * 400  # exp underflows inside one chunk
    leaves = require_grad(tensors)
    out = run(leaves, shape, 16, "chunked", return_state=False)
    out.sum().backward()
    want = run(
        {n: None if u is None else u.double() for n, u in tensors.items()}, shape, 16, "reference", return_state=False
    )
    assert relative_error(out, want) <= 1e-3  # angles of hundreds of radians per token cost fp32 digits
    assert all(torch.isfinite(u.grad).all() for u in leaves.values() if u is not None)
