"""Log-likelihood of whole documents, and bits per byte: the one scorer behind validation and every suite.

A document's first token has no context and is no target, as in training. Nothing is truncated: what is too
long or too short is returned as excluded, with the reason, for the caller to count and list.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from libs.model.hybrid import HybridLM
from libs.model.packing import STATIC_DEVICES
from libs.parallel.context import slice_offsets

Ids: TypeAlias = NDArray[np.integer]


class DocumentScore(NamedTuple):
    """One document of n tokens; the arrays have one entry per target, tokens 1 .. n-1, and are empty when
    excluded.

    Attributes:
        position: place in the input. n_tokens: n.
        nll_bits: float64, bits. n_bytes: int64, bytes the target stands for, 0 for special tokens.
        byte_offset: int64, bytes of the document before the target.
        excluded: why the document was not scored, None when it was.
    """

    position: int
    n_tokens: int
    nll_bits: NDArray[np.float64]
    n_bytes: NDArray[np.int64]
    byte_offset: NDArray[np.int64]
    excluded: str | None


class BitsPerByte(NamedTuple):
    """`bpb` = nll_bits / n_bytes over targets that stand for bytes; nan when there are none."""

    bpb: float
    nll_bits: float
    n_bytes: int
    n_documents: int
    n_excluded: int


def score_documents(
    model: HybridLM,
    documents: Iterable[Ids],
    token_bytes: NDArray[np.integer],
    *,
    max_tokens: int,
    batch_documents: int = 1,
) -> Iterator[DocumentScore]:
    """Score documents in order, without gradients.

    Args:
        token_bytes: (vocab,) bytes each id stands for, 0 for special tokens.
        max_tokens: a longer document is excluded. Also bounds the packed tokens of one forward pass.
        batch_documents: documents packed into one pass. 1 makes a score independent, bit for bit, of its
            neighbours; more is faster on short documents and equal up to rounding.
    """
    waiting: list[tuple[int, NDArray[np.int64]]] = []
    for index, raw in enumerate(documents):
        ids = np.asarray(raw, dtype=np.int64)
        reason = None
        if len(ids) < 2:
            reason = f"{len(ids)} tokens: no target"
        elif len(ids) > max_tokens:
            reason = f"{len(ids)} tokens, more than max_tokens={max_tokens}"
        full = waiting and sum(len(other) for _, other in waiting) + len(ids) > max_tokens
        if reason is not None or full or len(waiting) == batch_documents:
            yield from _score_packed(model, waiting, token_bytes, max_tokens)
            waiting = []
        if reason is None:
            waiting.append((index, ids))
        else:
            none = np.empty(0, dtype=np.int64)
            yield DocumentScore(index, len(ids), none.astype(np.float64), none, none, reason)
    yield from _score_packed(model, waiting, token_bytes, max_tokens)


def _score_packed(
    model: HybridLM,
    documents: list[tuple[int, NDArray[np.int64]]],
    token_bytes: NDArray[np.integer],
    max_tokens: int,
) -> Iterator[DocumentScore]:
    if not documents:
        return
    device = model.head_weight.device
    packed = np.concatenate([ids for _, ids in documents])
    bounds = np.cumsum([0, *(len(ids) for _, ids in documents)])
    if device.type in STATIC_DEVICES and len(packed) < max_tokens:
        # One length for every pass; what fills it up is a document of its own.
        packed = np.append(packed, np.zeros(max_tokens - len(packed), packed.dtype))
        bounds = np.append(bounds, max_tokens)
    labels = np.append(packed[1:], -100)  # a document's last entry is computed with the others and not read
    rows = [torch.from_numpy(row)[None].to(device) for row in (packed, labels)]
    with torch.no_grad():
        nll = _whole_rows(model, rows[0], rows[1], torch.from_numpy(bounds.astype(np.int32)).to(device))
    bits = nll[0].cpu().double().numpy() / math.log(2)
    for (index, ids), start, end in zip(documents, bounds[:-1], bounds[1:], strict=False):
        sizes = token_bytes[ids].astype(np.int64)
        offsets = np.cumsum(sizes) - sizes
        yield DocumentScore(index, len(ids), bits[start : end - 1].copy(), sizes[1:], offsets[1:], None)


def _whole_rows(model: HybridLM, tokens_BS: Tensor, labels_BS: Tensor, bounds: Tensor) -> Tensor:
    """(1, S) nll; under context parallelism gathered from all slices, with padding where there would be too few."""
    cp = None if model.parallel is None or model.parallel.cp.size == 1 else model.parallel.cp
    if cp is None:
        return model.per_token_nll(tokens_BS, labels_BS, cu_seqlens=bounds)
    length, chunk = tokens_BS.shape[1], 1 if model.config.mixer is None else model.config.mixer.chunk_size
    missing = max(0, cp.size * chunk - length)
    if missing:  # a document of its own after the others changes nothing for them
        tokens_BS, labels_BS = F.pad(tokens_BS, (0, missing)), F.pad(labels_BS, (0, missing), value=-100)
        bounds = torch.cat([bounds, bounds.new_tensor([length + missing])])
    start, stop = slice_offsets(length + missing, cp.size, multiple=chunk)[cp.rank : cp.rank + 2]
    mine = model.per_token_nll(tokens_BS, labels_BS, cu_seqlens=bounds)
    whole = torch.zeros(1, length + missing, dtype=mine.dtype, device=mine.device)
    whole[:, start:stop] = mine
    return cp.all_reduce_(whole)[:, :length]


def bits_per_byte(scores: Iterable[DocumentScore]) -> BitsPerByte:
    """Corpus bits per byte: sums over all scored documents, special tokens (0 bytes) in neither sum."""
    bits, n_bytes, scored, excluded = 0.0, 0, 0, 0
    for score in scores:
        if score.excluded is not None:
            excluded += 1
            continue
        scored += 1
        bits += float(score.nll_bits[score.n_bytes > 0].sum())
        n_bytes += int(score.n_bytes.sum())
    return BitsPerByte(bits / n_bytes if n_bytes else math.nan, bits, n_bytes, scored, excluded)
