"""PsiV, the product v * psi of every rank, kept from forward to backward: the stages, and where the product lives.

Not for the kernels: they have a reading and a writing variant each (`ScanSpec.psiv`, `BwdSpec.cached_x`).
"""
# B sequences  S tokens  H heads  R rank  P head width

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from libs.kernels.mimo.sm90.gates import Psiv

# Each stage includes those before it, except the first: it measures the ceiling and needs no kernel of ours to write.
STAGES: tuple[Psiv, ...] = ("python_precompute", "gmem_pool", "bwd_fwd_reuse", "bwd_bwd_reuse")


class Reuse(NamedTuple):
    """What a stage asks of each kernel: `forward` computes, reads or writes PsiV; the backward ones may read it."""

    forward: str
    bwd_fwd: bool
    bwd_bwd: bool


REUSE: dict[Psiv, Reuse] = {
    "off": Reuse("compute", False, False),
    "python_precompute": Reuse("read", True, True),
    "gmem_pool": Reuse("write", False, False),
    "bwd_fwd_reuse": Reuse("write", True, False),
    "bwd_bwd_reuse": Reuse("write", True, True),
}


def materialise(v_BSHP: Tensor, psi_HRP: Tensor) -> Tensor:
    """(B,H,S*R,P), in the dtype of v: every chunk of a head is one contiguous piece."""
    product_BHSRP = v_BSHP.transpose(1, 2)[:, :, :, None] * psi_HRP[:, None]
    return product_BHSRP.to(v_BSHP.dtype).flatten(2, 3).contiguous()


class _Slot:
    """One buffer and how often it was handed out."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.generation = buffer, 0


class PsivPool:
    """One buffer per PsiV weight, that is per layer: the same address in every step, so CUDA graphs can be captured.

    A buffer belongs to one forward and its backward, never to two steps: handing it out again ends the earlier lease,
    and a backward that comes after that is refused. A weight that is cast anew in every step has no address of its own
    and is refused to more than `limit` buffers.

    Args:
        poison: fill a buffer with NaN whenever it is handed out (tests).
    """

    def __init__(self, limit: int = 1024, poison: bool = False) -> None:
        self._slots: dict[tuple[int, torch.device], _Slot] = {}
        self._limit, self._poison = limit, poison

    def lease(self, psi: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int]:
        """The buffer for the layer whose weight is `psi`, and the generation under which it was handed out."""
        key = (psi.data_ptr(), psi.device)
        slot = self._slots.get(key)
        if slot is None or slot.buffer.shape != shape or slot.buffer.dtype != dtype:
            assert len(self._slots) < self._limit, "psi has a new address in every step: give the parameter itself"
            earlier = 0 if slot is None else slot.generation
            slot = self._slots[key] = _Slot(torch.empty(shape, dtype=dtype, device=psi.device))
            slot.generation = earlier
        slot.generation += 1
        if self._poison:
            slot.buffer.data.fill_(float("nan"))  # as kernels write: torch counts no version
        return slot.buffer, slot.generation

    def require(self, psi: Tensor, generation: int) -> None:
        """The buffer must still hold what the forward of this backward wrote.

        Raises:
            RuntimeError: it was handed out again: two forwards of one layer before the backward of the first.
        """
        slot = self._slots[psi.data_ptr(), psi.device]
        if slot.generation != generation:
            raise RuntimeError(
                f"PsiV buffer {tuple(slot.buffer.shape)} was handed out again (generation {slot.generation}) before "
                f"the backward of generation {generation}: a layer may have one forward in flight while psiv_cache "
                "keeps PsiV; run backward before the next forward, or set psiv_cache to off or python_precompute"
            )

    def release(self, psi: Tensor) -> None:
        """Give back the buffer of a weight that no forward will use again, if it has one."""
        self._slots.pop((psi.data_ptr(), psi.device), None)

    @property
    def bytes(self) -> int:
        """What all buffers take."""
        return sum(slot.buffer.nbytes for slot in self._slots.values())


POOL = PsivPool()
