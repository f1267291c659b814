"""Run by test_liger.py in a process of its own: Triton decides on import whether it interprets."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from libs.kernels.loss import linear_cross_entropy
from libs.kernels.loss.liger_selftest import self_test, self_test_if_asked


def operands(T: int, V: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T)
    hidden_TD = torch.randn(T, D, generator=generator).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator).requires_grad_()
    labels_T = torch.randint(0, V, (T,), generator=generator)
    labels_T[::4] = -100
    return hidden_TD, weight_VD, labels_T


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    return max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True))


def results(backend: str) -> list[Tensor]:
    hidden_TD, weight_VD, labels_T = operands(11, 13, 6)
    nll_T = linear_cross_entropy(hidden_TD, weight_VD, labels_T, backend=backend)
    grads = torch.autograd.grad((nll_T * torch.linspace(-2, 3, 11)).sum(), (hidden_TD, weight_VD))
    return [nll_T.detach(), *grads]


def frozen_hidden(backend: str) -> list[Tensor]:
    hidden_TD, weight_VD, labels_T = operands(11, 13, 6)
    linear_cross_entropy(hidden_TD.detach(), weight_VD, labels_T, backend=backend).square().sum().backward()
    assert weight_VD.grad is not None
    return [weight_VD.grad]


def under_autocast(backend: str) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return results(backend)


def message(**changes: Any) -> str:
    hidden_TD, weight_VD, labels_T = operands(5, 7, 4)
    given = {"hidden_TD": hidden_TD, "weight_VD": weight_VD, "labels_T": labels_T, "backend": "liger"} | changes
    try:
        linear_cross_entropy(**given)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main() -> None:
    asked = self_test_if_asked(torch.device("cpu"))
    found = {
        "self_test": self_test(torch.device("cpu")),
        "asked": None if asked is None else asked.passed,
        "error": worst(results("liger"), results("chunked")),
        "frozen": worst(frozen_hidden("liger"), frozen_hidden("chunked")),
        "autocast": worst(under_autocast("liger"), under_autocast("chunked")),
        "label": message(labels_T=torch.tensor([0, 1, 7, 2, -100])),
        "double": message(hidden_TD=torch.zeros(5, 4).double(), weight_VD=torch.zeros(7, 4).double()),
    }
    print(json.dumps(found))


main()
