"""Stand-ins for a TPU's custom call in tests: the kernel interpreted by jax on the CPU, and plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from libs.kernels.attention.pallas.kernels import KERNELS, Problem


def interpreted(kernel: str, problem: Problem, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The kernel itself, block by block, on CPU tensors."""
    arrays = [jnp.asarray(u.detach().float().numpy()).astype(str(u.dtype).removeprefix("torch.")) for u in given]
    made = KERNELS[kernel](problem, interpret=True)(*arrays)
    return tuple(torch.from_numpy(np.array(u.astype(jnp.float32))).to(getattr(torch, str(u.dtype))) for u in made)


def plain(kernel: str, problem: Problem, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What the kernel computes, in torch operations, whole."""
    _reach, starts, q, k, v, *rest = given
    keys, values = (u.repeat_interleave(problem.H // problem.G, dim=1) for u in (k, v))
    position = torch.arange(problem.S, device=q.device)
    visible = (position <= position[:, None]) & (position >= starts[:, 0, :, None])
    scores = torch.where(visible[:, None], q @ keys.transpose(2, 3) * problem.scale, -1e30)
    if kernel == "forward":
        return scores.softmax(-1) @ values, scores.logsumexp(-1)[:, :, None]
    d_out, lse, delta = rest
    weights = (scores - lse.transpose(2, 3)).exp()
    d_scores = weights * (d_out @ values.transpose(2, 3) - delta.transpose(2, 3)) * problem.scale
    if kernel == "backward_queries":
        return (d_scores @ keys,)
    grouped = (problem.B, problem.G, problem.H // problem.G, problem.S, problem.D)
    d_keys, d_values = (
        u.reshape(grouped).sum(2) for u in (d_scores.transpose(2, 3) @ q, weights.transpose(2, 3) @ d_out)
    )
    return d_keys, d_values
