"""PsiV, the product v * psi of every rank, kept from forward to backward: the stages, and where the product lives.

Not for the kernels: they have a reading variant each, the forward a writing one too (`ScanSpec.psiv`).
"""
# B sequences  S tokens  H heads  R rank  P head width

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

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
    """One buffer, how often it was handed out, and the weight it is for: held weakly, a model may go."""

    def __init__(self, psi: Tensor, buffer: Tensor, generation: int) -> None:
        self.buffer, self.generation = buffer, generation
        self._weight = StorageWeakRef(psi.untyped_storage())  # type: ignore[no-untyped-call]

    @property
    def weight_is_gone(self) -> bool:
        """Then no backward can come either: a graph in flight keeps the weight."""
        gone: bool = self._weight.expired()  # type: ignore[no-untyped-call]
        return gone


class PsivPool:
    """One buffer per PsiV weight, that is per layer: the same address in every step, so CUDA graphs can be captured.

    A buffer belongs to one forward and its backward, never to two steps: handing it out again ends the earlier lease,
    and a backward that comes after that is refused. The buffer of a weight that is gone goes when the next new weight
    comes. So a weight that is cast anew in every step has a new buffer in every step, and no address to capture; more
    than `limit` live ones are refused.

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
        if slot is None or slot.weight_is_gone:
            self._drop_buffers_of_gone_weights()
            slot = None
        if slot is None or slot.buffer.shape != shape or slot.buffer.dtype != dtype:
            assert len(self._slots) < self._limit, "psi has a new address in every step: give the parameter itself"
            earlier = 0 if slot is None else slot.generation
            buffer = torch.empty(shape, dtype=dtype, device=psi.device)
            slot = self._slots[key] = _Slot(psi, buffer, earlier)
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

    def _drop_buffers_of_gone_weights(self) -> None:
        self._slots = {key: slot for key, slot in self._slots.items() if not slot.weight_is_gone}

    @property
    def bytes(self) -> int:
        """What the buffers of living weights take."""
        self._drop_buffers_of_gone_weights()
        return sum(slot.buffer.nbytes for slot in self._slots.values())


POOL = PsivPool()
