"""What a scan kernel is compiled for, and how torch operands become its arguments.

Not the choice of tiles and stages: that is `tiles.py`.
"""
# B sequences  S tokens, whole chunks  H heads  G groups  R rank  N state  P head width  A rotary angles
# C tokens of a chunk  F = C*R rows of a chunk, token-major: row t*R + r

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnF

from libs.kernels.mimo.chunked_layout import Layout, Operands


class ScanSpec(NamedTuple):
    """One compiled variant. `splits` parts of the sequence run side by side; `psiv`: "compute" PsiV, "read" it, or
    compute and "write" it. The last three change resources: pipeline stages, resident blocks asked for, and whether
    weighted PsiV and then y take the place of PsiV in shared memory (y is then rounded before gate and rank sum)."""

    B: int
    S: int
    H: int
    G: int
    R: int
    N: int
    P: int
    C: int
    divisor: int = 4
    z: bool = True
    out: bool = True
    d: bool = True
    norm: bool = False
    packed: bool = False
    norm_eps: float = 1e-5
    splits: int = 1
    psiv: str = "compute"
    stages: int = 2
    min_blocks: int = 0
    share_x: bool = False

    @property
    def F(self) -> int:
        """Rows of a chunk."""
        return self.C * self.R

    @property
    def A(self) -> int:
        """Rotary angles."""
        return self.N // self.divisor

    @property
    def chunks(self) -> int:
        """Chunks of the whole sequence."""
        return self.S // self.C

    @property
    def per_split(self) -> int:
        """Chunks of one split."""
        assert self.chunks % self.splits == 0, f"{self.chunks} chunks do not divide into {self.splits} splits"
        return self.chunks // self.splits

    @property
    def second(self) -> int:
        """Where the second channels of the rotated pairs start: quarter 2, or half."""
        return self.N // 2


class ScanArguments(NamedTuple):
    """Kernel arguments by name; what an option switches off is a single element that no kernel reads.

    Attributes:
        q_BLGN, k_BLGN: (B, S*R, G, N), before bias and rotation.
        v_BSHP, z_BSHP: values and gates.
        psi_HRP, zeta_HRP, phi_HRP, q_bias_HRN, k_bias_HRN, d_H, norm_HP: parameters, in the accumulation dtype.
        log_decay_BHS: running sum of A*dt inside the chunk and document, up to and with the token.
        gamma_BHS: weight of a token on its own output.
        later_BHS: its weight on all later ones. A chunk's last token has no later one inside the chunk, so its entry
            is free to be its whole weight on the state: gamma plus the shifted term.
        theta_BSHA: wrapped angles.
        doc_S, before_S: document of the token, and the one in force just before the token's chunk (int32).
    """

    q_BLGN: Tensor
    k_BLGN: Tensor
    v_BSHP: Tensor
    z_BSHP: Tensor
    psi_HRP: Tensor
    zeta_HRP: Tensor
    phi_HRP: Tensor
    q_bias_HRN: Tensor
    k_bias_HRN: Tensor
    d_H: Tensor
    norm_HP: Tensor
    log_decay_BHS: Tensor
    gamma_BHS: Tensor
    later_BHS: Tensor
    theta_BSHA: Tensor
    doc_S: Tensor
    before_S: Tensor


def scan_spec(op: Operands, layout: Layout, packed: bool) -> ScanSpec:
    """The variant for one call, with the defaults for everything that does not change the result."""
    dims = layout.dims
    return ScanSpec(
        dims.B, layout.chunks * layout.C, dims.H, dims.G, dims.R, dims.N, dims.P, layout.C, layout.divisor,
        z=op.z is not None, out=op.mimo_out is not None, d=op.d is not None, norm=op.norm_weight is not None,
        packed=packed, norm_eps=layout.norm_eps,
    )  # fmt: skip


def scan_arguments(
    op: Operands, layout: Layout, bounds: list[int] | None, low: torch.dtype, acc: torch.dtype
) -> ScanArguments:
    """Operands of the chunked scan as kernel arguments: padded to whole chunks, `low` for the large ones.

    Padding is zero and has zero weight everywhere, so kernels know nothing of ragged sequences.
    """
    dims, C, chunks = layout.dims, layout.C, layout.chunks
    S = chunks * C

    def tokens(u: Tensor | None, dtype: torch.dtype) -> Tensor:
        if u is None:
            return torch.zeros(1, 1, 1, 1, dtype=dtype, device=op.v.device)
        return nnF.pad(u.to(dtype), [0, 0] * (u.dim() - 2) + [0, S - u.shape[1]]).contiguous()

    def parameter(u: Tensor | None, rank: int) -> Tensor:
        return torch.zeros([1] * rank, dtype=acc, device=op.v.device) if u is None else u.to(acc).contiguous()

    def weights(u_BcHC: Tensor) -> Tensor:
        return u_BcHC.to(acc).transpose(1, 2).reshape(dims.B, dims.H, S).contiguous()

    later = op.later.clone()
    later[..., -1] += op.shift
    theta = op.theta.to(acc).permute(0, 1, 4, 2, 3).reshape(dims.B, S, dims.H, -1).contiguous()
    doc, before = document_ids(bounds, chunks, C, op.v.device)
    return ScanArguments(
        tokens(op.q, low).view(dims.B, S * dims.R, dims.G, dims.N),
        tokens(op.k, low).view(dims.B, S * dims.R, dims.G, dims.N),
        tokens(op.v, low), tokens(op.z, low),
        parameter(op.mimo_v, 3), parameter(op.mimo_z, 3), parameter(op.mimo_out, 3),
        parameter(op.q_bias, 3), parameter(op.k_bias, 3), parameter(op.d, 1), parameter(op.norm_weight, 2),
        weights(op.log_decay), weights(op.gamma), weights(later), theta, doc, before,
    )  # fmt: skip


def document_ids(bounds: list[int] | None, chunks: int, C: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(S,) document of each token and (S,) of the one in force before its chunk; padding belongs to the last one."""
    if bounds is None:
        one = torch.zeros(1, dtype=torch.int32, device=device)
        return one, one.clone()
    edges = torch.tensor(bounds[1:-1], device=device)
    doc = torch.bucketize(torch.arange(chunks * C, device=device), edges, right=True).to(torch.int32)
    ends = doc.view(chunks, C)[:, -1]
    return doc, torch.cat([doc[:1], ends[:-1]]).repeat_interleave(C)
