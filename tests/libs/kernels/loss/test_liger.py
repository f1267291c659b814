"""The backend behind fused_linear_ce: refusals, the self-test against wrong versions, and Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from libs.flags import installed
from libs.flags.facts import Facts
from libs.flags.installed import GatesNotInstalled, GateState
from libs.flags.resolve import resolve
from libs.kernels.loss import choose_backend, linear_cross_entropy
from libs.kernels.loss.gates import requested_backend
from libs.kernels.loss.liger import refusal, version_refusal
from libs.kernels.loss.liger_selftest import self_test, self_test_if_asked
from libs.kernels.loss.reference import linear_cross_entropy_reference

CPU = torch.device("cpu")
SCRIPT = Path(__file__).with_name("interpreted_liger.py")
ROOT = Path(__file__).resolve().parents[4]


def _gradients(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in (hidden_TD, weight_VD)]
    with torch.enable_grad():
        nll_T = linear_cross_entropy_reference(leaves[0], leaves[1], labels_T, -100)
        hidden_grad, weight_grad = torch.autograd.grad((nll_T * scale_T).sum(), leaves)
    return hidden_grad.to(hidden_TD.dtype), weight_grad.to(weight_VD.dtype)


def _stand_in(backward: Callable[..., tuple[Tensor | None, Tensor | None]], spoil: float = 0.0) -> Any:
    """An operator with the right losses (plus `spoil`) whose gradients are what `backward` makes of them."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore: int) -> Tensor:
            ctx.save_for_backward(hidden_TD, weight_VD, labels_T)
            return linear_cross_entropy_reference(hidden_TD, weight_VD, labels_T, ignore) + spoil

        @staticmethod
        def backward(ctx: Any, grad_T: Tensor) -> Any:
            return (*backward(*ctx.saved_tensors, grad_T, ctx.needs_input_grad[0]), None, None)

    def operator(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore: int) -> Tensor:
        out: Tensor = Function.apply(hidden_TD, weight_VD, labels_T, ignore)
        return out

    return operator


def right(h: Tensor, w: Tensor, y: Tensor, grad_T: Tensor, _: bool) -> tuple[Tensor | None, Tensor | None]:
    return _gradients(h, w, y, grad_T)


def first_weight_for_all(h: Tensor, w: Tensor, y: Tensor, grad_T: Tensor, _: bool) -> tuple[Tensor | None, ...]:
    """liger-kernel <= 0.8.1: gradients made in forward, then scaled by one element of grad_output."""
    ones = _gradients(h, w, y, torch.ones_like(grad_T))
    return tuple(grad * grad_T[0] for grad in ones)


def rows_right_weight_not(h: Tensor, w: Tensor, y: Tensor, grad_T: Tensor, _: bool) -> tuple[Tensor | None, ...]:
    """The half repair: hidden's gradient is scaled token by token, the sum over tokens cannot be any more."""
    return _gradients(h, w, y, grad_T)[0], _gradients(h, w, y, torch.ones_like(grad_T))[1] * grad_T.mean()


def weight_needs_hidden(h: Tensor, w: Tensor, y: Tensor, grad_T: Tensor, need: bool) -> tuple[Tensor | None, ...]:
    """Every version, without our guard: no gradient of the weight where the hidden states need none."""
    grads = _gradients(h, w, y, grad_T)
    return grads if need else (None, None)


def mean_not_none(h: Tensor, w: Tensor, y: Tensor, grad_T: Tensor, _: bool) -> tuple[Tensor | None, ...]:
    kept = max(1, int((y != -100).sum()))
    return tuple(grad / kept for grad in _gradients(h, w, y, grad_T))


def ignored_labels_count(h: Tensor, w: Tensor, y: Tensor, grad_T: Tensor, _: bool) -> tuple[Tensor | None, ...]:
    return _gradients(h, w, torch.where(y == -100, 0, y), grad_T)


WRONG = [first_weight_for_all, rows_right_weight_not, weight_needs_hidden, mean_not_none, ignored_labels_count]


