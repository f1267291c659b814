"""What every rank of the tensor-parallel tests computes: errors against the same model in one process.

Each check returns plain numbers; the tests decide what is good.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from libs.kernels.loss import linear_cross_entropy
from libs.model import HybridLM, ModelConfig, cast_model, preset
from libs.model.sharding import shard_rules
from libs.parallel.mesh import Group, Groups, Layout, Parallel, open_groups
from libs.parallel.tensor import total_gradient_norm
from tests.support.ranks import TIMEOUT
from tests.support.sharding import merge_state_dicts, shard_state_dict

SEQ_LEN = 33  # no multiple of any tp: sequence parallelism has to pad
BOUNDS = torch.tensor([0, 12, SEQ_LEN])
Named = dict[str, Tensor]


def config(pattern: str = "M-*-/*-", **changes: Any) -> ModelConfig:
    """cpu_tiny with four of everything that is cut, so that tp 2 and 4 are legal."""
    data = preset("cpu_tiny").model_dump()
    data["mixer"] |= {"ngroups": 4, "outproj_norm": True}
    data["attention"] |= {"kv_heads": 4}
    return ModelConfig.parse({**data, "pattern": pattern, **changes})


def rough_model(cfg: ModelConfig, dtype: torch.dtype = torch.float32, **options: Any) -> HybridLM:
    """One process's model with every parameter off its symmetric initial value."""
    model = HybridLM(cfg, **options)
    cast_model(model, dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)).to(dtype))
    return model


