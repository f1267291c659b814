"""Steps by Megatron's engine with FP8 weights, on a DOUBLE of transformer-engine, beside the same engine in fp32.

Importing this puts the double in place of transformer-engine, for the life of the process: tests call
`tests.support.fp8_process.results` instead, which starts one. Each check returns plain values; the tests decide.
"""

from __future__ import annotations

from tests.support.te_double import install

install()

# Only now: importing megatron-core takes up what transformer-engine there is.
import json  # noqa: E402
import weakref  # noqa: E402
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from contextlib import contextmanager, nullcontext  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from apps.train.lane import Lane  # noqa: E402
from apps.train.metrics import StepClock  # noqa: E402
from apps.train.step import StepResult, train_step  # noqa: E402
from libs.flags.errors import GateRefused  # noqa: E402
from libs.model import HybridLM  # noqa: E402
from libs.model.fp8 import to_fp8  # noqa: E402
from libs.parallel import megatron_buckets as buckets  # noqa: E402
from libs.parallel import megatron_engine as engines  # noqa: E402
from libs.parallel.fp8 import Fp8, Fp8Weights  # noqa: E402
from libs.parallel.fp8_linear import Fp8Linear  # noqa: E402
from libs.parallel.mesh import Groups, Layout, Parallel, open_groups  # noqa: E402
from libs.parallel.together import everyones  # noqa: E402
from tests.support.megatron_facade import buckets_of_two_dtypes, megatron_on_cpu  # noqa: E402
from tests.support.megatron_training import BUCKET_NUMEL, batches, gathered, megatron_engine  # noqa: E402
from tests.support.ranks import TIMEOUT, run_ranks  # noqa: E402
from tests.support.tensor_parallel import config, rough_model, shard_of  # noqa: E402

LOW = Lane(torch.device("cpu"), "a CPU", "bf16", {})
Bits = dict[str, Tensor]


