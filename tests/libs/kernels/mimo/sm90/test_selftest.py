"""The self-test of the Hopper kernels, by running their sources on the CPU with gates given by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from libs.kernels.mimo.capabilities import HOPPER, Geometry, compiled_kernels
from libs.kernels.mimo.selftest import SelfTestFailed, SelfTestResult, self_test
from libs.kernels.mimo.sm90 import autograd
from libs.kernels.mimo.sm90.gates import KernelGates
from libs.kernels.mimo.sm90.psiv import POOL

SMALL = Geometry(H=2, G=1, R=2, N=8, P=8, C=4, divisor=4, norm=False)


def _test(gates: KernelGates | None = None, tokens: int | None = None) -> SelfTestResult:
    return self_test(SMALL, HOPPER, torch.device("cpu"), torch.float32, gates or KernelGates(), tokens=tokens)


def test_the_kernels_pass_and_their_builds_are_told() -> None:
    result = _test()
    assert 0 < max(result.errors.values()) < 1e-5
    assert result.gates == {"tma": "off", "warp_specialization": "off", "split_scan": "off", "psiv": "off"}
    before = compiled_kernels(HOPPER)
    assert {"make_forward", "bwd_fwd", "bwd_bwd"} <= {build.kernel for build in before}
    assert before[-1].details["spec"]["N"] == SMALL.N
    _test()
    assert compiled_kernels(HOPPER) == before, "the same call compiled again"
    assert compiled_kernels("chunked") == ()


@pytest.mark.parametrize("name", ["v", "q_bias", "log_decay"])
def test_a_wrong_backward_is_refused_with_the_gates(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = autograd.scan_backward

    def wrong(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        return found._replace(**{name: getattr(found, name) * 1.01})

    monkeypatch.setattr(autograd, "scan_backward", wrong)
    with pytest.raises(SelfTestFailed, match=r"N=8, P=8, C=4.*gates tma=off, .*psiv=off: wrong: ") as caught:
        _test()
    assert {"v": "V", "q_bias": "Q_bias", "log_decay": "ADT"}[name] in caught.value.result.wrong


@pytest.mark.slow
@pytest.mark.parametrize("psiv", ["python_precompute", "gmem_pool", "bwd_fwd_reuse", "bwd_bwd_reuse"])
def test_every_stage_passes_split_and_at_a_length(psiv: Any) -> None:
    """The gates change what is run, not what comes out, and no buffer stays behind."""
    before = POOL.bytes
    result = _test(KernelGates(split_scan="on", psiv=psiv), tokens=23)
    assert POOL.bytes == before
    assert result.against == "chunked"
    assert result.gates["psiv"] == psiv
    assert max(result.errors.values()) < 1e-5
