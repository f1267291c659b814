"""What every rank of the context-parallel tests computes: its share of a model's loss and gradients, and the errors
of all shares together against the same model in one process."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from libs.model import HybridLM, ModelConfig, cast_model, preset
from libs.parallel.mesh import Group, Groups, Layout, Parallel, single
from tests.support.mimo import relative_error
from tests.support.tensor_parallel import compare, shard_of
from tests.support.tensor_parallel import config as tensor_config
from tests.support.tensor_parallel import rough_model as tensor_model

TOKENS = 139  # no multiple of the chunk or of any cp
# With chunks of 8 the cuts are at 72 (cp 2) and at 32, 72, 104 (cp 4).
DOCUMENTS = {
    "one document": None,
    "inside and across": [0, 9, 40, 63, 110, 139],
    "on a cut and around one": [0, 32, 71, 72, 73, 139],
}


class Share(NamedTuple):
    """One rank's part of everything that is compared."""

    loss: Tensor
    nll_sum: Tensor
    n_tokens: Tensor
    mtp_nll_sums: Tensor
    mtp_n_tokens: Tensor
    hidden: Tensor
    grads: dict[str, Tensor]


def config(pattern: str = "M-*-M-/*M-") -> ModelConfig:
    data = preset("cpu_tiny").model_dump()
    return ModelConfig.parse({**data, "pattern": pattern})


def rough_model(dtype: torch.dtype, parallel: Parallel | None, checkpointing: str, pattern: str) -> HybridLM:
    """Every parameter off its symmetric initial value, the same on every rank."""
    model = HybridLM(config(pattern), parallel=parallel, activation_checkpointing=checkpointing)
    cast_model(model, dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)).to(dtype))
    return model


def batch(documents: list[int] | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, labels and boundaries of a whole row."""
    tokens = torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    edges = documents or [0, TOKENS]
    labels[0, [edge - 1 for edge in edges[1:]]] = -100
    return tokens, labels, None if documents is None else torch.tensor(documents)


def share(
    documents: list[int] | None, *, parallel: Parallel | None = None, dtype: torch.dtype = torch.float64,
    checkpointing: str = "none", pattern: str = "M-*-M-/*M-",
) -> Share:  # fmt: skip
    model = rough_model(dtype, parallel, checkpointing, pattern)
    tokens, labels, cu_seqlens = batch(documents)
    out = model.loss(tokens, labels, cu_seqlens=cu_seqlens)
    out.loss.backward()
    with torch.no_grad():
        hidden = model(tokens, cu_seqlens=cu_seqlens)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Share(
        out.loss.detach(), out.main_nll_sum, out.n_tokens, torch.stack(out.mtp_nll_sums),
        torch.stack(out.mtp_n_tokens), hidden, grads,
    )  # fmt: skip


def parallel_over(group: Group) -> Parallel:
    """A layout in which `group` is the only one of more than one rank."""
    alone = single()
    groups = Groups(Layout(cp=group.size), alone.tp, group, alone.dp, group, group)
    return Parallel(groups)


def errors(shares: list[Share], whole: Share) -> dict[str, float]:
    """The shares' sums (hidden states: joined) against one process."""
    found = {"hidden": relative_error(torch.cat([part.hidden for part in shares], dim=1), whole.hidden)}
    for name in ("loss", "nll_sum", "n_tokens", "mtp_nll_sums", "mtp_n_tokens"):
        found[name] = relative_error(torch.stack([getattr(part, name) for part in shares]).sum(0), getattr(whole, name))
    for name, grad in whole.grads.items():
        found[f"d {name}"] = relative_error(torch.stack([part.grads[name] for part in shares]).sum(0), grad)
    return found


def check_ranks(groups: Groups) -> dict[str, Any]:
    """On real processes: errors of every case, from shares that are gathered over the group."""
    cp = groups.cp
    found: dict[str, Any] = {}
    cases = [(label, "block", torch.float64) for label in DOCUMENTS]
    cases += [("inside and across", "none", torch.float64), ("inside and across", "block", torch.float32)]
    for label, checkpointing, dtype in cases:
        documents = DOCUMENTS[label]
        mine = share(documents, parallel=Parallel(groups), dtype=dtype, checkpointing=checkpointing)
        whole = share(documents, dtype=dtype)
        rows = {
            name: relative_error(cp.all_reduce_(getattr(mine, name).clone()), getattr(whole, name))
            for name in ("loss", "nll_sum", "n_tokens", "mtp_nll_sums", "mtp_n_tokens")
        }
        for name, grad in mine.grads.items():
            rows[f"d {name}"] = relative_error(cp.all_reduce_(grad.clone()), whole.grads[name])
        found[f"{label}, {checkpointing}, {dtype}"] = rows
    return found


def check_with_tensor_parallel(groups: Groups) -> dict[str, Any]:
    """Slices of rows and shards of layers at once, with sequence parallelism inside each slice."""
    full = tensor_model(tensor_config("M-*-M-/*M-"), torch.float64)
    local = shard_of(full, Parallel(groups, sequence_parallel=True))
    tokens, labels, cu_seqlens = batch(DOCUMENTS["inside and across"])
    losses = [model.loss(tokens, labels, cu_seqlens=cu_seqlens).loss for model in (full, local)]
    for loss in losses:
        loss.backward()
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (full, local)]
    for grad in gradients[1].values():
        groups.cp.all_reduce_(grad)
    found = {"loss": relative_error(groups.cp.all_reduce_(losses[1].detach()), losses[0].detach())}
    return found | compare(gradients[1], gradients[0], full.config, groups.tp)
