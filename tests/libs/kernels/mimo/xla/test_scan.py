"""The mathematics of the XLA scan, driven by a Python loop on the CPU: outputs, states and every gradient against the
oracle, packed rows, and the precision rules. The while loop itself is tests/tpu."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from libs.kernels.mimo import MimoState, mamba3_mimo
from libs.kernels.mimo.shapes import MimoInputs, check_inputs
from libs.kernels.mimo.xla import body, scan
from libs.kernels.mimo.xla.scan import document_ids, mimo_xla
from tests.support.mimo import Shape, as_fp64, operands, random_state, relative_error, require_grad

FP64, FP32 = 1e-11, 1e-5
OPTIONS = [
    Shape(G=1, R=1, z=False, d=False),
    Shape(G=2, R=2, divisor=2),
    Shape(G=4, R=4, norm=True),
    Shape(G=2, R=4, out=False),
    Shape(B=2, G=4, R=1, out=False, z=False),
]
Named = dict[str, Tensor | None]


def xla(tensors: Named, shape: Shape, chunk: int, *, ids=None, state=None, psiv=False) -> tuple[Tensor, MimoState]:
    given = {name.lower(): u for name, u in tensors.items()}
    inputs = MimoInputs(**given)  # type: ignore[arg-type]
    dims = check_inputs(inputs, shape.divisor)
    return mimo_xla(inputs, dims, chunk, 1e-5, state, ids, driver="loop", psiv=psiv)


def oracle(tensors: Named, shape: Shape, *, cu=None, state=None) -> tuple[Tensor, MimoState]:
    return mamba3_mimo(
        **tensors, chunk_size=1, rotary_dim_divisor=shape.divisor, dtype=None, return_state=True,
        cu_seqlens=None if cu is None else torch.tensor(cu), initial_state=state, backend="reference",
    )  # fmt: skip


def gradients(out: Tensor, state: MimoState | None, leaves: Named) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    parts = [out] if state is None else [out, *state]
    weights = [torch.randn(u.shape, generator=generator, dtype=torch.float64) for u in parts]
    total = sum((u.double() * w).sum() for u, w in zip(parts, weights, strict=True))
    total.backward()
    return {name: u.grad for name, u in leaves.items() if u is not None and u.grad is not None}


@pytest.mark.parametrize("chunk", [1, 5, 8, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_equals_the_oracle_at_every_chunk_size(chunk: int, dtype: torch.dtype) -> None:
    shape = Shape(B=2, S=75)
    want, want_state = oracle(operands(shape), shape)
    got, got_state = xla(operands(shape, dtype), shape, chunk)
    tolerance = FP64 if dtype == torch.float64 else FP32
    assert relative_error(got, want) <= tolerance
    for part, wanted in zip(got_state, want_state, strict=True):
        assert relative_error(part, wanted) <= tolerance


@pytest.mark.parametrize("shape", OPTIONS, ids=str)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("psiv", [False, True])
def test_every_gradient_equals_the_oracle(shape: Shape, with_state: bool, psiv: bool) -> None:
    state = random_state(shape, shape.B) if with_state else None
    found = []
    for run in (oracle, lambda *a, **k: xla(*a, 8, psiv=psiv, **k)):
        leaves = require_grad(operands(shape))
        entering = None if state is None else MimoState(*(u.clone().requires_grad_() for u in state))
        out, final = run(leaves, shape, state=entering)
        grads = gradients(out, final, leaves)
        if entering is not None:
            grads |= {f"state.{name}": u.grad for name, u in entering._asdict().items()}
        found.append(grads)
    want, got = found
    assert got.keys() == want.keys()
    for name, u in want.items():
        assert relative_error(got[name], u) <= 1e-9, name


@pytest.mark.parametrize("chunk", [4, 8, 64])
@pytest.mark.parametrize("shape", [Shape(G=2, R=2), Shape(R=4, norm=True, out=False)], ids=str)
def test_packed_documents_equal_separate_ones(shape: Shape, chunk: int) -> None:
    cu = [0, 3, 8, 20, 21, 37]
    wanted, got = require_grad(operands(shape)), require_grad(operands(shape))
    want = oracle(wanted, shape, cu=cu)[0]
    out = xla(got, shape, chunk, ids=document_ids(cu, shape.S))[0]
    assert relative_error(out, want) <= FP64
    want_grads, got_grads = gradients(want, None, wanted), gradients(out, None, got)
    for name, u in want_grads.items():
        assert relative_error(got_grads[name], u) <= 1e-9, name


def test_several_rows_have_documents_of_their_own() -> None:
    shape = Shape(B=2, S=24)
    tensors = operands(shape)
    rows = ([0, 5, 24], [0, 8, 9, 24])
    ids = torch.cat([document_ids(cu, 24) for cu in rows])
    got = xla(tensors, shape, 8, ids=ids)[0]
    batched = {"Q", "K", "V", "ADT", "DT", "Trap", "Angles", "Z"}
    for row, cu in enumerate(rows):
        alone = {n: u[row : row + 1] if n in batched and u is not None else u for n, u in tensors.items()}
        assert relative_error(got[row : row + 1], oracle(alone, shape, cu=cu)[0]) <= FP64


def test_a_document_does_not_see_its_neighbours() -> None:
    shape = Shape(S=24)
    tensors = operands(shape, torch.float32)
    ids = document_ids([0, 11, 24], 24)
    first = xla(tensors, shape, 8, ids=ids)[0]
    assert tensors["K"] is not None
    tensors["K"][:, :11] = 1e4
    assert torch.equal(xla(tensors, shape, 8, ids=ids)[0][:, 11:], first[:, 11:])


def test_two_calls_with_the_state_equal_one() -> None:
    shape = Shape(S=40)
    tensors = operands(shape)
    whole, final = xla(tensors, shape, 8)
    for cut in (1, 7, 8, 16, 39):
        from tests.support.mimo import slice_tokens

        first, state = xla(slice_tokens(tensors, 0, cut), shape, 8)
        second, last = xla(slice_tokens(tensors, cut, 40), shape, 8, state=state)
        assert relative_error(torch.cat([first, second], dim=1), whole) <= FP64
        for part, wanted in zip(last, final, strict=True):
            assert relative_error(part, wanted) <= FP64


def test_bf16_keeps_the_acceptance_figures() -> None:
    shape = Shape(S=96, H=2, N=64, P=64, R=4)
    tensors = operands(shape)
    low = {n: u.to(torch.bfloat16) if n in ("Q", "K", "V", "Z") and u is not None else u for n, u in tensors.items()}
    low = {n: u.float() if u is not None and u.dtype == torch.float64 else u for n, u in low.items()}
    wanted, got = require_grad(as_fp64(low)), require_grad(low)
    want, out = oracle(wanted, shape)[0], xla(got, shape, 16)[0]
    assert out.dtype == torch.float32
    assert relative_error(out, want) <= 0.01
    want_grads, got_grads = gradients(want, None, wanted), gradients(out, None, got)
    for name, u in want_grads.items():
        assert relative_error(got_grads[name], u) <= 0.012, name


def test_angles_do_not_drift() -> None:
    """64k tokens in fp32: within 1e-3 rad of the fp64 sum on the circle."""
    shape = Shape(S=65_536, H=1, R=1, N=8, P=2, z=False)
    tensors = operands(shape)
    exact = (torch.tanh(tensors["Angles"][0, :, 0]) * torch.pi * tensors["DT"][0, 0, :, None]).sum(0)  # type: ignore[index]
    low = {n: None if u is None else u.float() for n, u in tensors.items()}
    with torch.no_grad():
        angle = xla(low, shape, 64)[1].angle[0, 0].double()
    off = (angle - exact + torch.pi).remainder(2 * torch.pi) - torch.pi
    assert off.abs().max() <= 1e-3


MUTATIONS = {
    "future tokens are seen": ("penalty_BFF", torch.zeros_like),
    "a document inherits the state": ("through_B1", torch.ones_like),
    "a document reads the state": ("carry_B1C", torch.ones_like),
    "an ended document stays in the state": ("leave_B1C", torch.ones_like),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_mask_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, cu = Shape(), [0, 3, 8, 20, 21, 37]
    tensors = operands(shape)
    want = oracle(tensors, shape, cu=cu)[0]
    part, mutate = MUTATIONS[name]
    right = body._masks

    def wrong(chunk: body.ChunkInputs, ranks: int) -> body._Masks:
        masks = right(chunk, ranks)
        return masks._replace(**{part: mutate(getattr(masks, part))})

    monkeypatch.setattr(body, "_masks", wrong)
    assert relative_error(xla(tensors, shape, 8, ids=document_ids(cu, shape.S))[0], want) > 1e-6


def test_a_running_sum_over_documents_is_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that run on over the end of a document turn the last one's angle; its queries and keys turn alike."""
    shape, cu = Shape(), [0, 3, 8, 20, 21, 37]
    tensors = operands(shape)
    want = oracle(tensors, shape, cu=cu)[1].angle[-1:]

    def off() -> Tensor:
        angle = xla(tensors, shape, 8, ids=document_ids(cu, shape.S))[1].angle
        return ((angle - want + torch.pi).remainder(2 * torch.pi) - torch.pi).abs().max()

    assert off() <= FP64
    right = scan.running_sum
    monkeypatch.setattr(scan, "running_sum", lambda u, documents: right(u, None))
    assert off() > 1e-3


