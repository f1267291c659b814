"""`fathom bench psiv`: PsiV, stage A. What could keeping x * mimo_x from forward to backward win at most?

Stage A (`python_precompute`) makes the product once, outside the kernels, and hands it in. Timed is forward + backward
of the scan; the whole step is for `fathom bench ab`. Not for the later stages: `fathom bench ops --device cuda`.
"""
# B sequences  S tokens  H heads  P head width  R rank

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from apps.eval.bench.contenders import op_call
from apps.eval.bench.correctness import CHECK_SHAPE, Outcome, compare, output_and_gradients
from apps.eval.bench.follows import require_reason
from apps.eval.bench.interleave import Contender, interleave, wall_seconds
from apps.eval.bench.machine import Where, gpu_of
from apps.eval.bench.operands import Operands, Shape, make_operands
from apps.eval.bench.ops import RedGate
from apps.eval.bench.receipt import NO_CHANGE, Check, Comparison, Decision, Ratio, Receipt, Sampled
from libs.flags.facts import Facts
from libs.kernels.mimo.api import BACKENDS, XLA_DRIVERS
from libs.kernels.mimo.capabilities import HOPPER
from libs.kernels.mimo.shapes import MimoInputs, check_inputs
from libs.kernels.mimo.sm90.psiv import STAGES, materialise
from libs.kernels.mimo.xla.scan import PSIV_STAGES, mimo_xla

STAGE: Literal["python_precompute"] = "python_precompute"
GATE = "psiv_cache"
SAVED = 2  # of the three times that the product is made without a cache: forward, and twice in the backward
Call = Callable[[Operands], Tensor]


class PsivPlan(NamedTuple):
    device: Literal["cpu", "cuda"]
    shape: Shape
    chunk_size: int
    rounds: int
    threads: int
    seed: int


