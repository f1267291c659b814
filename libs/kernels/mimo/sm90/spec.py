"""What a scan kernel is compiled for, and the arguments that forward and backward kernels share.

Not the choice of tiles and stages: that is `tiles.py`.
"""
# B sequences  S tokens, whole chunks  H heads  G groups  R rank  N state  P head width  A rotary angles
# C tokens of a chunk  F = C*R rows of a chunk, token-major: row t*R + r

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ScanSpec(NamedTuple):
    """One compiled variant of a forward or backward kernel. S is a multiple of C * splits.

    Attributes:
        B, S: may be symbols: see `launch.opened`.
        z, out, d, norm: whether the gate, MIMO_Out, the skip weight and the output norm are there.
        packed: documents are packed, so pairs of tokens must be of one document.
        splits: parts of the sequence that run side by side.
        psiv: "compute" PsiV, "read" it from a tensor (B,H,S*R,P), or (forward only) compute and "write" it.
        stages: wanted of the software pipeline: `T.stages` has the last word.
        min_blocks: resident blocks asked for, which caps registers; 0 asks for nothing.
        threads: of the consumers; with warp specialization the producer has 128 more. The forward's are always 128.
        share_x: weighted PsiV and then y take the place of PsiV in the forward's shared memory (y is then rounded
            before gate and rank sum).
    """

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
    threads: int = 128
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
        return self.chunks // self.splits

    @property
    def second(self) -> int:
        """Where the second channels of the rotated pairs start: quarter 2, or half."""
        return self.N // 2

    @property
    def reads_x(self) -> bool:
        """PsiV comes ready and is not computed again."""
        return self.psiv == "read"

    def checked(self) -> ScanSpec:
        """Itself, when the kernels can be built for it. A wrong spec is our mistake: the wrapper pads and checks."""
        assert not isinstance(self.S, int) or self.S % (self.C * self.splits) == 0, self
        assert self.H % self.G == 0, self
        assert self.N % 4 == 0, self
        assert self.divisor in (2, 4), self
        return self


class KernelOperands(NamedTuple):
    """The differentiable tensors of one call, already padded to whole chunks: what the custom op takes, in its order.

    Padding is zero and has zero weight everywhere, so kernels know nothing of ragged sequences.

    Attributes:
        q, k: (B,S,R,G,N) before bias and rotation.
        v, z: (B,S,H,P) values and gates. These four in the low dtype, the rest in the accumulation dtype.
        q_bias, k_bias (H,R,N), psi, zeta, phi (H,R,P), d (H,), norm_w (H,P): parameters.
        log_decay: (B,H,S) running sum of A*dt inside the chunk and document, up to and with the token.
        gamma: (B,H,S) weight of a token on its own output.
        later: (B,H,S) its weight on all later ones. A chunk's last token has no later one inside the chunk, so its
            entry is free to be its whole weight on the state: gamma plus the shifted term.
        theta: (B,S,H,A) wrapped angles.
        first: (B,H,N,P) the state entering the first chunk.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor | None
    q_bias: Tensor
    k_bias: Tensor
    psi: Tensor
    zeta: Tensor | None
    phi: Tensor | None
    d: Tensor | None
    norm_w: Tensor | None
    log_decay: Tensor
    gamma: Tensor
    later: Tensor
    theta: Tensor
    first: Tensor


Arguments = dict[str, Tensor]  # by the names of the kernels' parameters


def shared_arguments(op: KernelOperands) -> Arguments:
    """What forward and backward kernels both read: rows (B, S*R, ...), and a stand-in of one element, which no kernel
    reads, for everything that an option switches off. Nothing is copied."""

    def given(u: Tensor | None, like: Tensor, rank: int) -> Tensor:
        return like.new_zeros([1] * rank) if u is None else u

    return {
        "q": op.q.flatten(1, 2), "k": op.k.flatten(1, 2), "v": op.v, "z": given(op.z, op.v, 4),
        "q_bias": op.q_bias, "k_bias": op.k_bias, "psi": op.psi, "zeta": given(op.zeta, op.psi, 3),
        "phi": given(op.phi, op.psi, 3), "d": given(op.d, op.psi, 1), "norm_w": given(op.norm_w, op.psi, 2),
    }  # fmt: skip


def scan_spec(
    op: KernelOperands, C: int, divisor: int, norm_eps: float, *, packed: bool = False, splits: int = 1
) -> ScanSpec:
    """The variant for one call, with the defaults for everything that does not change the result."""
    B, S, R, G, N = op.q.shape
    H, P = op.v.shape[2:]
    return ScanSpec(
        B, S, H, G, R, N, P, C, divisor, z=op.z is not None, out=op.phi is not None, d=op.d is not None,
        norm=op.norm_w is not None, packed=packed, norm_eps=norm_eps, splits=splits,
    )  # fmt: skip


def documents_before(doc_S: Tensor, C: int) -> Tensor:
    """(S,) the document in force just before each token's chunk; before the first chunk, the first token's."""
    return torch.cat([doc_S[:1], doc_S[C - 1 : -1 : C]]).repeat_interleave(C)
