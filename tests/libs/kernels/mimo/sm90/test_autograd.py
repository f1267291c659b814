"""The custom op and its entry, on the CPU: everything torch may do with them, against the oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from libs.kernels.mimo import api, choose_backend, mamba3_mimo, shapes
from libs.kernels.mimo.sm90 import autograd
from libs.kernels.mimo.sm90.dialect import CpuDialect
from libs.kernels.mimo.sm90.gates import KernelGates
from libs.kernels.mimo.sm90.launch import compiled
from tests.libs.kernels.mimo.sm90.bwd_cases import FP64, Question, errors
from tests.libs.kernels.mimo.sm90.scan_case import call_kernels
from tests.support.mimo import Shape, operands, random_state, relative_error, require_grad, slice_tokens

# The shapes of the backward tests, so that kernels are built once.
FULL = Shape(B=2, S=11, H=2, R=2, N=8, P=4, norm=True)
PACKED = Shape(B=1, S=27, H=2, R=2, N=8, P=4, norm=True)
DOCUMENTS = (0, 1, 3, 9, 16, 21, 27)
CHUNK = 4


def test_outputs_and_all_four_state_parts_equal_the_oracle() -> None:
    tensors, state = operands(FULL), random_state(FULL, FULL.B)
    out, final = call_kernels(tensors, FULL, CHUNK, None, state)
    want, want_final = _oracle(tensors, FULL, state=state)
    assert relative_error(out, want) <= 1e-12
    assert all(relative_error(a, b) <= 1e-12 for a, b in zip(final, want_final, strict=True))


def _oracle(tensors, shape: Shape, cu=None, state=None):
    return mamba3_mimo(
        **tensors, chunk_size=CHUNK, rotary_dim_divisor=shape.divisor, dtype=None, return_state=True,
        cu_seqlens=None if cu is None else torch.tensor(cu), initial_state=state, backend="reference",
    )  # fmt: skip


@pytest.mark.parametrize("as_tensor", [False, True])
def test_documents_with_a_state_each(as_tensor: bool) -> None:
    """In and out, per document; boundaries as numbers or as a tensor."""
    tensors, state = operands(PACKED), random_state(PACKED, len(DOCUMENTS) - 1)
    bounds = torch.tensor(DOCUMENTS) if as_tensor else list(DOCUMENTS)
    out, final = call_kernels(tensors, PACKED, CHUNK, bounds, state, return_state=True)
    want, want_final = _oracle(tensors, PACKED, DOCUMENTS, state)
    assert relative_error(out, want) <= 1e-12
    assert all(relative_error(a, b) <= 1e-12 for a, b in zip(final, want_final, strict=True))


def test_gradients_with_a_state_per_document() -> None:
    found = errors(Question(PACKED, CHUNK, DOCUMENTS, with_state=True), CpuDialect("float64"))
    assert len(found) == 19
    assert max(found.values()) <= FP64, found


def test_a_state_carried_over_the_chunk_grid() -> None:
    """Equal to the call in one; the angle bit for bit."""
    shape = FULL._replace(S=16)
    tensors = operands(shape)
    whole, end = call_kernels(tensors, shape, CHUNK)
    first, state = call_kernels(slice_tokens(tensors, 0, 8), shape._replace(S=8), CHUNK)
    second, last = call_kernels(slice_tokens(tensors, 8, 16), shape._replace(S=8), CHUNK, None, state)
    assert torch.equal(end.angle, last.angle)
    assert relative_error(torch.cat([first, second], 1), whole) <= 1e-12
    assert all(relative_error(a, b) <= 1e-12 for a, b in zip(last, end, strict=True))


def _checkpointed(call) -> Tensor:
    return torch.utils.checkpoint.checkpoint(call, use_reentrant=False)


def _grads(run, dtype: torch.dtype = torch.float64, **options) -> list[Tensor]:
    leaves = require_grad(operands(FULL, dtype))
    out = run(lambda: call_kernels(leaves, FULL, CHUNK, **options)[0])
    out.square().sum().backward()
    return [out.detach(), *(u.grad for u in leaves.values() if u is not None)]


@pytest.mark.parametrize("stage", ["off", "python_precompute", "bwd_bwd_reuse"])
def test_checkpointed_and_compiled_runs_equal_the_plain_one(stage: str) -> None:
    """Bit for bit, non-reentrant; compiled without a graph break."""
    gates = KernelGates(psiv=stage)
    plain = _grads(lambda call: call(), gates=gates)
    again = _grads(_checkpointed, gates=gates)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    compiled = _grads(lambda call: torch.compile(call, fullgraph=True, backend="aot_eager")(), gates=gates)
    assert all(relative_error(b, a) <= 1e-14 for a, b in zip(plain, compiled, strict=True))


def test_compiled_with_documents_from_a_tensor_does_not_compile_again() -> None:
    calls = []

    def backend(graph, example):
        calls.append(graph)
        return graph.forward

    tensors = operands(PACKED)
    compiled = torch.compile(
        lambda bounds: call_kernels(tensors, PACKED, CHUNK, bounds)[0], fullgraph=True, backend=backend
    )
    for cu in (DOCUMENTS, (0, 2, 4, 11, 15, 20, 27)):
        got = compiled(torch.tensor(cu))
        assert relative_error(got, _oracle(tensors, PACKED, cu)[0]) <= 1e-12
    assert len(calls) == 1


def test_the_op_passes_the_checks_of_torch() -> None:
    """Schema, fake kernels, autograd registration and tracing."""
    seen: list[tuple] = []
    original = autograd._scan_op

    def spy(*arguments):
        seen.append(arguments)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "_scan_op", spy)
        call_kernels(operands(FULL), FULL, CHUNK, gates=KernelGates(psiv="python_precompute"))
    arguments = tuple(u.requires_grad_() if isinstance(u, Tensor) else u for u in seen[0])
    torch.library.opcheck(
        original, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_saved_tensors_are_read_once() -> None:
    """Under activation checkpointing every read would run the forward again."""
    runs = 0
    original = autograd.scan_forward

    def counting(*arguments):
        nonlocal runs
        runs += 1
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "scan_forward", counting)
        _grads(_checkpointed)
    assert runs == 2


def test_other_lengths_and_batches_build_nothing_new() -> None:
    """A document of any length in evaluation, a last batch of another size."""
    _grads(lambda call: call())
    before = compiled()
    for shape in (FULL._replace(S=5), FULL._replace(S=30, B=1)):
        found = errors(Question(shape, CHUNK), CpuDialect("float64"))
        assert max(found.values()) <= FP64, found
    assert compiled() == before


def test_only_one_output_used() -> None:
    """A gradient that arrives at the final state alone, or at the output alone."""
    for part in (0, 1):
        grads = []
        for run in (lambda t: call_kernels(t, FULL, CHUNK), lambda t: _oracle(t, FULL)):
            leaves = require_grad(operands(FULL))
            result = run(leaves)
            (result[0] if part == 0 else result[1].ssm).square().sum().backward()
            grads.append({n: u.grad for n, u in leaves.items() if u is not None and u.grad is not None})
        assert all(relative_error(grads[0][n], u) <= FP64 for n, u in grads[1].items() if u.abs().max() > 0)


@pytest.mark.parametrize(("split", "batch_heads", "want"), [
    ("off", 16, 1), ("auto", 16, 9), ("auto", 128, 2), ("auto", 132, 1), ("auto", 1, 132), ("on", 132, 2),
    ("on", 16, 9), ("on", 400, 2),
])  # fmt: skip
def test_how_often_a_sequence_is_split(split: str, batch_heads: int, want: int) -> None:
    """The smallest count that gives each of 132 multiprocessors a block."""
    assert autograd.plan_splits(split, batch_heads, 132) == want


@pytest.mark.parametrize("cu", [None, DOCUMENTS])
def test_split_auto_pads_to_whole_splits(cu: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 chunks on 8 multiprocessors with 2 blocks: 4 splits of 2 chunks, one of them empty."""
    monkeypatch.setattr(autograd, "MULTIPROCESSORS", 8)
    asked = []
    original = autograd.plan_splits
    monkeypatch.setattr(autograd, "plan_splits", lambda *a: asked.append(original(*a)) or asked[-1])
    tensors = operands(PACKED)
    out, final = call_kernels(tensors, PACKED, CHUNK, cu and list(cu), gates=KernelGates(split_scan="auto"))
    want, want_final = _oracle(tensors, PACKED, cu)
    assert asked == [4]
    assert relative_error(out, want) <= 1e-12
    assert relative_error(final.ssm, want_final.ssm[-1:]) <= 1e-12