class Offer(BaseModel):
    """A backend of the scan: which stages of the gate it has, and whether it trains on this device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str
    stages: list[str]
    runs_here: bool
    reason: str | None = Field(description="why it does not run on this device")


class Arm(NamedTuple):
    """A way to run the scan, forward and backward."""

    name: str
    what: str
    call: Call


class PsivReceipt(Receipt):
    """A receipt with what each backend offers.

    result: measured, where a backend that trains here has the stage. Otherwise the figures are of an experiment, which
    decides nothing, and say so. product_bytes: what the stage keeps for one layer.
    """

    offers: list[Offer]
    result: Literal["measured", "no_backend_here_has_the_stage"]
    product_bytes: int

    @model_validator(mode="after")
    def _result_follows_from_offers(self) -> Self:
        able = any(offer.runs_here and STAGE in offer.stages for offer in self.offers)
        if able != (self.result == "measured"):
            raise ValueError(f"result {self.result}, but the offers say {'that one' if able else 'that none'} has it")
        if (self.result == "measured") != (self.comparison is not None):
            raise ValueError(f"result {self.result} {'without' if able else 'with'} a comparison of the gate's values")
        if self.comparison is None:
            if len(self.ratios) != 2:
                raise ValueError(f"{len(self.ratios)} ratios: there are two, what is saved and at most what could be")
            require_reason(self.decision.reason, _decision(*self.ratios).reason)
        return self


def offers_on(device: str) -> list[Offer]:
    """Every backend, in the order in which "auto" tries them."""
    stages = {name: list(PSIV_STAGES) for name in XLA_DRIVERS} | {HOPPER: [str(stage) for stage in STAGES]}
    found = []
    for name, probe in BACKENDS.items():
        refusal = probe(device)
        found.append(Offer(backend=name, stages=stages.get(name, []), runs_here=refusal is None, reason=refusal))
    return found


def run_psiv(plan: PsivPlan, *, command: Sequence[str], machine: str | None) -> PsivReceipt:
    """Check, measure and sum up.

    Raises:
        RedGate: a way to run the scan disagrees with the oracle; nothing has been timed then.
        UserError: no such device. GateRefused: the environment asks for a gate that cannot be honoured.
    """
    gpu = gpu_of(plan.device)
    facts = Facts(device=plan.device, mimo_backend="chunked" if gpu is None else HOPPER)
    where = Where(facts, gpu, threads=plan.threads, machine=machine)
    torch.set_num_threads(plan.threads)
    off, on, lane = _arms(plan)
    arms = list(dict.fromkeys((off, on, lane)))
    outcomes = _check(plan, arms)
    if not all(outcome.passed for outcome in outcomes):
        raise RedGate(outcomes)
    sampled, product_bytes = _measure(plan, arms)
    offers = offers_on(plan.device)
    able = any(offer.runs_here and STAGE in offer.stages for offer in offers)
    comparison = None
    if able:
        pair = sampled[off.name], sampled[on.name]
        comparison = Comparison.of(*pair, scope="forward_backward", gate=(GATE, "off", STAGE))
    saved = Ratio.of(f"{on.name}_over_{off.name}", sampled[on.name], sampled[off.name])
    ceiling = Ratio.of(f"saved_products_over_{lane.name}", sampled["product"], sampled[lane.name], scale=SAVED)
    return PsivReceipt(
        what=f"PsiV stage A at {plan.shape.describe()}: the product made once, against made anew",
        subject="psiv",
        correctness=[Check(**outcome._asdict(), passed=outcome.passed) for outcome in outcomes],
        contenders=list(sampled.values()),
        ratios=[saved, ceiling],
        memory=[],
        aims=[],
        offers=offers,
        result="measured" if able else "no_backend_here_has_the_stage",
        product_bytes=product_bytes,
        left_out=[],
        notes=_notes(lane, able),
        comparison=comparison,
        decision=_decision(saved, ceiling) if comparison is None else comparison.decision(),
        **where.fields({**plan._asdict(), "shape": plan.shape.describe()}, command),
    )


def _arms(plan: PsivPlan) -> tuple[Arm, Arm, Arm]:
    """Without the stage, with it, and the backend that a training step here would use."""
    if plan.device == "cuda":
        from apps.eval.bench.cuda.calls import op_call as hopper_call
        from libs.kernels.mimo.sm90.gates import KernelGates

        def hopper(operands: Operands, gates: KernelGates) -> Tensor:
            return hopper_call(operands, plan.shape, plan.chunk_size, gates)

        off = Arm("tilelang_off", "Hopper kernels, every product made anew", partial(hopper, gates=KernelGates()))
        on = Arm(
            f"tilelang_{STAGE}", "Hopper kernels that read the product", partial(hopper, gates=KernelGates(psiv=STAGE))
        )
        return off, on, off
    off = Arm("xla_loop_off", "the XLA loop, driven eagerly", partial(_eager_loop, plan=plan, psiv=False))
    on = Arm(
        f"xla_loop_{STAGE}", "the same with the product made before it", partial(_eager_loop, plan=plan, psiv=True)
    )
    lane = Arm("chunked", "mamba3_mimo, backend chunked, which has no such stage",
               partial(op_call, shape=plan.shape, chunk_size=plan.chunk_size))  # fmt: skip
    return off, on, lane


def _eager_loop(operands: Operands, *, plan: PsivPlan, psiv: bool) -> Tensor:
    """Backend xla_loop's own code on tensors of this device, (B,S,H,P); its stage is the one that XLA would compile."""
    q, k, v, adt, dt, trap, q_bias, k_bias, mimo_v, mimo_z, mimo_out, angles, d, z = operands
    inputs = MimoInputs(
        q=q, k=k, v=v, adt=adt, dt=dt, trap=trap, q_bias=q_bias, k_bias=k_bias, mimo_v=mimo_v, angles=angles,
        mimo_z=mimo_z, mimo_out=mimo_out, d=d, z=z, norm_weight=None,
    )  # fmt: skip
    dims = check_inputs(inputs, plan.shape.divisor)
    return mimo_xla(inputs, dims, plan.chunk_size, 1e-5, None, driver="loop", psiv=psiv)[0]


