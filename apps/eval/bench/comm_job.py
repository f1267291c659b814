"""The processes of `fathom bench comm`: what each rank checks and times, and what rank 0 writes down.

Not for what is concluded from it (comm.py).
"""
# S tokens of the whole row

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from apps.eval.bench.comm_layers import (
    TOKEN_AXIS,
    CountingGroup,
    all_to_all_call,
    exchange_in,
    exchange_out,
    hand_over_call,
    layer_operands,
    slice_of,
)
from apps.eval.bench.comm_step import STEP_METHODS, StepPlan, step_works
from apps.eval.bench.contenders import op_call
from apps.eval.bench.correctness import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, Outcome, relative_error
from apps.eval.bench.interleave import Contender, interleave
from apps.eval.bench.operands import Operands, Shape
from libs.kernels.mimo import Dims
from libs.kernels.mimo.handover import summary_numel
from libs.parallel.context import ContextShard, slice_offsets
from libs.parallel.mesh import Layout, open_groups

CHECK_SHAPE = Shape(S=96, H=4, N=16, P=8)
# One process may take minutes for a long row while the others wait for it.
_PATIENCE = timedelta(hours=1)

METHODS: dict[str, str] = {
    "hand_over": "state hand-over, forward + backward, exchange included",
    "all_to_all": "tokens traded for heads and back, forward + backward, exchange included",
    "hand_over_exchange": "the collectives of the state hand-over alone, both ways",
    "all_to_all_exchange": "the collectives of the all-to-all alone, both ways",
    "one_process": "the whole row on one process, forward + backward, the others idle",
    **STEP_METHODS,
}


class CommPlan(NamedTuple):
    """What one run measures. rounds: of each length. threads: per process.

    alone_up_to: longest row that one process scans on its own, for the speed-up. step: a whole model's step, timed as
    often.
    """

    seq_lens: tuple[int, ...]
    rounds: int
    alone_up_to: int
    processes: int
    chunk_size: int
    threads: int
    seed: int
    shape: Shape
    step: StepPlan


class Measured(NamedTuple):
    """What the job found. samples: seconds by contender; traffic: bytes of both ways by length. Empty when red."""

    outcomes: list[Outcome]
    samples: dict[str, list[float]]
    traffic: list[dict[str, int]]


def run_job(plan: CommPlan) -> Measured:
    """Start the processes and wait for them. Raises when one of them fails."""
    with tempfile.TemporaryDirectory() as directory:
        start_processes(_rank, (plan, directory), nprocs=plan.processes, start_method="spawn")  # type: ignore[no-untyped-call]
        found = json.loads(Path(directory, "result.json").read_text(encoding="utf-8"))
    return Measured([Outcome(*outcome) for outcome in found["outcomes"]], found["samples"], found["traffic"])


def _rank(rank: int, plan: CommPlan, directory: str) -> None:
    """One process of the job; rank 0 writes what all of them measured together."""
    torch.set_num_threads(plan.threads)
    store = dist.FileStore(str(Path(directory, "store")), plan.processes)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=plan.processes, timeout=_PATIENCE)
    try:
        sliced = open_groups(Layout(cp=plan.processes), "gloo", _PATIENCE)
        replicas = open_groups(Layout(dp=plan.processes), "gloo", _PATIENCE)
        group = CountingGroup(sliced.cp.process_group, sliced.cp.rank, sliced.cp.size, sliced.cp.members)
        steps, same = step_works(plan.step, replicas, sliced, seed=plan.seed)
        result: dict[str, Any] = {"outcomes": [*_check(group, plan), *same], "samples": {}, "traffic": []}
        if all(outcome.passed for outcome in result["outcomes"]):
            result["samples"] |= _time_steps(group, plan, steps)
            for seq_len in plan.seq_lens:
                samples, traffic = _measure(group, plan, plan.shape._replace(S=seq_len))
                result["samples"] |= samples
                result["traffic"].append(traffic)
        if rank == 0:
            Path(directory, "result.json").write_text(json.dumps(result), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def _check(group: CountingGroup, plan: CommPlan) -> list[Outcome]:
    """Both ways in fp32 against the oracle in fp64 on one process: outputs and all fourteen gradients."""
    shape = CHECK_SHAPE._replace(S=CHECK_SHAPE.S * group.size, H=CHECK_SHAPE.H * group.size)
    exact = Operands(*(u.requires_grad_() for u in layer_operands(shape, seed=plan.seed, dtype=torch.float64)))
    want = op_call(exact, shape, chunk_size=plan.chunk_size, backend="reference")
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(plan.seed), dtype=torch.float64)
    want_grads = torch.autograd.grad(want, list(exact), weights)
    shard = ContextShard(group, slice_offsets(shape.S, group.size))
    outcomes = []
    for label, call in (("hand-over", hand_over_call), ("all-to-all", all_to_all_call)):
        whole = layer_operands(shape, seed=plan.seed)
        mine = Operands(*(u.requires_grad_() for u in slice_of(whole, shard)))
        got = call(mine, shape, shard, chunk_size=plan.chunk_size)
        grads = torch.autograd.grad(got, list(mine), shard.cut(weights).to(got.dtype))
        errors = torch.zeros(2, dtype=torch.float64)
        errors[0] = relative_error(got.detach(), shard.cut(want).detach())
        for name, grad, exact_grad in zip(Operands._fields, grads, want_grads, strict=True):
            if name == "angles_BSHA":  # heads share it, so only the sum over heads is defined
                grad, exact_grad = grad.sum(2), exact_grad.sum(2)
            axis = TOKEN_AXIS.get(name)
            mine_of = group.all_reduce_(grad.clone()) if axis is None else grad
            wanted = exact_grad if axis is None else shard.cut(exact_grad, axis)
            errors[1] = max(float(errors[1]), _nan_is_worst(relative_error(mine_of, wanted)))
        group.all_reduce_(errors, "max")
        outcomes.append(Outcome(f"{label} output vs oracle", float(errors[0]), FORWARD_TOLERANCE))
        outcomes.append(Outcome(f"{label} 14 gradients vs oracle", float(errors[1]), GRADIENT_TOLERANCE))
    return outcomes


