"""Operators on the XLA CPU device: the while loop computes what the oracle computes, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch_xla
from torch import Tensor

from libs.kernels.attention import attention
from libs.kernels.attention import choose_backend as choose_attention
from libs.kernels.loss.api import linear_cross_entropy
from libs.kernels.mimo import choose_backend, mamba3_mimo
from tests.support.mimo import Shape, as_fp64, operands, relative_error, require_grad

DEVICE = torch_xla.device()
CU = [0, 3, 8, 20, 21, 37]
Named = dict[str, Tensor | None]


def scan(tensors: Named, shape: Shape, backend: str, cu: list[int] | None) -> dict[str, Tensor]:
    """ "out" and every gradient, on the CPU."""
    leaves = require_grad(tensors)
    out = mamba3_mimo(  # type: ignore[call-overload]
        **leaves, chunk_size=16, rotary_dim_divisor=shape.divisor, dtype=None, backend=backend,
        cu_seqlens=None if cu is None else torch.tensor(cu, dtype=torch.int32),
    )  # fmt: skip
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weight.to(out.device, out.dtype)).sum().backward()
    found = {"out": out.detach()} | {n: u.grad for n, u in leaves.items() if u is not None and u.grad is not None}
    if out.device.type == "xla":
        torch_xla.sync()
    return {name: u.cpu() for name, u in found.items()}


def on_device(tensors: Named) -> Named:
    return {name: None if u is None else u.to(DEVICE) for name, u in tensors.items()}


@pytest.mark.parametrize("backend", ["auto", "xla_loop"])
def test_the_scan_equals_the_oracle_in_fp32(backend: str) -> None:
    assert choose_backend("auto", DEVICE).value == "xla"
    shape = Shape(G=2, R=2, norm=True)
    want = scan(operands(shape), shape, "reference", CU)
    got = scan(on_device(operands(shape, torch.float32)), shape, backend, CU)
    assert got.keys() == want.keys()
    for name, u in want.items():
        assert relative_error(got[name], u) <= 1e-5, name


def test_the_scan_keeps_the_figures_of_bf16() -> None:
    shape = Shape(S=64, H=2, N=64, P=64, R=4)
    low = {n: u.to(torch.bfloat16 if n in ("Q", "K", "V", "Z") else torch.float32) for n, u in operands(shape).items() if u is not None}  # fmt: skip  # noqa: E501
    given: Named = dict(operands(shape)) | low
    want = scan(as_fp64(given), shape, "reference", None)
    got = scan(on_device(given), shape, "xla", None)
    assert relative_error(got.pop("out"), want.pop("out")) <= 0.01
    for name, u in want.items():
        assert relative_error(got[name], u) <= 0.012, name


def test_attention_and_loss_equal_their_references() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 37, heads, 16, generator=generator) for heads in (4, 2, 2))
    hidden, weight = (torch.randn(n, 24, generator=generator) for n in (37, 50))
    labels = torch.randint(0, 50, (37,), generator=generator)
    labels[5] = -100
    assert choose_attention("auto", DEVICE).value == "xla"

    def run(device: torch.device, backend: str) -> list[Tensor]:
        leaves = [u.to(device).requires_grad_() for u in (q, k, v, hidden, weight)]
        out = attention(*leaves[:3], cu_seqlens=CU, backend=backend)
        nll = linear_cross_entropy(*leaves[3:], labels.to(device), backend=backend)
        (out.square().sum() + (nll * torch.arange(37, device=device)).sum()).backward()
        found = [out.detach(), nll.detach(), *(u.grad for u in leaves if u.grad is not None)]
        if device.type == "xla":
            torch_xla.sync()
        return [u.cpu() for u in found]

    for got, want in zip(run(DEVICE, "xla"), run(torch.device("cpu"), "reference"), strict=True):
        assert relative_error(got, want) <= 1e-5


def test_nothing_falls_back_to_the_host() -> None:
    import torch_xla.debug.metrics as met

    assert [name for name in met.counter_names() if name.startswith("aten::") and "_local_scalar" not in name] == []