class Trained(NamedTuple):
    """A model under its engine; fp8: None in fp32."""

    model: HybridLM
    engine: engines.MegatronEngine
    fp8: Fp8Weights | None
    groups: Groups

    def steps(self, first: int, last: int, rate: float = 1e-2) -> list[StepResult]:
        clock, dp = StepClock(LOW.device), self.groups.dp.rank
        found = [
            train_step(
                self.model, self.engine, batches(dp, step), rate=rate / (step + 1), clip_norm=0.5, lane=LOW,
                clock=clock, groups=self.groups,
            )
            for step in range(first, last)
        ]  # fmt: skip
        self.engine.settle()
        return found

    def weights(self) -> Bits:
        """In fp32, under the names of checkpoints, on every rank."""
        if self.fp8 is None:
            return {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return everyones(self.groups.dp_cp, self.engine.collect_weights())[0]

    def state(self) -> Bits:
        return gathered(self.groups, self.engine.collect_state())

    def restore(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        if self.fp8 is None:
            self.model.load_state_dict(dict(weights))
        else:
            self.engine.restore_weights(weights)
        self.engine.restore_state(state)

    def quantised(self) -> Bits:
        """Bytes and scales of the FP8 parameters."""
        named: Any = dict(self.model.named_parameters())
        names = () if self.fp8 is None else sorted(self.fp8.names)
        return {f"{n} {k}": t for n in names for k, t in (("", named[n].bytes), ("scale", named[n]._scale_inv))}

    def as_quantised_at_once(self) -> list[str]:
        """FP8 parameters that are not what quantising the whole main values gives, or not transposed alike."""
        assert self.fp8 is not None
        named: Any = dict(self.model.named_parameters())
        weights, wrong = self.weights(), []
        for whole, parts in self.fp8.parts.items():
            for name, rows in zip(parts, weights[whole].split([named[p].shape[0] for p in parts]), strict=True):
                if name in self.fp8.names:
                    parameter = named[name]
                    want = parameter._quantizer(rows.bfloat16())
                    pairs = {"": (parameter.bytes, want.bytes), " scale": (parameter._scale_inv, want._scale_inv)}
                    both = zip(parameter._transpose, want._transpose, strict=True)
                    wrong += [f"{name}{what}" for what, pair in pairs.items() if not torch.equal(*pair)]
                    wrong += [] if all(torch.equal(*pair) for pair in both) else [f"{name} transposed"]
        return wrong


@contextmanager
def facade() -> Iterator[None]:
    with megatron_on_cpu(), buckets_of_two_dtypes():
        yield


def trained(
    groups: Groups, recipe: str | None, *, sequence_parallel: bool = False, recompute: bool = False, **options: Any
) -> Trained:
    full = rough_model(config(), activation_checkpointing="block" if recompute else "none")
    model = shard_of(full, Parallel(groups, sequence_parallel))
    fp8 = None if recipe is None else to_fp8(model, model.config, groups.tp.size, Fp8("on", recipe))
    engine = megatron_engine(model, groups, **{"bucket_numel": BUCKET_NUMEL, "fp8": fp8, **options})
    return Trained(model, engine, fp8, groups)


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    return [name for name in one if not torch.equal(one[name], other[name])]


def compare(groups: Groups, recipe: str, **options: Any) -> dict[str, Any]:
    """FP8 and fp32 from the same weights. Building it has passed the check of what was built."""
    with facade():
        ours, theirs = trained(groups, recipe, **options), trained(groups, None, **options)
        begun = theirs.weights()
        exact = differing(ours.weights(), begun)
        watch = ours.engine.first_update()
        assert watch is not None
        got = ours.steps(0, 1)
        watch.refuse_unless_trained(got[0].losses.loss)
        got, want = [*got, *ours.steps(1, 4)], theirs.steps(0, 4)
        now, then = ours.weights(), theirs.weights()
        spread = {name: float((now[name] - then[name]).abs().mean()) for name in now}
        moved = {name: float((then[name] - begun[name]).abs().mean()) for name in now}
        buffers = sorted(str(buffer.param_dtype) for buffer in ours.engine._ddp.buffers)
        return {
            "loss": [(a.losses.loss, b.losses.loss) for a, b in zip(got, want, strict=True)],
            "norm": [(a.grad_norm, b.grad_norm) for a, b in zip(got, want, strict=True)],
            "not exact at first": exact,
            "wrong": ours.as_quantised_at_once(),
            "apart": max(spread[name] / moved[name] for name in now),
            "buffers": buffers,
            "fp8": len(ours.fp8.names if ours.fp8 else ()),
            "in fp8": sum(t.numel() for name, t in ours.quantised().items() if not name.endswith("scale")),
            "groups": len(ours.engine._ddp.bucket_groups),
            "replicas differ": [
                differing(ours.quantised(), other) for other in everyones(groups.dp_cp, ours.quantised())
            ],
        }


def resume(groups: Groups, recipe: str) -> dict[str, Any]:
    """An unbroken run, one that goes on in another engine, and one that goes through an engine in fp32."""
    with facade():
        first, second, third = (trained(groups, recipe) for _ in range(3))
        between = trained(groups, None)
        first.steps(0, 2)
        weights, state, halfway = first.weights(), first.state(), {n: t.clone() for n, t in first.quantised().items()}
        rounded = dict(weights)
        named: Any = dict(first.model.named_parameters())
        assert first.fp8 is not None
        for whole, parts in first.fp8.parts.items():
            values = [named[p].float() if p in first.fp8.names else named[p].detach() for p in parts]
            rounded[whole] = torch.cat(values)
        second.steps(0, 1)  # so that there is something to overwrite
        second.restore(weights, state)
        bytes_back = differing(second.quantised(), halfway)
        between.restore(weights, state)
        third.restore(between.weights(), between.state())
        lost = [*differing(third.weights(), weights), *differing(third.state(), state)]
        unbroken, resumed = first.steps(2, 4), second.steps(2, 4)
        third.restore(rounded, state)
        found = {
            "losses": [r.losses.loss for r in unbroken] == [r.losses.loss for r in resumed],
            "bytes": bytes_back,
            "weights": differing(first.weights(), second.weights()),
            "state": differing(first.state(), second.state()),
            "through fp32": lost,
        }
        third.steps(2, 4)
        found["of rounded weights"] = len(differing(first.weights(), third.weights()))
        return found


def recomputed(groups: Groups, recipe: str) -> list[str]:
    """Gradients of a step with activation checkpointing that are not those without."""
    with facade():
        pair = [trained(groups, recipe, recompute=recompute) for recompute in (False, True)]
        for one in pair:
            one.steps(0, 1, rate=0.0)
        plain, again = (one.engine.gradients() for one in pair)
        assert all(bool(grad.any()) for grad in plain.values())
        return differing(plain, again)


def refusal(work: Callable[[], object]) -> str:
    try:
        work()
    except GateRefused as refused:
        return str(refused)
    return "passed"


def mutations(groups: Groups) -> dict[str, Any]:
    """What must not pass: each is one thing wrong."""
    found: dict[str, Any] = {}
    te = "transformer_engine.pytorch"
    with facade():
        with mock.patch(f"{te}.quantized_model_init", return_value=nullcontext()):
            found["silent bf16"] = refusal(lambda: trained(groups, "tensorwise"))
        with mock.patch.object(engines, "build_optimizer", side_effect=AssertionError("too late")):
            found["a mock"] = refusal(lambda: with_a_mock(groups))
        still = trained(groups, "tensorwise")
        watch = still.engine.first_update()
        assert watch is not None
        loss = still.steps(0, 1, rate=0.0)[0].losses.loss
        found["no change"] = refusal(lambda: watch.refuse_unless_trained(loss))
        stale = trained(groups, "blockwise")
        with mock.patch.object(buckets, "complete_fp8"):
            stale.steps(0, 1)
        found["transposed copies of the step before"] = stale.as_quantised_at_once()
        fine = trained(groups, "blockwise")
        fine.steps(0, 1)
        found["fine"] = fine.as_quantised_at_once()
        found["memory kept"] = keeps_its_origin()
    return found


def with_a_mock(groups: Groups) -> None:
    model = shard_of(rough_model(config()), Parallel(groups))
    fp8 = to_fp8(model, model.config, groups.tp.size, Fp8("on", "tensorwise"))
    model.left_over = mock.MagicMock()
    megatron_engine(model, groups, fp8=fp8)


def keeps_its_origin() -> bool:
    """Whether a linear holds on to the fp32 weight that it was made of."""
    weight = torch.randn(32, 32)
    seen = weakref.ref(weight)
    linear = Fp8Linear(weight, Fp8("on", "tensorwise"))
    del weight
    return seen() is not None or linear.linear.weight.shape != (32, 32)


def check_alone(groups: Groups) -> dict[str, Any]:
    return {
        "tensorwise": compare(groups, "tensorwise"),
        "blockwise": compare(groups, "blockwise", overlap=False),
        "resume": resume(groups, "tensorwise"),
        "recomputed": {recipe: recomputed(groups, recipe) for recipe in ("tensorwise", "blockwise")},
        "mutations": mutations(groups),
    }


def check_two(groups: Groups) -> dict[str, Any]:
    tp2 = open_groups(Layout(tp=2), "gloo", TIMEOUT, store=groups.store)
    cp2 = open_groups(Layout(cp=2), "gloo", TIMEOUT, store=groups.store)
    return {
        "dp2": compare(groups, "tensorwise"),
        "dp2 blockwise": compare(groups, "blockwise"),
        "dp2, one exchange": compare(groups, "blockwise", overlap=False),
        "tp2": compare(tp2, "tensorwise"),
        "tp2 sp": compare(tp2, "blockwise", sequence_parallel=True, recompute=True),
        "cp2": compare(cp2, "tensorwise"),
        "resume": resume(groups, "blockwise"),
        "resume tp2": resume(tp2, "blockwise"),
    }


def main() -> None:
    """Everything, as one line of JSON."""
    print(json.dumps({"one": run_ranks(check_alone, Layout()), "two": run_ranks(check_two, Layout(dp=2))}))