def _nan_is_worst(error: float) -> float:
    return error if error == error else float("inf")


def _measure(group: CountingGroup, plan: CommPlan, shape: Shape) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds by contender for one length, and the bytes of both ways. Only the shortest row is warmed up with: by
    then everything is loaded, and every call takes fresh pages for tensors of this size."""
    sent: dict[str, int] = {}

    def timed(name: str, work: Callable[[], None]) -> Contender:
        def run() -> None:
            work()
            sent[name] = group.take()
            group.barrier()

        warm_up = min(plan.seq_lens) == shape.S
        return Contender(f"{name}_S{shape.S}", run, plan.rounds, warm_up)

    samples = interleave(
        [timed(name, work) for name, work in _works(group, plan, shape).items()],
        seed=plan.seed,
        on_sample=lambda name, seconds: _say(group, f"{name}: {seconds:.3f} s"),
    )
    assert sent["hand_over"] == sent["hand_over_exchange"], "the exchange alone is not the exchange of the layer"
    assert sent["all_to_all"] == sent["all_to_all_exchange"], "the exchange alone is not the exchange of the layer"
    traffic = {
        "seq_len": shape.S, "processes": group.size, "hand_over_bytes": sent["hand_over"],
        "all_to_all_bytes": sent["all_to_all"],
    }  # fmt: skip
    return samples, traffic


def _works(group: CountingGroup, plan: CommPlan, shape: Shape) -> dict[str, Callable[[], None]]:
    """What is timed of one layer, by method, on operands made here."""
    shard = ContextShard(group, slice_offsets(shape.S, group.size))
    whole = layer_operands(shape, seed=plan.seed)
    mine = Operands(*(u.requires_grad_() for u in slice_of(whole, shard)))
    grad_out = torch.ones_like(mine.v_BSHP)
    rows = grad_out.new_zeros(group.size, summary_numel(_dims(shape)))

    def train(call: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            out = call(mine, shape, shard, chunk_size=plan.chunk_size)
            torch.autograd.grad(out, list(mine), grad_out)

        return run

    def state_only() -> None:
        group.all_gather(rows[0])
        group.reduce_scatter(rows)

    def trade_only() -> None:
        local = exchange_in(mine, shape, shard)
        touched = [local.q_BSRGN, local.v_BSHP]
        torch.autograd.grad(touched, (mine.q_BSRGN, mine.v_BSHP), [torch.ones_like(u) for u in touched])
        out = exchange_out(local.v_BSHP.detach().requires_grad_(), group)
        out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]

    works = {
        "hand_over": train(hand_over_call), "all_to_all": train(all_to_all_call), "hand_over_exchange": state_only,
        "all_to_all_exchange": trade_only,
    }  # fmt: skip
    if plan.alone_up_to >= shape.S:
        works["one_process"] = _alone(whole, plan, shape) if group.rank == 0 else lambda: None
    return works


def _alone(whole: Operands, plan: CommPlan, shape: Shape) -> Callable[[], None]:
    leaves = Operands(*(u.detach().requires_grad_() for u in whole))

    def run() -> None:
        out = op_call(leaves, shape, chunk_size=plan.chunk_size)
        torch.autograd.grad(out, list(leaves), torch.ones_like(out))

    return run


def _time_steps(group: CountingGroup, plan: CommPlan, works: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds by way of taking one optimizer step."""

    def timed(name: str, work: Callable[[], None]) -> Contender:
        def run() -> None:
            work()
            group.barrier()

        return Contender(f"{name}_S{plan.step.seq_len}", run, plan.rounds, warm_up=True)

    return interleave(
        [timed(name, work) for name, work in works.items()],
        seed=plan.seed,
        on_sample=lambda name, seconds: _say(group, f"{name}: {seconds:.3f} s"),
    )


def _dims(shape: Shape) -> Dims:
    return Dims(shape.B, shape.S, shape.H, shape.G, shape.R, shape.N, shape.P, shape.N // shape.divisor)


def _say(group: CountingGroup, line: str) -> None:
    """Progress on stderr (stdout may be JSON), by one process."""
    if group.rank == 0:
        print(line, file=sys.stderr, flush=True)
