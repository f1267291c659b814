"""The start-up self-test: it passes what is right, in every precision, and refuses what is wrong by name."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from libs.flags.errors import RunRefused, UserError
from libs.kernels.mimo import chunked, chunked_terms, selftest
from libs.kernels.mimo.capabilities import Geometry
from libs.kernels.mimo.selftest import LIMITS, SelfTestFailed, packed_sequence, random_operands, self_test

CPU = torch.device("cpu")
TINY = Geometry(H=4, G=1, R=2, N=16, P=16, C=8, divisor=4, norm=False)
GROUPED = Geometry(H=4, G=2, R=4, N=16, P=8, C=4, divisor=2, norm=True)
DEMO = Geometry(H=4, G=1, R=4, N=32, P=64, C=16, divisor=4, norm=False)
FOURTEEN = {
    "Q", "K", "V", "ADT", "DT", "Trap", "Q_bias", "K_bias", "MIMO_V", "MIMO_Z", "MIMO_Out", "Angles", "D", "Z",
}  # fmt: skip


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("geometry", [TINY, GROUPED], ids=["tiny", "grouped"])
def test_the_chunked_backend_passes(geometry: Geometry, dtype: torch.dtype) -> None:
    result = self_test(geometry, "chunked", CPU, dtype)
    assert result.errors.keys() == FOURTEEN | {"out"} | ({"norm_weight"} if geometry.norm else set())
    assert not result.wrong
    assert max(result.errors.values()) > 0, "compared with itself, nothing would be tested"
    assert (result.against, result.gates) == ("reference", {})
    assert "right" in result.describe()
    assert "largest relative error" in result.summary()


def test_it_is_quick_at_the_demo_model() -> None:
    start = time.process_time()
    self_test(DEMO, "chunked", CPU, torch.float32)
    assert time.process_time() - start < 2


def test_a_given_length_is_compared_with_chunked_in_fp64() -> None:
    result = self_test(TINY, "chunked", CPU, torch.float32, tokens=70)
    assert (result.against, result.tokens, result.bounds) == ("chunked", 70, (0, 5, 64, 70))
    assert 0 < max(result.errors.values()) < 1e-5


@pytest.mark.parametrize("C", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("tokens", [None, 1, 2, 7, 129])
def test_boundaries_rise_to_the_length(C: int, tokens: int | None) -> None:
    length, bounds = packed_sequence(C, tokens)
    assert bounds[0] == 0
    assert bounds[-1] == length
    assert bounds == sorted(set(bounds))
    if tokens is None:
        assert length % C or C <= 2, "ragged"
        assert any(edge % C for edge in bounds[1:-1]) or C <= 2
        assert any(edge % C == 0 for edge in bounds[1:-1])


def test_slices_of_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    given = random_operands(GROUPED, 11, torch.float64, generator)
    d_out = torch.randn(given["V"].shape, generator=generator, dtype=torch.float64)
    whole = selftest._of_backend("reference", GROUPED, given, [0, 5, 11], d_out, None)
    for at_most in (1, 2):
        per_head = GROUPED.P * GROUPED.N
        monkeypatch.setattr(selftest, "SLICE", {"reference": at_most * per_head})
        sliced = selftest._of_heads("reference", GROUPED, given, [0, 5, 11], d_out)
        assert sliced.keys() == whole.keys()
        for name, u in whole.items():
            assert sliced[name].shape == u.shape, name
            assert torch.allclose(sliced[name], u, rtol=1e-12, atol=1e-12), name


def test_torchs_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    self_test(TINY, "chunked", CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_precision() -> None:
    with pytest.raises(UserError, match=r"torch.float16: known are .*torch.bfloat16"):
        self_test(TINY, "chunked", CPU, torch.float16)


def _weights(patch: pytest.MonkeyPatch, change: Callable[[chunked_terms.Weights], chunked_terms.Weights]) -> None:
    original = chunked.scan_weights
    patch.setattr(chunked, "scan_weights", lambda *a: change(original(*a)))


def no_shift(patch: pytest.MonkeyPatch) -> None:
    _weights(patch, lambda w: w._replace(shift_BcH=torch.zeros_like(w.shift_BcH)))


def slow_decay(patch: pytest.MonkeyPatch) -> None:
    _weights(patch, lambda w: w._replace(log_decay=w.log_decay * 0.8))


def leaking_documents(patch: pytest.MonkeyPatch) -> None:
    original = chunked.document_masks

    def leaky(*args: object) -> chunked_terms.DocumentMasks:
        masks = original(*args)  # type: ignore[arg-type]
        return masks._replace(carry_cC=torch.ones_like(masks.carry_cC), through_c=torch.ones_like(masks.through_c))

    patch.setattr(chunked, "document_masks", leaky)


def _backward(patch: pytest.MonkeyPatch, change: Callable[[list[torch.Tensor | None]], None]) -> None:
    original = chunked._Scan.backward

    def backward(ctx: object, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = list(original(ctx, *grads))
        change(found)
        return tuple(found)

    patch.setattr(chunked._Scan, "backward", staticmethod(backward))


def no_gradient_of_keys(patch: pytest.MonkeyPatch) -> None:
    _backward(patch, lambda found: found.__setitem__(3, None))


def scaled_gradient_of_values(patch: pytest.MonkeyPatch) -> None:
    def scale(found: list[torch.Tensor | None]) -> None:
        assert found[4] is not None
        found[4] = found[4] * 1.02

    _backward(patch, scale)


def one_nan(patch: pytest.MonkeyPatch) -> None:
    original = chunked.finish

    def spoiled(*args: object) -> torch.Tensor:
        y = original(*args)  # type: ignore[arg-type]
        y.view(-1)[3] = float("nan")
        return y

    patch.setattr(chunked, "finish", spoiled)


MISTAKES = {
    "out": [no_shift, slow_decay, leaking_documents, one_nan],
    "K": [no_gradient_of_keys],
    "V": [scaled_gradient_of_values],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "mistake"), [(name, m) for name, mistakes in MISTAKES.items() for m in mistakes])
def test_mistakes_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, mistake: Callable[[pytest.MonkeyPatch], None], dtype: torch.dtype
) -> None:
    mistake(monkeypatch)
    with pytest.raises(SelfTestFailed) as caught:
        self_test(TINY, "chunked", CPU, dtype)
    result, text = caught.value.result, str(caught.value)
    assert isinstance(caught.value, RunRefused)
    assert name in result.wrong
    for part in ("H=4, G=1, R=2, N=16, P=16, C=8", "gates none", f"{name} ", "limit", "remedy"):
        assert part in text
    if mistake in (one_nan, no_gradient_of_keys):
        assert result.errors[name] == float("inf")