def test_the_self_test_passes_what_is_right() -> None:
    assert self_test(CPU, _stand_in(right)).passed
    assert self_test(CPU, linear_cross_entropy_reference).passed


@pytest.mark.parametrize("backward", WRONG, ids=lambda f: f.__name__)
def test_the_self_test_catches(backward: Any) -> None:
    found = self_test(CPU, _stand_in(backward))
    assert not found.passed
    assert ".grad" in found.detail


def test_the_self_test_catches_a_wrong_loss_and_a_nan() -> None:
    assert "nll (different weights, float32)" in self_test(CPU, _stand_in(right, spoil=1e-3)).detail
    assert not self_test(CPU, _stand_in(right, spoil=float("nan"))).passed


def test_uniform_weights_would_not_have_caught_it() -> None:
    """Why the weights differ: the version that is wrong for every real loss is right for a plain sum."""
    hidden_TD, weight_VD, labels_T = torch.randn(6, 4), torch.randn(9, 4).requires_grad_(), torch.arange(6)
    got = torch.autograd.grad(_stand_in(first_weight_for_all)(hidden_TD, weight_VD, labels_T, -100).sum(), weight_VD)
    want = torch.autograd.grad(linear_cross_entropy(hidden_TD, weight_VD, labels_T).sum(), weight_VD)
    torch.testing.assert_close(got, want)


def test_never_on_its_own_and_never_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_backend("auto", CPU).value == "chunked"
    assert choose_backend("auto", torch.device("cuda")).value == "chunked"
    with pytest.raises(ValueError, match=r"'liger' cannot run on device 'cpu': Liger's Triton kernels run on cuda"):
        choose_backend("liger", CPU)
    assert refusal("cuda") is None
    assert refusal("meta") is not None


@pytest.mark.parametrize("version", ["0.6.5", "0.8.1", "0.8.2", None])
def test_versions_with_wrong_gradients_are_refused(version: str | None) -> None:
    said = version_refusal(Facts(packages={} if version is None else {"liger-kernel": version}))
    assert said is not None
    assert ">=0.8.3" in said
    assert (version or "not installed") in said
    assert version_refusal(Facts(packages={"liger-kernel": "0.8.3"})) is None


def _install(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr(installed, "_PROCESS", GateState())
    facts = Facts(
        device="cuda", liger_selftest=True, tensor_parallel=1, packages={"liger-kernel": "0.8.5"}
    )  # fmt: skip
    installed.install(resolve({"FATHOM_FUSED_LINEAR_CE": value}, facts))


def test_the_gate_decides_which_backend_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "_PROCESS", GateState())
    with pytest.raises(GatesNotInstalled):
        requested_backend("auto")
    _install(monkeypatch, "off")
    assert requested_backend("auto") == "auto"
    assert requested_backend("reference") == "reference"
    with pytest.raises(ValueError, match="behind a gate: set FATHOM_FUSED_LINEAR_CE=liger"):
        requested_backend("liger")
    _install(monkeypatch, "liger")
    assert requested_backend("auto") == "liger"
    assert requested_backend("liger") == "liger"
    with pytest.raises(ValueError, match="contradicts loss backend 'chunked'"):
        requested_backend("chunked")
    assert installed.exposed("fused_linear_ce")


def test_the_self_test_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FATHOM_FUSED_LINEAR_CE", raising=False)
    assert self_test_if_asked(CPU) is None
    monkeypatch.setenv("FATHOM_FUSED_LINEAR_CE", "liger")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert self_test_if_asked(CPU) is None  # cannot run here; the gate's own preconditions say so


def test_under_tritons_interpreter() -> None:
    """Liger's own kernels on the CPU, against the chunked backend; the installed version must pass the self-test."""
    environ = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "FATHOM_FUSED_LINEAR_CE": "liger",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, SCRIPT], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["self_test"][0], found["self_test"][1]
    assert found["asked"] is True
    assert found["error"] < 1e-5
    assert found["frozen"] < 1e-5
    assert 0 < found["autocast"] < 2e-2
    assert found["label"].startswith("RuntimeError: labels must be in [0, 7) or -100")
    assert "computes in fp32 or less, got torch.float64" in found["double"]