@pytest.mark.parametrize("C", [1, 2, 5, 8, 13])
def test_a_running_sum_is_that_of_each_document(C: int) -> None:
    """By hand, one token after the other; what is not a number in one document reaches no other."""
    u = torch.randn(3, 2, C, dtype=torch.float64, generator=torch.Generator().manual_seed(C))
    documents = torch.randint(0, 2, (3, 1, C), generator=torch.Generator().manual_seed(C)).cumsum(-1)
    want = torch.zeros_like(u)
    for row, t in itertools.product(range(3), range(C)):
        first = next(s for s in range(C) if documents[row, 0, s] == documents[row, 0, t])
        want[row, :, t] = u[row, :, first : t + 1].sum(-1)
    assert torch.allclose(body.running_sum(u, documents), want, rtol=0, atol=1e-13)
    first = documents[0, 0] == documents[0, 0, 0]
    u[0][:, first] = torch.nan
    summed = body.running_sum(u, documents)[0]
    assert summed[:, first].isnan().all()
    assert not summed[:, ~first].isnan().any()


def test_backends_say_where_they_run() -> None:
    shape = Shape()
    for name in ("xla", "xla_loop"):
        with pytest.raises(ValueError, match="it is a loop for XLA devices"):
            mamba3_mimo(**operands(shape), chunk_size=8, rotary_dim_divisor=4, dtype=None, backend=name)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="document_ids are for the XLA backends"):
        mamba3_mimo(  # type: ignore[call-overload]
            **operands(shape), chunk_size=8, rotary_dim_divisor=4, dtype=None, document_ids=torch.zeros(1, shape.S)
        )


def test_bounds_and_ids_agree() -> None:
    for bounds in ([0, 7], [0, 1, 7], [0, 3, 4, 7]):
        ids = document_ids(bounds, 7)[0]
        for number, (a, b) in enumerate(itertools.pairwise(bounds)):
            assert (ids[a:b] == number).all()
