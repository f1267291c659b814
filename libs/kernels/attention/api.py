"""The attention operator: checks its operands once and hands them to one backend.

Not for projections, rotary positions or caches (libs.model.attention), nor for paged decode.
"""
# B sequences  S query tokens  T key tokens  H query heads  G key/value heads (H % G == 0)  D head width

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from libs.kernels.attention.reference import attention_reference
from libs.kernels.attention.sdpa import attention_sdpa
from libs.kernels.attention.xla import attention_xla
from libs.kernels.backend import Choice, Probe, pick

_DEVICES = ("cpu", "cuda", "meta")


def _probe(device_type: str) -> str | None:
    return None if device_type in _DEVICES else f"it needs one of {', '.join(_DEVICES)}"


def _needs_xla(device_type: str) -> str | None:
    return None if device_type == "xla" else "it is a loop for XLA devices"


def _needs_tpu(device_type: str) -> str | None:
    return None if device_type == "xla" else "it is kernels for a TPU, behind the gate pallas_attention"


# "auto" never comes to pallas, since xla runs wherever it does: it is asked for by name (see `pallas.gates`).
BACKENDS: Mapping[str, Probe] = {"sdpa": _probe, "reference": _probe, "xla": _needs_xla, "pallas": _needs_tpu}


def choose_backend(requested: str, device: torch.device) -> Choice:
    """Resolve "auto" or the name of a backend on `device`. Raises ValueError when one cannot run there."""
    return pick("attention", requested, device.type, BACKENDS)


def attention(
    q_BSHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    cu_seqlens: Tensor | list[int] | None = None,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
    document_ids: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + mask) v, every query head reading key/value head h // (H / G).

    Args:
        q_BSHD: queries; k_BTGD, v_BTGD: keys and values of one dtype. S <= T when causal: the queries are the last S
            of the T tokens, all of one document; S == T when packed.
        cu_seqlens: (n + 1,) integers (or the same as a list, which spares a copy from the device): document
            boundaries 0 = b_0 < ... < b_n = S with B = 1; a query sees keys of its own document only.
        causal: a query sees no later key.
        scale: 1 / sqrt(D) when None.
        backend: "auto", "sdpa", "reference", or on XLA devices "xla" or "pallas" (a TPU; causal, S == T, and shapes of
            its tile table).
        document_ids: (B, S) integers in place of cu_seqlens, for "xla" and "pallas": the number of the document each
            token is in. For "pallas" a document's tokens follow each other.

    Returns:
        (B, S, H, D) in q's dtype.

    Raises:
        ValueError: shapes that do not fit, boundaries that do not, or a backend that cannot run here.
    """
    bounds = _check(q_BSHD, k_BTGD, v_BTGD, cu_seqlens, causal)
    scale = q_BSHD.shape[-1] ** -0.5 if scale is None else scale
    choice = choose_backend(backend, q_BSHD.device)
    if choice.value in ("xla", "pallas"):
        if bounds is not None:
            edges = torch.tensor(bounds[1:-1])
            document_ids = torch.bucketize(torch.arange(bounds[-1]), edges, right=True)[None].to(q_BSHD.device)
        if choice.value == "xla":
            return attention_xla(q_BSHD, k_BTGD, v_BTGD, document_ids, causal, scale)
        return _pallas(q_BSHD, k_BTGD, v_BTGD, document_ids, causal, scale)
    if document_ids is not None:
        raise ValueError(f"document_ids are for backends 'xla' and 'pallas', {choice.value!r} takes cu_seqlens")
    run = attention_sdpa if choice.value == "sdpa" else attention_reference
    return run(q_BSHD, k_BTGD, v_BTGD, bounds, causal, scale)


def _pallas(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None, causal: bool, scale: float) -> Tensor:
    if not causal or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"attention backend 'pallas' is causal with as many keys as queries, got causal={causal}, S={q.shape[1]}, "
            f"T={k.shape[1]}; use xla"
        )
    # jax and torch_xla are optional dependencies.
    from libs.kernels.attention.pallas.operator import attention_pallas

    return attention_pallas(q, k, v, document_ids, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | list[int] | None, causal: bool) -> list[int] | None:
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape:
        raise ValueError(
            f"q must be (B,S,H,D) and k, v (B,T,G,D) alike, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    (B, S, H, D), (Bk, T, G, Dk) = q.shape, k.shape
    if (Bk, Dk) != (B, D) or H % G:
        raise ValueError(
            f"q (B,S,H,D)={tuple(q.shape)} does not fit k (B,T,G,D)={tuple(k.shape)}: B, D equal, H % G == 0"
        )
    if S > T and causal:
        raise ValueError(f"causal attention needs a key for every query, got S={S} queries and T={T} keys")
    if S != T and cu_seqlens is not None:
        raise ValueError(f"packed attention needs as many keys as queries, got S={S} and T={T}")
    if cu_seqlens is None:
        return None
    bounds = cu_seqlens if isinstance(cu_seqlens, list) else [int(bound) for bound in cu_seqlens.tolist()]
    rising = all(a < b for a, b in pairwise(bounds))
    if B != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != S or not rising:
        shown = f"{bounds[:8]}{'...' if len(bounds) > 8 else ''}"
        raise ValueError(f"cu_seqlens must rise strictly from 0 to S={S} with B=1, got {shown} with B={B}")
    return bounds
