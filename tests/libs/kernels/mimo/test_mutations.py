"""Deliberate mistakes in the scan, one at a time: each must be caught by a comparison with the oracle.

If a mutant survives, the comparison is too loose to trust. The unmutated code passes the same comparisons.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from libs.kernels.mimo import chunked, chunked_grad, chunked_layout, chunked_terms, mamba3_mimo
from tests.support.mimo import Shape, as_fp64, operands, relative_error, require_grad

Patch = Callable[[pytest.MonkeyPatch], None]


def _weights(monkeypatch: pytest.MonkeyPatch, change) -> None:
    original = chunked.scan_weights
    monkeypatch.setattr(chunked, "scan_weights", lambda *a: change(original(*a)))


def dropped_shifted_term(monkeypatch: pytest.MonkeyPatch) -> None:
    _weights(monkeypatch, lambda w: w._replace(later=w.gamma, shift_BcH=torch.zeros_like(w.shift_BcH)))


def shifted_term_lost_between_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    _weights(monkeypatch, lambda w: w._replace(shift_BcH=torch.zeros_like(w.shift_BcH)))


def missing_diagonal_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    _weights(monkeypatch, lambda w: w._replace(gamma=w.later))


def unwrapped_angle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_terms, "TWO_PI", 1e30)


def state_not_reset_at_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    original = chunked.document_masks

    def leaky(*args):
        masks = original(*args)
        return masks._replace(carry_cC=torch.ones_like(masks.carry_cC), through_c=torch.ones_like(masks.through_c))

    monkeypatch.setattr(chunked, "document_masks", leaky)


def last_key_of_a_document_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    original = chunked.document_masks
    monkeypatch.setattr(
        chunked, "document_masks", lambda *a: original(*a)._replace(leave_cC=torch.ones_like(original(*a).leave_cC))
    )


def bias_after_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    original = chunked.project

    def late(tile, params, divisor, scratch):
        bias = params.qk_bias_2hNRC
        proj = original(tile, params._replace(qk_bias_2hNRC=torch.zeros_like(bias)), divisor, scratch)
        q_bias, k_bias = (part.flatten(2).repeat(tile.v_chCP.shape[0], 1, 1) for part in bias)
        return proj._replace(q_xNF=proj.q_xNF + q_bias, k_xNF=proj.k_xNF + k_bias)

    monkeypatch.setattr(chunked, "project", late)


def skip_weight_forgotten_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    original = chunked_grad.weigh
    monkeypatch.setattr(chunked_grad, "weigh", lambda s, w, p, scratch: original(s, w, p._replace(d_h=None), scratch))


def carried_gradient_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    original = chunked.tile_backward
    monkeypatch.setattr(chunked, "tile_backward", lambda d_out, d_next, *a: original(d_out, d_next * 0, *a))


def verdict() -> None:
    """The comparison that must notice: outputs, state and gradients in fp32, packed documents, a long angle."""
    shape = Shape(S=600, H=3, R=2, N=8, P=4)
    tensors = operands(shape, torch.float32)
    options = {"chunk_size": 16, "rotary_dim_divisor": 4, "dtype": None}
    for cu in (None, torch.tensor([0, 5, 21, 48, 300, 600])):
        leaves = require_grad(tensors)
        exact = require_grad(as_fp64(tensors))
        got = mamba3_mimo(**leaves, **options, cu_seqlens=cu, backend="chunked")
        want = mamba3_mimo(**exact, **options, cu_seqlens=cu, backend="reference")
        assert relative_error(got, want) <= 3e-5
        got.square().sum().backward()
        want.square().sum().backward()
        for name, leaf in leaves.items():
            if leaf is not None:
                assert relative_error(leaf.grad, exact[name].grad) <= 1e-4, name
    _, state = mamba3_mimo(**tensors, **options, return_state=True, backend="chunked")
    assert state.angle.min() >= 0
    assert state.angle.max() <= 2 * torch.pi


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and blocks of heads even at this size."""
    monkeypatch.setattr(chunked_layout, "TILE_ELEMENTS", 2**11)


def test_the_unmutated_scan_passes() -> None:
    verdict()


@pytest.mark.parametrize(
    "mutant",
    [
        dropped_shifted_term,
        shifted_term_lost_between_chunks,
        missing_diagonal_correction,
        unwrapped_angle,
        state_not_reset_at_a_document,
        last_key_of_a_document_kept,
        bias_after_rotation,
        skip_weight_forgotten_in_backward,
        carried_gradient_dropped,
    ],
)
def test_each_mutant_is_caught(mutant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        verdict()