def shard_of(full: HybridLM, parallel: Parallel) -> HybridLM:
    """This rank's shards of the same model."""
    tp = parallel.tp
    local = HybridLM(full.config, parallel=parallel, activation_checkpointing=full.activation_checkpointing)
    cast_model(local, full.final_norm.weight.dtype)
    local.load_state_dict(shard_state_dict(full.state_dict(), full.config, tp.rank, tp.size))
    return local


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 64, (1, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    labels[0, [3, 11, SEQ_LEN - 1]] = -100
    return tokens, labels


def error(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|; NaN counts as infinite."""
    got, want = got.detach(), want.detach()
    difference = (got.double() - want.double()).abs().max()
    return float(difference / want.double().abs().max().clamp_min(1e-30)) if difference.isfinite() else float("inf")


def gradients(model: HybridLM) -> Named:
    """Every parameter's gradient after one backward."""
    tokens, labels = batch()
    model.zero_grad()
    model.loss(tokens, labels, cu_seqlens=BOUNDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(got: Named, want: Named, cfg: ModelConfig, tp: Group) -> dict[str, float]:
    """Error of this rank's tensors against its cut of the full ones, relative to the full one's largest entry."""
    rules = shard_rules(cfg)
    assert got.keys() == want.keys() == rules.keys()
    errors = {}
    for name, tensor in got.items():
        cut = rules[name].cut(want[name], tp.rank, tp.size)
        scale = float(want[name].detach().abs().max())
        errors[name] = error(tensor, cut) * float(cut.detach().abs().max()) / max(scale, 1e-30)
    return errors


def outputs(full: HybridLM, local: HybridLM) -> dict[str, float]:
    tokens, labels = batch()
    with torch.no_grad():
        found = {
            "logits": (local.logits(tokens, cu_seqlens=BOUNDS), full.logits(tokens, cu_seqlens=BOUNDS)),
            "nll": tuple(m.per_token_nll(tokens, labels, cu_seqlens=BOUNDS) for m in (local, full)),
            "loss": tuple(m.loss(tokens, labels, cu_seqlens=BOUNDS).loss for m in (local, full)),
            "mtp": tuple(m.loss(tokens, labels).mtp_nll_sums[0] for m in (local, full)),
        }
    return {name: error(got, want) for name, (got, want) in found.items()}


def decode(full: HybridLM, local: HybridLM) -> float:
    tokens, _ = batch()
    worst, states = 0.0, []
    pairs = [model.prefill(tokens[:, :9]) for model in (local, full)]
    for t in range(9, 12):
        worst = max(worst, error(pairs[0][0], pairs[1][0]))
        states = [state for _, state in pairs]
        pairs = [m.step(tokens[:, t], s) for m, s in zip((local, full), states, strict=True)]
    return max(worst, error(pairs[0][0], pairs[1][0]))


def three_steps(model: HybridLM, eps: float) -> Named:
    """Parameters after three steps of AdamW. eps: Adam divides by |g| + eps, so that with a small one an entry whose
    gradient is rounding noise moves by the whole learning rate, either way."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, eps=eps)
    for _ in range(3):
        gradients(model)
        optimizer.step()
    return dict(model.named_parameters())


@contextmanager
def unsummed(local: HybridLM, suffix: str) -> Iterator[None]:
    """The model without the gradient sum of one kind of replicated parameter."""
    modules = [m for name, m in local.named_modules() if name.endswith(suffix)]
    before = [module.summed_over for module in modules]
    assert modules
    assert all(group is not None for group in before)
    for module in modules:
        module.summed_over = None
    yield
    for module, group in zip(modules, before, strict=True):
        module.summed_over = group


def loss_operator(tp: Group) -> dict[str, float]:
    """The vocab-parallel loss alone, with a gradient of its own for every token, extreme logits included."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(21, 8, generator=generator), 30 * torch.randn(24, 8, generator=generator)
    labels = torch.randint(0, 24, (21,), generator=generator)
    labels[::5] = -100
    scale = torch.linspace(-2, 3, 21)
    per_rank = 24 // tp.size
    rows = slice(tp.rank * per_rank, (tp.rank + 1) * per_rank)
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    want = linear_cross_entropy(whole[0], whole[1], labels)
    want_grads = torch.autograd.grad((want * scale).sum(), whole)
    mine = [hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()]
    got = linear_cross_entropy(mine[0], mine[1], labels, group=tp, chunk_tokens=4)
    grads = torch.autograd.grad((got * scale).sum(), mine)
    share = error(grads[0], want_grads[0])
    found = {
        "nll": error(got, want),
        "hidden": error(tp.all_reduce_(grads[0].clone()), want_grads[0]),
        "weight": error(grads[1], want_grads[1][rows]),
        "hidden before the sum": share,
        "ignored": float(got[::5].abs().max()),
    }
    try:
        linear_cross_entropy(mine[0], mine[1], torch.full_like(labels, 24), group=tp)
    except RuntimeError as refusal:
        found["out of bounds"] = float("out of bounds" in str(refusal))
    return found


def gradient_norm(got: Named, want: Named, cfg: ModelConfig, tp: Group) -> float:
    rules = shard_rules(cfg)
    mine = total_gradient_norm([(grad, rules[name].dim is not None) for name, grad in got.items()], tp)
    return error(mine, torch.nn.utils.get_total_norm(want.values()))


def bf16(full: HybridLM, local: HybridLM) -> dict[str, Any]:
    tokens, labels = batch()
    exact = full.loss(tokens, labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        low = local.loss(tokens, labels).loss
    local.zero_grad()
    low.backward()
    return {"loss": error(low, exact), "dtypes": sorted({str(p.grad.dtype) for p in local.parameters()})}


def merged(local: HybridLM, full: HybridLM, tp: Group) -> bool:
    """All ranks' shards, gathered and merged, are the full model bit for bit."""
    gathered = {name: tp.all_gather(p.detach()) for name, p in local.named_parameters()}
    shards = [{name: rows[rank] for name, rows in gathered.items()} for rank in range(tp.size)]
    return all(torch.equal(merge_state_dicts(shards, full.config)[n], p) for n, p in full.named_parameters())


class Whole:
    """The same model in one process, computed once for every layout it is compared with."""

    def __init__(self) -> None:
        self.model, self.exact = (
            rough_model(config()),
            rough_model(config("M-*/M", tie_embeddings=False), torch.float64),
        )
        self.gradients, self.exact_gradients = gradients(self.model), gradients(self.exact)
        self.stepped = three_steps(rough_model(config()), 1e-4)
        self.exact_stepped = three_steps(rough_model(self.exact.config, torch.float64), 1e-8)
        self.seeded = HybridLM(config())
        self.seeded.reset_parameters(7)


def one_layout(whole: Whole, parallel: Parallel) -> dict[str, Any]:
    """All checks of one tensor group, with or without sequence parallelism."""
    cfg, tp, full = whole.model.config, parallel.tp, whole.model
    local, exact = shard_of(full, parallel), shard_of(whole.exact, parallel)
    mine = gradients(local)
    found: dict[str, Any] = {
        "outputs": outputs(full, local),
        "gradients": compare(mine, whole.gradients, cfg, tp),
        "norm": gradient_norm(mine, whole.gradients, cfg, tp),
        "decode": decode(full, local),
        "bf16": bf16(full, local),
        "fp64": compare(gradients(exact), whole.exact_gradients, exact.config, tp),
    }
    for suffix in ("angle_proj", "B_norm", *(("join_proj", "blocks.0.norm") if parallel.sequence_parallel else ())):
        with unsummed(local, suffix):
            found[f"without {suffix}"] = compare(gradients(local), whole.gradients, cfg, tp)
    local.activation_checkpointing = "block"
    found["checkpointed"] = compare(gradients(local), whole.gradients, cfg, tp)
    found["steps"] = compare(three_steps(local, 1e-4), whole.stepped, cfg, tp)
    found["steps fp64"] = compare(three_steps(exact, 1e-8), whole.exact_stepped, exact.config, tp)
    seeded = HybridLM(cfg, parallel=parallel)
    seeded.reset_parameters(7)
    found["init"] = merged(seeded, whole.seeded, tp)
    return found


def with_context(whole: Whole, groups: Groups) -> dict[str, float]:
    """Tensor, sequence and context parallelism at once, recomputed; gradients are summed over the slices."""
    full, local = whole.model, shard_of(whole.model, Parallel(groups, sequence_parallel=True))
    local.activation_checkpointing = "block"
    mine = {name: groups.cp.all_reduce_(grad.clone()) for name, grad in gradients(local).items()}
    return compare(mine, whole.gradients, full.config, groups.tp)


def all_layouts(groups: Groups) -> dict[str, Any]:
    """Two pairs of ranks as dp 2 x tp 2, then all four as tp 4: one job for both."""
    whole, four = Whole(), open_groups(Layout(tp=4), "gloo", TIMEOUT)
    found: dict[str, Any] = {"groups": collectives(groups)}
    for name, layout in (("tp2", groups), ("tp4", four)):
        found[name] = one_layout(whole, Parallel(layout))
        found[f"{name} sp"] = one_layout(whole, Parallel(layout, sequence_parallel=True))
        found[f"{name} loss"] = loss_operator(layout.tp)
    found["cp2 tp2"] = with_context(whole, open_groups(Layout(cp=2, tp=2), "gloo", TIMEOUT))
    with mock.patch.object(Group, "all_reduce_", lambda self, tensor, op="sum": tensor):
        found["no reduction"] = outputs(whole.model, shard_of(whole.model, Parallel(groups)))
    return found


def collectives(groups: Groups) -> dict[str, Any]:
    """Members of each group in two layouts, and the plain collectives on numbers that tell ranks apart."""
    three = open_groups(Layout(dp=1, cp=2, tp=2), "gloo", TIMEOUT)
    me, tp = float(groups.world.rank), groups.tp
    return {
        "dp2 tp2": {kind: getattr(groups, kind).members for kind in ("tp", "cp", "dp", "dp_cp", "world")},
        "cp2 tp2": {kind: getattr(three, kind).members for kind in ("tp", "cp", "dp", "dp_cp", "world")},
        "sum": groups.dp.all_reduce_(torch.tensor([me])).tolist(),
        "max": tp.all_reduce_(torch.tensor([me]), "max").tolist(),
        "gather": tp.all_gather(torch.tensor([[me, 10 * me]])).tolist(),
        "gather of a scalar": groups.world.all_gather(torch.tensor(me)).tolist(),
        "reduce_scatter": tp.reduce_scatter(torch.tensor([[me, 1.0], [10 * me, 2.0]])).tolist(),
    }
