# B sequences, S tokens, H heads, G groups, N state, P head width, R rank, A angles, C chunk, F = C*R
"""Operands of the benchmarked scan: its shape, seeded tensors of realistic size, and its matrix FLOPs.

Not for correctness tests of the kernels, which draw their own shapes (tests/libs/kernels/mimo).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_OF_COUNT = 16  # FLOPs are counted at this chunk whatever chunk a contender uses: the work, not the method


class Shape(NamedTuple):
    """The reference shape of MAMBA3.md, at a given sequence length."""

    S: int
    B: int = 1
    H: int = 16
    G: int = 1
    N: int = 64
    P: int = 64
    R: int = 4
    divisor: int = 4

    def describe(self) -> str:
        return f"B={self.B} S={self.S} H={self.H} G={self.G} N={self.N} P={self.P} R={self.R} fp32"


class Operands(NamedTuple):
    """The fourteen tensors of `mamba3_mimo`, in its order."""

    q_BSRGN: Tensor
    k_BSRGN: Tensor
    v_BSHP: Tensor
    adt_BHS: Tensor
    dt_BHS: Tensor
    trap_BHS: Tensor
    q_bias_HRN: Tensor
    k_bias_HRN: Tensor
    mimo_v_HRP: Tensor
    mimo_z_HRP: Tensor
    mimo_out_HRP: Tensor
    angles_BSHA: Tensor
    d_H: Tensor
    z_BSHP: Tensor

    def n_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self)


def make_operands(
    shape: Shape, *, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Operands:
    """Seeded operands in a trained mixer's ranges: q and k of unit RMS, dt in [1e-3, 0.1], A in (-2, 0].

    Drawn in float32 and then converted, so that float64 operands are the same numbers. They are drawn where they
    stay (`device`, default CPU), and every kind of device draws others.
    """
    generator = torch.Generator("cpu" if device is None else device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    batch, seq_len, heads, rank = shape.B, shape.S, shape.H, shape.R
    dt = 10 ** (torch.rand(batch, heads, seq_len, generator=generator, device=device) * 2 - 3)
    adt = -2 * torch.rand(batch, heads, seq_len, generator=generator, device=device) * dt
    return Operands(
        q_BSRGN=normal(batch, seq_len, rank, shape.G, shape.N),
        k_BSRGN=normal(batch, seq_len, rank, shape.G, shape.N),
        v_BSHP=normal(batch, seq_len, heads, shape.P),
        adt_BHS=adt.to(dtype),
        dt_BHS=dt.to(dtype),
        trap_BHS=normal(batch, heads, seq_len),
        q_bias_HRN=1 + 0.1 * normal(heads, rank, shape.N),
        k_bias_HRN=1 + 0.1 * normal(heads, rank, shape.N),
        mimo_v_HRP=(1 + 0.1 * normal(heads, rank, shape.P)) / rank,
        mimo_z_HRP=1 + 0.1 * normal(heads, rank, shape.P),
        mimo_out_HRP=(1 + 0.1 * normal(heads, rank, shape.P)) / rank,
        angles_BSHA=normal(batch, seq_len, heads, shape.N // shape.divisor),
        d_H=1 + 0.1 * normal(heads),
        z_BSHP=normal(batch, seq_len, heads, shape.P),
    )


FLOP_FORMULA = "B*H*(S/C) * (2*F*F*N + 2*F*F*P + 2*F*N*P + 2*F*N*P), F = C*R, C = 16"


def scan_flops(shape: Shape) -> float:
    """Matrix FLOPs of the forward scan at chunk 16; 17.2 GFLOP at the reference shape.

    Per chunk and head, with F = C*R rows: scores Q K^T (2 F F N), scores times X (2 F F P), Q times the
    carried state (2 F N P), and the chunk's own addition to the state K^T X (2 F N P). At N = P = F = 64 all
    four are equal: 4 * 2 * 64^3. Rotation, decay, gate and the sum over ranks are not counted.
    """
    rows = CHUNK_OF_COUNT * shape.R
    per_chunk = 2 * rows * rows * (shape.N + shape.P) + 4 * rows * shape.N * shape.P
    return shape.B * shape.H * (shape.S / CHUNK_OF_COUNT) * per_chunk
