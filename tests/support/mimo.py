"""Random operands for the Mamba-3 MIMO scan, and the error measure of its acceptance figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from libs.kernels.mimo import MimoState


class Shape(NamedTuple):
    """Letters of `libs.kernels.mimo.shapes`, and the options that change the operand list."""

    B: int = 1
    S: int = 37
    H: int = 4
    G: int = 1
    R: int = 4
    N: int = 16
    P: int = 8
    divisor: int = 4
    z: bool = True
    out: bool = True
    d: bool = True
    norm: bool = False


def operands(shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor | None]:
    """Keyword arguments of `mamba3_mimo` by their public names. dt is about 0.1, decay between 0 and -2 dt."""
    B, S, H, G, R, N, P, divisor = shape[:8]
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    dt = torch.nn.functional.softplus(normal(B, H, S) - 2)
    rate = 2 * torch.rand(H, generator=generator, dtype=torch.float64)[None, :, None]
    tensors: dict[str, Tensor | None] = {
        "Q": normal(B, S, R, G, N) / N**0.5,
        "K": normal(B, S, R, G, N) / N**0.5,
        "V": normal(B, S, H, P),
        "ADT": -dt * rate,
        "DT": dt,
        "Trap": normal(B, H, S),
        "Q_bias": 0.3 * normal(H, R, N),
        "K_bias": 0.3 * normal(H, R, N),
        "MIMO_V": normal(H, R, P),
        "MIMO_Z": normal(H, R, P) if shape.z else None,
        "MIMO_Out": normal(H, R, P) if shape.out else None,
        "Angles": normal(B, S, H, N // divisor),
        "D": normal(H) if shape.d else None,
        "Z": normal(B, S, H, P) if shape.z else None,
        "norm_weight": 1 + 0.1 * normal(H, P) if shape.norm else None,
    }
    return {name: None if u is None else u.to(dtype) for name, u in tensors.items()}


TOKEN_AXIS = {"Q": 1, "K": 1, "V": 1, "Angles": 1, "Z": 1, "ADT": 2, "DT": 2, "Trap": 2}


def slice_tokens(tensors: Mapping[str, Tensor | None], start: int, end: int) -> dict[str, Tensor | None]:
    """The operands of tokens start..end; parameters are passed through."""
    return {
        name: u if u is None or name not in TOKEN_AXIS else u.narrow(TOKEN_AXIS[name], start, end - start)
        for name, u in tensors.items()
    }


def as_fp64(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values in fp64, for the oracle."""
    return {name: None if u is None else u.double() for name, u in tensors.items()}


def require_grad(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Fresh leaves that collect gradients."""
    return {name: None if u is None else u.detach().clone().requires_grad_() for name, u in tensors.items()}


def relative_error(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|, the measure of the acceptance figures. NaN anywhere counts as infinite."""
    difference = (got.double() - want.double()).abs().max()
    if not torch.isfinite(difference):
        return float("inf")
    return float((difference / want.double().abs().max().clamp_min(1e-300)).detach())


def random_state(shape: Shape, rows: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> MimoState:
    """A state of `rows` sequences, with every part different from zero."""
    generator = torch.Generator().manual_seed(seed)
    angles = shape.N // shape.divisor
    sizes = [(rows, shape.H, angles), (rows, shape.H, shape.P, shape.N), (rows, shape.R, shape.H, shape.N)]
    sizes.append((rows, shape.H, shape.P))
    parts = [torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    return MimoState(parts[0].remainder(2 * torch.pi), *parts[1:])
