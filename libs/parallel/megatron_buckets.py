"""What Megatron's engine does to a group of buckets: look at its gradients, and complete what is gathered into it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    # As in `megatron_setup`.
    warnings.simplefilter("ignore", UserWarning)
    from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing


def norm_of(bucket_group: Any) -> Tensor:
    """Of the gradients in some buckets, padding included, which is zero; 0-d."""
    norms: list[Tensor] = [bucket.grad_data.norm() for bucket in bucket_group.buckets]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def wait_for_gather(bucket_groups: Iterable[Any]) -> None:
    """Complete the gathers of parameters that are under way."""
    for group in bucket_groups:
        if group.param_gather_handle is not None:
            group.start_param_sync(force_sync=True)  # with a gather under way this waits for it and starts none
            complete_fp8(group)


def complete_fp8(bucket_group: Any) -> None:
    """Transpose what was gathered. Megatron leaves that to whoever waits; without it backward multiplies by the weights
    of the step before."""
    gathered = [p for bucket in bucket_group.buckets for p in bucket.params_list if is_float8tensor(p)]
    if gathered:
        post_all_gather_processing(gathered)
