"""The mixer against a transcription of MAMBA3.md, one token and one head at a time, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from libs.model import HybridLM
from libs.model.mixer import MambaMixer, a_activation

Build = Callable[..., HybridLM]


def rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def turn(u: Tensor, theta: Tensor, divisor: int) -> Tensor:
    """Rotate one state vector (N,): quarters (0, 2) for divisor 4, halves (i, i + N/2) for divisor 2."""
    u, a = u.clone(), len(theta)
    first, second = slice(0, a), slice(2 * a, 3 * a) if divisor == 4 else slice(a, 2 * a)
    low, high = u[first].clone(), u[second].clone()
    u[first], u[second] = low * theta.cos() - high * theta.sin(), low * theta.sin() + high * theta.cos()
    return u


def by_hand(m: MambaMixer, u_SD: Tensor) -> Tensor:
    """Steps 1 to 5 of the document, written out."""
    c = m.config
    z, x, B, C, dd_dt, dd_a, trap = (u_SD @ m.in_proj.weight.T).split(c.packed_widths, -1)
    angle = u_SD @ m.angle_proj.weight.T
    B, C = (part.view(-1, c.ngroups, c.mimo_rank, c.d_state) for part in (B, C))
    B, C = rms(B, m.B_norm.weight), rms(C, m.C_norm.weight)
    out = torch.zeros(len(u_SD), c.nheads, c.headdim, dtype=u_SD.dtype)
    for head in range(c.nheads):
        group = head // (c.nheads // c.ngroups)
        state = torch.zeros(c.headdim, c.d_state, dtype=u_SD.dtype)
        theta, before = torch.zeros(c.angles, dtype=u_SD.dtype), torch.zeros_like(state)
        for t in range(len(u_SD)):
            dt = torch.nn.functional.softplus(dd_dt[t, head] + m.dt_bias[head])
            decay = a_activation(dd_a[t, head], c.a_activation).clamp(min=c.a_floor)
            alpha, lam = (-decay * dt).exp(), trap[t, head].sigmoid()
            theta = theta + angle[t].tanh() * torch.pi * dt
            xh, zh = (part[t].view(c.nheads, c.headdim)[head] for part in (x, z))
            now = torch.zeros_like(state)
            for r in range(c.mimo_rank):
                key = turn(B[t, group, r] + m.B_bias[head, r], theta, c.rotary_dim_divisor)
                now += torch.outer(xh * m.mimo_x[head, r], key)
            state = alpha * state + (1 - lam) * dt * alpha * before + lam * dt * now
            before = now
            for r in range(c.mimo_rank):
                query = turn(C[t, group, r] + m.C_bias[head, r], theta, c.rotary_dim_divisor)
                y = state @ query + m.D[head] * xh * m.mimo_x[head, r]
                if m.out_norm is not None:
                    y = rms(y, m.out_norm[head])
                out[t, head] += y * torch.nn.functional.silu(zh * m.mimo_z[head, r]) * m.mimo_o[head, r]
    return out.flatten(1) @ m.out_proj.weight.T


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixer__rotary_dim_divisor": 2, "mixer__a_activation": "heavy_tail"},
        {"mixer__ngroups": 2, "mixer__outproj_norm": True},
        {"mixer__ngroups": 4, "mixer__mimo_rank": 1, "mixer__a_floor": 0.5},
    ],
)
def test_equals_the_document(build: Build, changes: dict[str, Any], backend: str) -> None:
    model = build("M", dtype=torch.float64, **changes)
    model.request_backends(mimo=backend)
    mixer = model.blocks[0].layer
    u = torch.randn(1, 19, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = model.pass_context(torch.zeros(1, 19, dtype=torch.long), None)
        torch.testing.assert_close(mixer(u, context)[0], by_hand(mixer, u[0]), rtol=1e-8, atol=1e-8)


def test_a_activations_and_their_gradients() -> None:
    x = torch.tensor([-3.0, -0.5, 0.0, 1.0, 2.5], dtype=torch.float64, requires_grad=True)
    heavy = a_activation(x, "heavy_tail")
    torch.testing.assert_close(heavy, torch.tensor([1 / 4, 1 / 1.5, 1.0, 2.0, 3.5], dtype=torch.float64))
    (slope,) = torch.autograd.grad(heavy.sum(), x)
    torch.testing.assert_close(slope, torch.tensor([1 / 16, 1 / 2.25, 1.0, 1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(a_activation(x, "softplus"), (1 + x.exp()).log())


@pytest.mark.parametrize("which", ["B", "C"])
def test_a_bias_added_before_the_norm_is_caught(build: Build, which: str) -> None:
    """A deliberate mistake: norm(b + bias) instead of norm(b) + bias. The comparison above must not let it through."""
    model = build("M", dtype=torch.float64, mixer__ngroups=4)
    mixer = model.blocks[0].layer
    assert mixer.config.ngroups == mixer.config.nheads, "one group per head, so that the bias fits before the norm"
    u = torch.randn(1, 19, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm, bias = getattr(mixer, f"{which}_norm"), getattr(mixer, f"{which}_bias")
    with torch.no_grad():
        context = model.pass_context(torch.zeros(1, 19, dtype=torch.long), None)
        expected = by_hand(mixer, u[0])
        moved = bias.clone()
        bias.zero_()
        norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] + moved,))
        with pytest.raises(AssertionError, match="Mismatched elements"):
            torch.testing.assert_close(mixer(u, context)[0], expected, rtol=1e-8, atol=1e-8)
