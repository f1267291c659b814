"""What was built, and what step 1 did, with stand-ins for transformer-engine's tensors, which need a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from libs.flags.errors import GateRefused
from libs.parallel.fp8_built import Expected, digests, refuse_unless_built, refuse_unless_trained
from libs.parallel.mesh import Group


class Quantized(torch.Tensor):
    """Stands for QuantizedTensor: bytes beside a tensor that only has a shape."""

    _data: Tensor

    def detach(self) -> Quantized:
        out = super().detach()
        assert isinstance(out, Quantized)
        out._data = self._data
        return out


class Float8(Quantized):
    def get_high_precision_init_val(self) -> None: ...


class OtherRecipe(Quantized):
    def get_high_precision_init_val(self) -> None: ...


class Bare(Quantized):
    """One whose initial values are gone."""


class Buffer(NamedTuple):
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    params: list[nn.Parameter]


def quantized(rows: int, columns: int, kind: type[Quantized] = Float8) -> nn.Parameter:
    tensor = torch.zeros(rows, columns).as_subclass(kind)
    tensor._data = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    return nn.Parameter(tensor)


class Layer(nn.Module):
    def __init__(self, kind: type[Quantized] | None = Float8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 16)) if kind is None else quantized(16, 16, kind)
        self.norm = nn.Parameter(torch.ones(16))


def model(*kinds: type[Quantized] | None) -> nn.Sequential:
    return nn.Sequential(*(Layer(kind) for kind in kinds or (Float8, Float8)))


WANTED = Expected(frozenset({"0.weight", "1.weight"}), Float8, Quantized)


def buffers(of: nn.Module, dtype: torch.dtype = torch.uint8) -> list[Buffer]:
    fp8 = [p for p in of.parameters() if isinstance(p, Quantized)]
    return [
        Buffer(dtype, torch.float32, fp8),
        Buffer(torch.bfloat16, torch.float32, [p for p in of.parameters() if not isinstance(p, Quantized)]),
    ]


def refusal(built: nn.Module, **changes: Any) -> str:
    given: dict[str, Any] = {"buffers": buffers(built), "wanted": WANTED, "before_optimizer": True} | changes
    with pytest.raises(GateRefused) as caught:
        refuse_unless_built(built, given["buffers"], given["wanted"], "on", before_optimizer=given["before_optimizer"])
    return str(caught.value)


def test_what_was_asked_for_passes() -> None:
    built = model()
    refuse_unless_built(built, buffers(built), WANTED, "on", before_optimizer=True)


def test_silent_bf16_is_refused() -> None:
    """What megatron-core does without transformer-engine: only bf16 parameters, one bf16 buffer."""
    built = model(None, None)
    said = refusal(built, buffers=[Buffer(torch.bfloat16, torch.float32, list(built.parameters()))])
    assert "0 FP8 parameters of 2 expected; in high precision or absent: 0.weight, 1.weight" in said
    assert "no (torch.uint8, torch.float32) buffer to gather; there are: (torch.bfloat16, torch.float32)" in said


@pytest.mark.parametrize(
    ("make", "change", "said"),
    [
        (lambda: model(Float8, None), {}, "1 FP8 parameters of 2 expected; in high precision or absent: 1.weight"),
        (lambda: model(Float8, Float8, Float8), {}, "3 FP8 parameters of 2 expected; not expected to be: 2.weight"),
        (lambda: model(Float8, OtherRecipe), {}, "not Float8: 1.weight (OtherRecipe)"),
        (lambda: model(), {"wanted": WANTED._replace(names=frozenset())}, "no FP8 parameters are expected"),
        (lambda: model(), {"buffers": []}, "there are: none"),
    ],
)
def test_each_fault_of_building_is_refused(make: Callable[[], nn.Module], change: dict[str, Any], said: str) -> None:
    assert said in refusal(make(), **change)


def test_parameters_must_be_in_the_buffer_that_is_gathered() -> None:
    built = model()
    only_first = [Buffer(torch.uint8, torch.float32, [built.get_parameter("0.weight")])]
    assert "not in the uint8 buffer: 1.weight" in refusal(built, buffers=only_first)


def test_initial_values_are_wanted_only_before_the_optimizer() -> None:
    built = model(Bare, Bare)
    wanted = WANTED._replace(tensor_class=Bare)
    assert "initial values in high precision are gone: 0.weight, 1.weight" in refusal(built, wanted=wanted)
    refuse_unless_built(built, buffers(built), wanted, "on", before_optimizer=False)


def test_megatrons_own_mocks_are_found() -> None:
    """Without transformer-engine its linears are mocks that can be called, and a model of them is built."""
    te = pytest.importorskip("megatron.core.extensions.transformer_engine")
    if te.HAVE_TE:
        pytest.skip("transformer-engine is installed: there are no mocks")
    mock: Any = te.TEColumnParallelLinear(16, 16)
    for hide in ("attribute", "list", "mapping"):
        built = model()
        layer = built[1]
        if hide == "attribute":
            layer.linear = mock
        elif hide == "list":
            layer.linears = [1, mock]
        else:
            layer.linears = {"first": mock}
        said = refusal(built)
        assert "a mock stands in for a class of transformer-engine" in said
        assert "1." in said


@dataclasses.dataclass(frozen=True, eq=False)
class TwoRanks(Group):
    """A group whose other rank answers with `other` of what this one sends."""

    other: Callable[[Tensor], Tensor] = Tensor.clone

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor, self.other(tensor)])


def two(other: Callable[[Tensor], Tensor]) -> Group:
    return TwoRanks(object(), 0, 2, (0, 4), other)  # type: ignore[arg-type]


def step(built: nn.Module) -> None:
    for parameter in built.parameters():
        if isinstance(parameter, Quantized):
            parameter._data[3, 5] += 1


def test_a_step_that_changes_bytes_passes() -> None:
    built = model()
    before = digests(built, Quantized)
    assert list(before) == ["0.weight", "1.weight"]
    step(built)
    after = digests(built, Quantized)
    refuse_unless_trained(before, after, 3.0, Group(), "on")
    refuse_unless_trained(before, after, 3.0, two(Tensor.clone), "on")


def test_a_digest_sees_values_and_places() -> None:
    built = model()
    data = built[0].weight._data
    first = digests(built, Quantized)["0.weight"]
    data[0, :8], data[0, 8:] = data[0, 8:].clone(), data[0, :8].clone()
    second = digests(built, Quantized)["0.weight"]
    data[15, 15] ^= 128
    third = digests(built, Quantized)["0.weight"]
    assert len({int(first), int(second), int(third)}) == 3


def test_a_step_without_effect_is_refused() -> None:
    before = digests(model(), Quantized)
    with pytest.raises(GateRefused, match="no FP8 parameter has changed in step 1"):
        refuse_unless_trained(before, before, 3.0, Group(), "on")


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(loss: float) -> None:
    built = model()
    before = digests(built, Quantized)
    step(built)
    with pytest.raises(GateRefused, match=f"loss of step 1 is {loss}"):
        refuse_unless_trained(before, digests(built, Quantized), loss, Group(), "on")


def test_replicas_that_differ_and_a_refusal_elsewhere_stop_every_rank() -> None:
    built = model()
    before = digests(built, Quantized)
    step(built)
    after = digests(built, Quantized)
    with pytest.raises(GateRefused, match=r"replicas differ: 1\.weight on rank 4"):
        refuse_unless_trained(before, after, 3.0, two(lambda mine: mine + torch.tensor([0, 1, 0])), "on")
    with pytest.raises(GateRefused, match="refused on rank 4"):
        refuse_unless_trained(before, after, 3.0, two(lambda mine: mine + torch.tensor([0, 0, 1])), "on")


def test_a_model_without_fp8_parameters_is_refused() -> None:
    with pytest.raises(GateRefused, match="there is no FP8 parameter"):
        refuse_unless_trained({}, {}, 3.0, Group(), "on")
