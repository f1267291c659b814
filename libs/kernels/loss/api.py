"""Per-token negative log-likelihood of a linear head, without the T x V logits.

Not for reductions (mean, sum, bits per byte): the caller owns those, and each token's gradient is its own.
"""
# T tokens  V vocabulary  D hidden

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from libs.kernels.backend import Choice, Probe, pick
from libs.kernels.loss import liger
from libs.kernels.loss.chunked import default_chunk_tokens, linear_cross_entropy_chunked, no_autocast
from libs.kernels.loss.reference import linear_cross_entropy_reference
from libs.kernels.loss.vocab_parallel import Reducer, linear_cross_entropy_vocab_parallel
from libs.kernels.loss.xla import linear_cross_entropy_xla

_DEVICES = ("cpu", "cuda", "meta")


def _probe(device_type: str) -> str | None:
    return None if device_type in _DEVICES else f"it needs one of {', '.join(_DEVICES)}"


def _needs_xla(device_type: str) -> str | None:
    return None if device_type == "xla" else "it is a loop for XLA devices"


# "auto" never comes to liger, since chunked runs wherever it does: it is asked for by name (see `gates`).
BACKENDS: Mapping[str, Probe] = {
    "chunked": _probe,
    "reference": _probe,
    "liger": liger.refusal,
    "xla": _needs_xla,
}


def choose_backend(requested: str, device: torch.device) -> Choice:
    """Resolve "auto" or the name of a backend on `device`. Raises ValueError when one cannot run there."""
    return pick("linear_cross_entropy", requested, device.type, BACKENDS)


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    backend: str = "auto",
    group: Reducer | None = None,
) -> Tensor:
    """nll[t] = logsumexp_v(hidden[t] . weight[v]) - hidden[t] . weight[labels[t]], and 0 where ignored.

    Matrix products run in the operands' dtype (under autocast: in its dtype), everything after them in fp32
    (fp64 for fp64 operands); the weight's gradient accumulates in fp32.

    Args:
        hidden_TD, weight_VD: floating point; labels_T: integers in [0, V) or `ignore_index`.
        chunk_tokens: tokens whose logits exist at one time; None picks by vocabulary and device. liger has its own.
        backend: "auto", "chunked", "reference" (which does hold T x V), "liger", or on XLA devices "xla"; the last
            three run on one rank only.
        group: ranks that each hold V consecutive rows of a weight of size * V rows; hidden and labels (of the whole
            vocabulary) are the same on all. Then hidden's gradient is **this rank's share**: the caller sums it over
            the group (`libs.parallel.tensor.enter` does, or reduce-scatters it). The weight's is complete.

    Returns:
        (T,) fp32 (fp64 for fp64 operands), differentiable in hidden and weight with any per-token gradient; with
        `group` the same on every rank.

    Raises:
        ValueError: shapes or dtypes that do not fit, `chunk_tokens` < 1, or a backend that cannot run here.
    """
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden (T,D) and weight (V,D) expected, got {tuple(hidden_TD.shape)}, {tuple(weight_VD.shape)}"
        )
    if labels_T.shape != hidden_TD.shape[:1] or labels_T.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape ({hidden_TD.shape[0]},), got {labels_T.dtype} {tuple(labels_T.shape)}"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    device_type = hidden_TD.device.type
    choice = choose_backend(backend, hidden_TD.device)
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
    if hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden_TD.dtype} and {weight_VD.dtype}")
    if group is not None and group.size > 1 and choice.value != "chunked":
        raise ValueError(f"backend {choice.value!r} cannot split the vocabulary over {group.size} ranks; able: chunked")
    with no_autocast(device_type):
        if choice.value == "reference":
            return linear_cross_entropy_reference(hidden_TD, weight_VD, labels_T, ignore_index)
        if choice.value == "liger":
            return liger.linear_cross_entropy_liger(hidden_TD, weight_VD, labels_T, ignore_index)
        chunk = chunk_tokens or default_chunk_tokens(weight_VD.shape[0], device_type)
        if choice.value == "xla":
            return linear_cross_entropy_xla(hidden_TD, weight_VD, labels_T, ignore_index, chunk)
        if group is not None and group.size > 1:
            return linear_cross_entropy_vocab_parallel(hidden_TD, weight_VD, labels_T, ignore_index, chunk, group)
        return linear_cross_entropy_chunked(hidden_TD, weight_VD, labels_T, ignore_index, chunk)