def test_a_changed_document_leaves_every_bit_of_the_others() -> None:
    """Forward, with every per-token input of one document changed."""
    tensors = operands(PACKED)
    plain = call_kernels(tensors, PACKED, CHUNK, list(DOCUMENTS))[0]
    changed = {n: u if u is None else u.clone() for n, u in tensors.items()}
    for name in ("Q", "K", "V", "Angles", "Z"):
        changed[name][:, 9:16] += 1.0
    for name in ("ADT", "DT", "Trap"):
        changed[name][..., 9:16] *= 1.5
    other = call_kernels(changed, PACKED, CHUNK, list(DOCUMENTS))[0]
    same = [torch.equal(plain[:, a:b], other[:, a:b]) for a, b in itertools.pairwise(DOCUMENTS)]
    assert same == [a != 9 for a, _ in itertools.pairwise(DOCUMENTS)]


@pytest.fixture
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public entry, allowed to take the kernels here."""
    monkeypatch.setattr(api, "BACKENDS", {**api.BACKENDS, "tilelang": lambda device_type: None})
    monkeypatch.setattr(autograd.KernelGates, "from_installed", classmethod(lambda cls: cls()))


def _public(tensors, cu=None, **options):
    return mamba3_mimo(
        **tensors, chunk_size=CHUNK, rotary_dim_divisor=4, dtype=None, cu_seqlens=cu, backend="tilelang", **options
    )


@pytest.mark.usefixtures("_on_the_cpu")
def test_the_public_entry_in_every_mode() -> None:
    """Plain, with documents, with a state per document, and compiled with documents."""
    tensors, cu = operands(PACKED), torch.tensor(DOCUMENTS, dtype=torch.int32)
    want, states = _oracle(tensors, PACKED, DOCUMENTS)
    assert relative_error(_public(operands(FULL)), _oracle(operands(FULL), FULL)[0]) <= 1e-12
    assert relative_error(_public(tensors, cu), want) <= 1e-12
    out, final = _public(tensors, cu, return_state=True)
    assert relative_error(out, want) <= 1e-12
    assert all(relative_error(a, b) <= 1e-12 for a, b in zip(final, states, strict=True))
    compiled = torch.compile(lambda bounds: _public(tensors, bounds), fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(cu), want) <= 1e-12
    with pytest.raises(ValueError, match="cu_seqlens must rise strictly from 0 to S=27"):
        compiled(torch.tensor([0, 9, 3, 16, 21, 26, 27], dtype=torch.int32))


@pytest.mark.usefixtures("_on_the_cpu")
def test_boundaries_are_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again when they change in place."""
    reads = []
    original = shapes._rising
    monkeypatch.setattr(shapes, "_rising", lambda *a: reads.append(a) or original(*a))
    tensors, cu = operands(PACKED), torch.tensor(DOCUMENTS, dtype=torch.int32)
    for _ in range(3):
        _public(tensors, cu)
    assert len(reads) == 1
    cu[1] = 27
    with pytest.raises(ValueError, match="rise strictly"):
        _public(tensors, cu)


def test_the_backend_refuses_what_is_no_hopper_gpu() -> None:
    assert choose_backend("auto", "cpu").value == "chunked"
    with pytest.raises(ValueError, match="'tilelang' cannot run on device 'cpu': its kernels are for Hopper GPUs"):
        mamba3_mimo(**operands(FULL), chunk_size=4, rotary_dim_divisor=4, dtype=None, backend="tilelang")
