"""Linear cross-entropy by Liger's fused Triton kernels: the backend behind the `fused_linear_ce` gate.

Not for asking whether it may run: `refusal` says where it can, `liger_selftest` whether its gradients are right,
`gates` whether it was asked for. It is never chosen on its own.
"""
# T tokens  V vocabulary  D hidden

from __future__ import annotations

import torch
from torch import Tensor

from libs.flags.catalog import CATALOG
from libs.flags.environment import allowed_variables
from libs.flags.facts import Facts

GATE = "fused_linear_ce"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(device_type: str) -> str | None:
    """Why it cannot run on that kind of device here: no GPU (nor Triton's interpreter), or the wrong version.

    The oldest version is the gate's: those up to 0.8.1 return wrong gradients for per-token weights, silently.
    """
    if device_type != "cuda" and not (device_type == "cpu" and allowed_variables().get("TRITON_INTERPRET") == "1"):
        return "Liger's Triton kernels run on cuda"
    return version_refusal(Facts())


def version_refusal(facts: Facts) -> str | None:
    """What is wrong with the installed liger-kernel, by the gate's own precondition."""
    found = [p for p in CATALOG[GATE].preconditions if p.name == "package.liger-kernel"]
    assert len(found) == 1, "the gate states one range of versions"
    return found[0].check("liger", facts)


def linear_cross_entropy_liger(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ignore_index: int) -> Tensor:
    """Same result as `api.linear_cross_entropy`, operands already checked; the weight's gradient sums up in fp32.

    Raises:
        ValueError: fp64 operands, which the kernels would round to fp32. RuntimeError: a label outside the vocabulary,
            which the kernels would read past their logits (on a GPU: an asynchronous device assertion).
    """
    # Importing Triton takes seconds and decides once whether it interprets, so: only where it is used.
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    if hidden_TD.dtype not in _DTYPES:
        raise ValueError(f"backend 'liger' computes in fp32 or less, got {hidden_TD.dtype}; use chunked")
    in_range_T = (labels_T >= 0) & (labels_T < weight_VD.shape[0]) | (labels_T == ignore_index)
    torch._assert_async(in_range_T.all(), f"labels must be in [0, {weight_VD.shape[0]}) or {ignore_index}")
    if weight_VD.requires_grad and not hidden_TD.requires_grad:
        # Liger makes the weight's gradient only beside the input's; without one it would be None, silently.
        hidden_TD = hidden_TD.detach().requires_grad_()
    # In the order of its forward: bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction,
    # softcap, return_z_loss, accum_dtype.
    nll_T: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
        hidden_TD, weight_VD, labels_T.long(), None, None, ignore_index, 0.0, 0.0, "none", None, False, torch.float32
    )[0]
    return nll_T
