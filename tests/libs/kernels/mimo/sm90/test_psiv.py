"""The stages of the PsiV cache: each changes what it says, and the pool never lets two steps share a buffer."""

from __future__ import annotations

import pytest
import torch

from libs.kernels.mimo.sm90 import bwd_launch, forward, psiv
from libs.kernels.mimo.sm90.dialect import CpuDialect
from libs.kernels.mimo.sm90.gates import KernelGates, Psiv
from libs.kernels.mimo.sm90.launch import launch
from tests.libs.kernels.mimo.sm90.bwd_cases import FP64, Question, errors
from tests.libs.kernels.mimo.sm90.scan_case import call_kernels
from tests.support.mimo import Shape, operands, require_grad

FULL = Shape(B=2, S=11, H=2, R=2, N=8, P=4, norm=True)  # of the other tests, so that kernels are built once
CHUNK = 4
# What the forward does with PsiV, and whether each backward kernel reads it.
WANT = {
    "off": ("compute", False, False),
    "python_precompute": ("read", True, True),
    "gmem_pool": ("write", False, False),
    "bwd_fwd_reuse": ("write", True, False),
    "bwd_bwd_reuse": ("write", True, True),
}


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> psiv.PsivPool:
    """A pool of the test's own, poisoned."""
    made = psiv.PsivPool(poison=True)
    monkeypatch.setattr(psiv, "POOL", made)
    return made


def _forward(leaves, stage: Psiv):
    return call_kernels(leaves, FULL, CHUNK, gates=KernelGates(psiv=stage))[0]


@pytest.mark.parametrize("stage", psiv.STAGES)
def test_every_gradient_equals_the_oracle(stage: Psiv) -> None:
    found = errors(Question(FULL, CHUNK, with_state=True), CpuDialect("float64"), gates=KernelGates(psiv=stage))
    assert max(found.values()) <= FP64, found


@pytest.mark.parametrize("stage", WANT)
def test_each_stage_runs_the_variants_it_names(stage: Psiv, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a variant that reads PsiV has no product of v and psi left in its text."""
    ran = {}

    def spy(make, spec, mode, tensors) -> None:
        ran[make.__name__] = (spec, str(make(CpuDialect("float64"), spec).script()))
        launch(make, spec, mode, tensors)

    monkeypatch.setattr(forward, "launch", spy)
    monkeypatch.setattr(bwd_launch, "launch", spy)
    _forward(require_grad(operands(FULL)), stage).sum().backward()
    specs = {name: spec for name, (spec, _) in ran.items()}
    assert (specs["make_forward"].psiv, specs["bwd_fwd"].reads_x, specs["bwd_bwd"].reads_x) == WANT[stage]
    text = {name: script for name, (_, script) in ran.items()}
    assert ("psi[" in text["make_forward"]) == (stage != "python_precompute")
    assert ("psi[" in text["bwd_fwd"]) == (not specs["bwd_fwd"].reads_x)


@pytest.mark.parametrize(("stage", "spoilt"), [
    ("gmem_pool", set()), ("bwd_fwd_reuse", {"Q", "K"}), ("bwd_bwd_reuse", {"Q", "K"}),
])  # fmt: skip
def test_the_kernels_that_reuse_read_the_buffer(stage: Psiv, spoilt: set[str], pool: psiv.PsivPool) -> None:
    """NaN put there between forward and backward reaches their gradients, and only theirs. (K is behind both: bwd_fwd
    recomputes the states that bwd_bwd goes on with.)"""
    leaves = require_grad(operands(FULL))
    out = _forward(leaves, stage)
    (slot,) = pool._slots.values()
    assert torch.isfinite(slot.buffer).all(), "the forward has written all of it over the poison"
    slot.buffer.data.fill_(float("nan"))
    out.sum().backward()
    assert {name for name in ("Q", "K") if leaves[name].grad.isnan().any()} == spoilt


def test_the_address_is_the_same_in_every_step(pool: psiv.PsivPool) -> None:
    """Per layer, and never that of another layer."""
    layers = [require_grad(operands(FULL, seed=seed)) for seed in (0, 1)]
    addresses = []
    for _ in range(3):
        for leaves in layers:
            _forward(leaves, "bwd_bwd_reuse").sum().backward()
        addresses.append([slot.buffer.data_ptr() for slot in pool._slots.values()])
    assert addresses[0] == addresses[1] == addresses[2]
    assert len(set(addresses[0])) == 2
    rows = 12 * FULL.R  # padded to whole chunks
    assert pool.bytes == 2 * FULL.B * FULL.H * rows * FULL.P * 8


def test_a_buffer_handed_out_again_before_its_backward_is_refused() -> None:
    """Two forwards of one layer in flight; the second one's own backward is fine."""
    leaves = require_grad(operands(FULL))
    first, second = _forward(leaves, "gmem_pool"), _forward(leaves, "gmem_pool")
    second.sum().backward()
    with pytest.raises(RuntimeError, match=r"generation 2\) before the backward of generation 1"):
        first.sum().backward()


def test_without_gradients_nothing_is_kept(pool: psiv.PsivPool) -> None:
    with torch.no_grad():
        _forward(operands(FULL), "bwd_bwd_reuse")
    assert pool.bytes == 0


def test_a_new_shape_takes_the_old_ones_place(pool: psiv.PsivPool) -> None:
    """And ends the lease of the old one."""
    psi = torch.ones(2, 2, 4)
    old, first = pool.lease(psi, (4,), torch.float32)
    new, second = pool.lease(psi, (8,), torch.float32)
    assert (old.shape, new.shape, pool.bytes) == ((4,), (8,), 32)
    with pytest.raises(RuntimeError, match="handed out again"):
        pool.require(psi, first)
    pool.require(psi, second)


def test_weights_without_an_address_of_their_own_are_noticed() -> None:
    """A weight cast in every step would take a new buffer in every step."""
    pool, weights = psiv.PsivPool(limit=2), [torch.ones(1) for _ in range(3)]
    for psi in weights[:2]:
        pool.lease(psi, (4,), torch.float32)
    with pytest.raises(AssertionError, match="give the parameter itself"):
        pool.lease(weights[2], (4,), torch.float32)


def test_the_buffers_of_a_model_that_is_gone_go_with_it(pool: psiv.PsivPool) -> None:
    """But not those of one whose backward is still to come."""
    kept = require_grad(operands(FULL, seed=0))
    _forward(kept, "gmem_pool").sum().backward()
    one_layer = pool.bytes
    leaves = require_grad(operands(FULL, seed=1))
    pending = _forward(leaves, "gmem_pool")
    del leaves
    assert pool.bytes == 2 * one_layer
    pending.sum().backward()
    del pending
    assert pool.bytes == one_layer
    _forward(kept, "gmem_pool").sum().backward()


def test_a_new_weight_at_an_old_address_has_a_buffer_of_its_own() -> None:
    pool, old, new = psiv.PsivPool(), torch.ones(8), torch.ones(8)
    pool.lease(old, (4,), torch.float32)
    (slot,) = pool._slots.values()
    del old
    pool._slots = {(new.data_ptr(), new.device): slot}  # as if the allocator had put the new one there
    buffer, generation = pool.lease(new, (4,), torch.float32)
    assert buffer is not slot.buffer
    assert (generation, len(pool._slots)) == (1, 1)