def _check(plan: PsivPlan, arms: Sequence[Arm]) -> list[Outcome]:
    shape = plan.shape._replace(S=CHECK_SHAPE.S)
    if plan.device == "cuda":
        from apps.eval.bench.cuda import accuracy
        from apps.eval.bench.cuda.calls import bf16_operands

        device = torch.device("cuda")
        operands = bf16_operands(shape, seed=plan.seed, device=device)
        grad_out = accuracy.output_gradient(shape, seed=plan.seed, device=device)
        want = accuracy.oracle(operands, shape, grad_out)
        return [o for arm in arms for o in accuracy.compare(arm.name, arm.call, operands, grad_out, want)]
    exact = make_operands(shape, seed=plan.seed, dtype=torch.float64)
    want = output_and_gradients(lambda x: op_call(x, shape, chunk_size=1, backend="reference"), exact)
    single = make_operands(shape, seed=plan.seed)
    return [outcome for arm in arms for outcome in compare(arm.name, arm.call, single, want)]


def _measure(plan: PsivPlan, arms: Sequence[Arm]) -> tuple[dict[str, Sampled], int]:
    """All arms and the product alone, interleaved; and the product's bytes."""
    clock: Callable[[Callable[[], object]], float] = wall_seconds
    if plan.device == "cuda":
        from apps.eval.bench.cuda.calls import bf16_operands
        from apps.eval.bench.cuda.measure import EventClock

        operands = bf16_operands(plan.shape, seed=plan.seed, device=torch.device("cuda"))
        clock = EventClock(torch.device("cuda"))
    else:
        operands = make_operands(plan.shape, seed=plan.seed)
    leaves = [tensor.requires_grad_() for tensor in operands]
    grad_out = torch.ones_like(operands.v_BSHP)

    def product() -> Tensor:
        with torch.no_grad():
            return materialise(operands.v_BSHP, operands.mimo_v_HRP)

    def train(call: Call) -> None:
        torch.autograd.grad(call(operands), leaves, grad_out)

    runs: dict[str, Callable[[], object]] = {arm.name: partial(train, arm.call) for arm in arms}
    runs["product"] = product
    what = {arm.name: f"{arm.what}; forward + backward" for arm in arms}
    what["product"] = "v * mimo_x of every rank, written to memory once"
    contenders = [Contender(name, run, plan.rounds, warm_up=True) for name, run in runs.items()]
    samples = interleave(contenders, seed=plan.seed, on_sample=lambda name, seconds: None, clock=clock)
    sampled = {name: Sampled.of(name, what[name], times, flops=None, warm_up=True) for name, times in samples.items()}
    return sampled, product().nbytes


def _decision(saved: Ratio, ceiling: Ratio) -> Decision:
    """Of an experiment: nothing."""
    return Decision(
        value="record",
        reason=f"no backend that trains here has {STAGE}; {SAVED} products take {_share(ceiling)} of "
        f"{ceiling.denominator}'s forward + backward; XLA's loop, driven eagerly, takes {_share(saved)} of its time "
        f"with it; {NO_CHANGE}",
    )


def _share(ratio: Ratio) -> str:
    bounds = "" if ratio.low is None or ratio.high is None else f" ({ratio.low:.2%} to {ratio.high:.2%})"
    return f"{ratio.value:.2%}{bounds}"


def _notes(lane: Arm, able: bool) -> list[str]:
    notes = [
        "without a cache the Hopper kernels make the product in the forward and twice in the backward; a stage can "
        f"save {SAVED} of the three",
        f"saved products over {lane.name}: {SAVED} times the product alone over forward + backward. An upper bound: "
        "here the product is written to memory, which inside a kernel it need not be; reading it back is not counted",
        "forward + backward of one scan, not a training step: the gate's stage follows `fathom bench ab` alone",
    ]
    if not able:
        notes.append(
            "an experiment: the code of backend xla_loop, which trains on XLA devices only, run eagerly by this CPU. "
            "Nothing is fused as XLA would fuse it, so this says nothing of a TPU"
        )
    return notes
