# B sequences, S tokens, H heads, P head width
"""One point on a GPU: warm up, check what the oracle's shapes cannot, read peak memory, then time in rounds.

Not for the choice of points (plan.py) or for conclusions (summary.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apps.eval.bench.correctness import Outcome, relative_error
from apps.eval.bench.cuda import floors
from apps.eval.bench.cuda.accuracy import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, output_gradient
from apps.eval.bench.cuda.calls import (
    UPSTREAM_ERRORS,
    Call,
    bf16_operands,
    forward_runner,
    leaves_of,
    op_call,
    training_runner,
)
from apps.eval.bench.cuda.plan import REFERENCE, CudaPlan, Point, Setting, contender_name
from apps.eval.bench.interleave import Contender, interleave
from apps.eval.bench.operands import Operands
from apps.eval.bench.ops import RedGate
from apps.eval.bench.receipt import LeftOut, Memory, Sampled
from libs.flags.errors import UserError
from libs.kernels.mimo import mamba3_mimo

_FLUSH_BYTES = 256 << 20  # several times the L2 cache, and long enough to queue a call behind
PREFIX_TOKENS = 256  # the output there depends on nothing behind it, so the oracle need not walk further


class Measured(NamedTuple):
    """Of one point, or of several together."""

    sampled: list[Sampled]
    memory: list[Memory]
    outcomes: list[Outcome]
    left_out: list[LeftOut]


class Runner(NamedTuple):
    """A contender before it is known to run."""

    name: str
    what: str
    run: Callable[[], object]
    flops: float | None


class EventClock:
    """Seconds of one call between two CUDA events, on a cold L2 cache. Gaps that the host leaves are in it."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """What one call takes at most beyond what is allocated before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def measure_point(
    plan: CudaPlan, point: Point, device: torch.device, *, clock: Callable[[Callable[[], object]], float],
    others: Sequence[tuple[str, Call]], late: Callable[[], bool], on_sample: Callable[[str, float], None],
) -> Measured:  # fmt: skip
    """Everything at one point. `others`: contenders beside ours, already found right by the oracle.

    A contender that is refused or does not fit into memory is left out with the reason; one that fails otherwise, at a
    shape next to one where it was right, is our mistake and is raised.

    Raises:
        RedGate: a setting disagrees with the oracle or with the others here; nothing has been timed at this point.
    """
    shape = point.shape
    operands = bf16_operands(shape, seed=plan.seed, device=device)
    grad_out = output_gradient(shape, seed=plan.seed, device=device)
    done = Measured([], [], [], [])
    runners: list[Runner] = []
    first: list[Tensor] | None = None
    want = prefix_of_oracle(operands, point)
    for setting in plan.settings:
        call = _call_of(setting, point)
        name = f"{setting.name} at {point}"
        if late():
            done.left_out.append(LeftOut(name=name, reason="the time allowed was over"))
            continue
        try:
            first = _admit(name, call, operands, grad_out, want, first, done, point, device)
        except (UserError, torch.OutOfMemoryError) as error:
            done.left_out.append(LeftOut(name=name, reason=str(error).splitlines()[0]))
            continue
        runners += _runners_of(setting.name, call, setting.forward, point, operands, grad_out)
    first = None  # its memory is needed
    if not runners:
        return done
    if not all(outcome.passed for outcome in done.outcomes):
        raise RedGate(done.outcomes)
    for other, call in others:
        theirs = list(_runners_of(other, call, True, point, operands, grad_out))
        try:
            for runner in theirs:
                runner.run()
        except UPSTREAM_ERRORS as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
            done.left_out.append(LeftOut(name=f"{other} at {point}", reason=reason))
            continue
        runners += theirs
    runners += _floor_runners(plan, point, device)
    contenders = [Contender(runner.name, runner.run, plan.rounds, warm_up=True) for runner in runners]
    samples = interleave(contenders, seed=plan.seed, on_sample=on_sample, clock=clock, late=late)
    done.sampled.extend(
        Sampled.of(runner.name, runner.what, samples[runner.name], flops=runner.flops, warm_up=True)
        for runner in runners
    )
    return done


def _call_of(setting: Setting, point: Point) -> Call:
    return lambda operands: op_call(operands, point.shape, REFERENCE.C, setting.gates)


def _admit(
    name: str, call: Call, operands: Operands, grad_out: Tensor, want: Tensor, first: list[Tensor] | None,
    done: Measured, point: Point, device: torch.device,
) -> list[Tensor]:  # fmt: skip
    """Run a setting forward and backward once, compiling it; check it; read its peak. The gradients of the first."""
    with torch.no_grad():
        out = call(operands)
    prefix_error = relative_error(out[:, :PREFIX_TOKENS], want)
    done.outcomes.append(Outcome(f"{name}, output of the first tokens vs oracle", prefix_error, FORWARD_TOLERANCE))
    gradients: list[Tensor] = []
    leaves = leaves_of(operands)

    def train() -> None:
        gradients[:] = torch.autograd.grad(call(leaves), list(leaves), grad_out)

    train()
    gradients.clear()
    peak = peak_bytes(train, device)
    done.memory.append(
        Memory(
            name=name, seq_len=point.S, input_bytes=operands.n_bytes(), allocator_bytes=peak,
            resident_bytes=None, extra_bytes=peak, multiple=peak / operands.n_bytes(),
        )
    )  # fmt: skip
    if first is None:
        return gradients
    pairs = zip(gradients, first, strict=True)
    worst = max((relative_error(g, w.double()) for g, w in pairs), key=lambda e: (e != e, e))
    agreement = f"{name}, gradients vs the first setting's (each within {GRADIENT_TOLERANCE})"
    done.outcomes.append(Outcome(agreement, worst, 2 * GRADIENT_TOLERANCE))
    return first


def prefix_of_oracle(operands: Operands, point: Point) -> Tensor:
    """(B, PREFIX_TOKENS, H, P) float64: the oracle's output over the first tokens."""
    n = PREFIX_TOKENS
    by_token = {
        name: tensor[:, :, :n] if name.endswith("_BHS") else tensor[:, :n]
        for name, tensor in operands._asdict().items()
        if "S" in name.rsplit("_", 1)[1]
    }
    exact = Operands(*(tensor.double() for tensor in operands._replace(**by_token)))
    with torch.no_grad():
        return mamba3_mimo(*exact, 1, point.shape.divisor, torch.float64, backend="reference")


def _floor_runners(plan: CudaPlan, point: Point, device: torch.device) -> Iterator[Runner]:
    size, n_bytes = plan.gemm_size, plan.copy_bytes
    what = f"torch.mm bf16 {size} x {size} x {size}"
    yield Runner(f"gemm_{point}", what, floors.gemm_runner(size, device), floors.gemm_flops(size))
    yield Runner(f"copy_{point}", f"device copy of {n_bytes} bytes", floors.copy_runner(n_bytes, device), None)


def _runners_of(
    who: str, call: Call, forward: bool, point: Point, operands: Operands, grad_out: Tensor
) -> Iterator[Runner]:
    shape = point.shape
    if forward:
        name = contender_name("forward", who, point)
        flops = floors.needed_flops(shape, training=False)
        yield Runner(name, f"{who}, B={point.B} S={point.S}, forward, no_grad", forward_runner(call, operands), flops)
    name, flops = contender_name("forward_backward", who, point), floors.needed_flops(shape, training=True)
    run = training_runner(call, operands, grad_out)
    yield Runner(name, f"{who}, B={point.B} S={point.S}, forward + backward", run, flops)
