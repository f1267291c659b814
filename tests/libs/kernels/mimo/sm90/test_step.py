"""The decode kernel, run on the CPU from the source that compiles for Hopper, against the step in plain torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from libs.flags.errors import UserError
from libs.kernels.mimo import MimoState, mamba3_mimo, mamba3_mimo_step
from libs.kernels.mimo.sm90 import decode, launch, step
from libs.kernels.mimo.sm90.dialect import CpuDialect, CudaDialect
from libs.kernels.mimo.sm90.inspect import inspect
from libs.kernels.mimo.sm90.step import StepSpec, make_step
from libs.kernels.mimo.sm90.tiles import SHAPES
from tests.libs.kernels.mimo.sm90.grid_cases import needs_nvcc
from tests.support.mimo import Shape, operands, random_state, relative_error, slice_tokens

SLOTS = 7
CASES = {
    "reference options": Shape(B=3, S=1),
    "norm, a group per head, half rotation, odd P": Shape(B=2, S=1, G=4, P=5, divisor=2, norm=True),
    "several tiles, the last one ragged": Shape(B=1, S=1, H=2, G=2, R=2, N=128, P=67, norm=True),
    "rank 8, nothing optional": Shape(B=2, S=1, R=8, z=False, out=False, d=False),
    "rank 1, gate and norm without MIMO_Out": Shape(B=2, S=1, R=1, P=24, out=False, norm=True),
}
REST = [name for name in CASES if name != "reference options"]


def one_token(shape: Shape, dtype: torch.dtype, seed: int = 0, t: int = 0) -> dict[str, Tensor | None]:
    """Operands of one token by the names that both entries take."""
    u = slice_tokens(operands(shape, dtype, seed), t, t + 1)
    names = ("q_bias", "k_bias", "mimo_v", "mimo_z", "mimo_out", "d", "norm_weight")
    public = ("Q_bias", "K_bias", "MIMO_V", "MIMO_Z", "MIMO_Out", "D", "norm_weight")
    return dict(zip(names, (u[name] for name in public), strict=True)) | {
        "q": u["Q"][:, 0], "k": u["K"][:, 0], "v": u["V"][:, 0], "adt": u["ADT"][..., 0], "dt": u["DT"][..., 0],
        "trap": u["Trap"][..., 0], "angles": u["Angles"][:, 0], "z": None if u["Z"] is None else u["Z"][:, 0],
    }  # fmt: skip


def all_slots(shape: Shape, dtype: torch.dtype) -> MimoState:
    """A full set of slots; k and x in the dtype of the values."""
    exact = random_state(shape, SLOTS, torch.float64)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return MimoState(exact.angle.to(acc), exact.ssm.to(acc), exact.k.to(dtype), exact.x.to(dtype))


def rows(state: MimoState, slots: Tensor) -> MimoState:
    """The states in some slots, copied."""
    return MimoState(*(part[slots.long()] for part in state))


def error(shape: Shape, dtype: torch.dtype = torch.float64, slots: tuple[int, ...] = (5, 2, 6)) -> float:
    """Largest relative error of the output and the four parts, against torch. Infinite if another slot changed."""
    at = torch.tensor(slots[: shape.B], dtype=torch.int32)
    state = all_slots(shape, dtype)
    before = MimoState(*(part.clone() for part in state))
    token = one_token(shape, dtype)
    exact = {name: None if u is None else u.double() for name, u in token.items()}
    known = MimoState(*(part.double() for part in rows(state, at)))
    want, moved = mamba3_mimo_step(known, **exact, rotary_dim_divisor=shape.divisor)
    got = decode.mimo_step_sm90(state, at, **token, rotary_dim_divisor=shape.divisor)
    idle = torch.tensor([slot for slot in range(SLOTS) if slot not in slots[: shape.B]])
    if not all(torch.equal(old, new) for old, new in zip(rows(before, idle), rows(state, idle), strict=True)):
        return float("inf")
    pairs = zip((got, *rows(state, at)), (want, *moved), strict=True)
    return max(relative_error(g, w) for g, w in pairs)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles start as NaN, so reading before writing shows."""
    monkeypatch.setattr(launch, "cpu_dialect", lambda precision: CpuDialect(precision, poison=True))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", [*[*CASES][:-1], pytest.param([*CASES][-1], marks=pytest.mark.slow)])
def test_fp64_equals_the_step_in_torch(name: str) -> None:
    """To the last digits, in every option and for any P; slots that are not named keep every bit."""
    assert error(CASES[name]) < 1e-12


def test_fp32_and_emulated_bf16() -> None:
    """fp32 to 1e-6; with bf16 operands and state the error is that of bf16, and not zero."""
    assert error(CASES["reference options"], torch.float32) < 1e-6
    assert 1e-4 < error(CASES["reference options"], torch.bfloat16) < 1e-2


@pytest.mark.parametrize("name", ["reference options", *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_the_order_of_parallel_iterations_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A race between iterations of a `T.Parallel` would show."""
    monkeypatch.setattr(launch, "cpu_dialect", lambda precision: CpuDialect(precision, "reverse"))
    assert error(CASES[name]) < 1e-12


def test_the_order_and_number_of_sequences_do_not_matter() -> None:
    """The same sequences in other rows of the batch, and alone: the same bits."""
    shape = CASES["reference options"]
    token = one_token(shape, torch.float32)

    def run(order: list[int]) -> dict[int, tuple[Tensor, ...]]:
        state = all_slots(shape, torch.float32)
        batched = {"q", "k", "v", "z", "adt", "dt", "trap", "angles"}
        part = {n: u[order].contiguous() if n in batched and u is not None else u for n, u in token.items()}
        slots = torch.tensor([(5, 2, 6)[i] for i in order], dtype=torch.int32)
        out = decode.mimo_step_sm90(state, slots, **part, rotary_dim_divisor=4)
        return {i: (out[row], *(p[(5, 2, 6)[i]] for p in state)) for row, i in enumerate(order)}

    builds = len(launch.compiled())
    whole = run([0, 1, 2])
    for other in (run([2, 0, 1]), run([1])):
        for i, parts in other.items():
            assert all(torch.equal(a, b) for a, b in zip(parts, whole[i], strict=True))
    assert len(launch.compiled()) <= builds + 1, "another number of sequences must not build another kernel"


def test_padding_rows_touch_nothing() -> None:
    """A negative slot: output 0, all slots as they were, the other rows as without padding."""
    shape = CASES["reference options"]
    token = one_token(shape, torch.float32)
    token["v"][1] = float("nan")
    state, alone = all_slots(shape, torch.float32), all_slots(shape, torch.float32)
    out = decode.mimo_step_sm90(state, torch.tensor([3, -1, 0], dtype=torch.int32), **token, rotary_dim_divisor=4)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.isfinite(out).all()
    want = decode.mimo_step_sm90(alone, torch.tensor([3, 6, 0], dtype=torch.int32), **token, rotary_dim_divisor=4)
    assert torch.equal(out[[0, 2]], want[[0, 2]])
    before = all_slots(shape, torch.float32)
    for now, was, other in zip(state, before, alone, strict=True):
        assert torch.equal(now[[1, 2, 4, 5, 6]], was[[1, 2, 4, 5, 6]])
        assert torch.equal(now[[0, 3]], other[[0, 3]])


def test_prefill_then_steps_equal_one_prefill() -> None:
    """The four parts that a prefill ends with go into a slot and on from there."""
    shape = Shape(B=2, S=24, norm=True)
    tensors = operands(shape, torch.float64)

    def prefill(length: int) -> tuple[Tensor, MimoState]:
        return mamba3_mimo(
            **slice_tokens(tensors, 0, length), chunk_size=8, rotary_dim_divisor=4, dtype=None, return_state=True,
            backend="chunked",
        )  # fmt: skip

    whole, end = prefill(shape.S)
    _, state = prefill(13)
    slots = torch.tensor([4, 1], dtype=torch.int32)
    pool = MimoState(*(torch.full((SLOTS, *part.shape[1:]), torch.nan, dtype=part.dtype) for part in state))
    for part, given in zip(pool, state, strict=True):
        part[slots.long()] = given
    for t in range(13, shape.S):
        out = decode.mimo_step_sm90(pool, slots, **one_token(shape, torch.float64, t=t), rotary_dim_divisor=4)
        assert relative_error(out, whole[:, t]) < 1e-12
    for part, wanted in zip(rows(pool, slots), end, strict=True):
        assert relative_error(part, wanted) < 1e-12
    assert torch.isnan(pool.ssm[0]).all(), "an empty slot is not touched"


def circle_gap(got: Tensor, want: Tensor) -> float:
    """Radians, the short way round."""
    gap = (got.double() - want.double()).abs()
    return float(torch.minimum(gap, 2 * torch.pi - gap).max())


@pytest.mark.parametrize("steps", [2048, pytest.param(65536, marks=pytest.mark.slow)])
def test_the_angle_stays_on_the_circle(steps: int) -> None:
    """In fp32, within 1e-3 rad of fp64 after 65,536 steps: the figure to meet. All turns go the same way, and those of
    the second head are about half a circle each, so that an error of every wrap would add up to six times that."""
    shape = Shape(S=1, H=2, R=1, N=8, P=1, z=False, out=False, d=False)
    generator = torch.Generator().manual_seed(5)
    angles = torch.rand(steps, 1, 2, 2, generator=generator)
    dt = torch.rand(steps, 1, 2, generator=generator) * torch.tensor([0.2, 4.0])
    turns = torch.tanh(angles.double()) * torch.pi * dt.double()[..., None]
    token = one_token(shape, torch.float32)
    state = MimoState.zeros(1, 2, 1, 8, 1, 2, "cpu", torch.float32)
    slots = torch.zeros(1, dtype=torch.int32)
    for t in range(steps):
        now = token | {"angles": angles[t], "dt": dt[t], "adt": -dt[t]}
        decode.mimo_step_sm90(state, slots, **now, rotary_dim_divisor=4)
    assert circle_gap(state.angle, torch.remainder(turns.sum(dim=0), 2 * torch.pi)) < 1e-3
    assert state.angle.min() >= 0
    assert state.angle.max() <= 2 * torch.pi


MUTATIONS = {
    "the new key on the token before": ("* k_before_sh[r, n]", "* k_sh[r, n]"),
    "the shifted term not decayed": ("* dt[bb, bh] * T.exp(adt[bb, bh])\n", "* dt[bb, bh]\n"),
    "the state not decayed": ("h[i, n] * alpha_sh[0]", "h[i, n] * T.number(1.0)"),
    "the key stored before its rotation": ("T.round_bf16(k_sh[r, n])", "T.round_bf16(T.wide(k[bb, r, bh // hpg, n]))"),
    "the value not stored": ("x_state[slot, bh, p] = v[bb, bh, p]", "x_state[slot, bh, p] = x_state[slot, bh, p]"),
    "the slot of the row's number": ("slot = T.max(slots[bb], 0)", "slot = T.max(bb, 0)"),
    "rotation before the bias": ("half + a]) + bias[bh, r, half + a]", "half + a])"),
    "the angle of the token before": ("angle_sh[a] = T.if", "angle_sh[a] = angle[slot, bh, a] + T.zero() * T.if"),
    "the skip of another rank": ("d[bh] * x_sh[r, p]", "d[bh] * x_sh[0, p]"),
    "norm over whole tiles": ("rms[r] / T.number(float(P))", "rms[r] / T.number(float(W))"),
    "an idle slot written": ("if T.And(active, p0 + i < P):", "if p0 + i < P:"),
    "the state forgotten": ("h[i, n] = h[i, n] * alpha_sh[0]", "h[i, n] = T.zero()"),
}  # fmt: skip
QUICK = (
    "the new key on the token before",
    "the state not decayed",
    "the slot of the row's number",
)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MUTATIONS])
def test_mutations_are_caught(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Deliberate mistakes in the kernel source must show in the comparison that the kernel passes."""
    old, new = MUTATIONS[name]
    monkeypatch.setattr(decode, "make_step", _mutated(old, new, tmp_path).make_step)
    if name == "an idle slot written":
        with pytest.raises(AssertionError):
            test_padding_rows_touch_nothing()
        return
    shape = CASES["norm, a group per head, half rotation, odd P"] if "norm" in name else CASES["reference options"]
    assert error(shape) > 1e-3


def _mutated(old: str, new: str, folder: Path):
    """A copy of the kernel's module with one piece of its text replaced."""
    text = Path(step.__file__).read_text()
    assert text.count(old) >= 1, f"{old!r} is not in {step.__file__}: the mutation has gone stale"
    path = folder / "mutant.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"step_mutant_{abs(hash(new))}", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant


def refused(**changes: object) -> str:
    """What the entry says to a call with something wrong in it."""
    shape = CASES["reference options"]
    token = one_token(shape, torch.float32)
    state = changes.pop("state", all_slots(shape, torch.float32))
    slots = changes.pop("slots", torch.tensor([5, 2, 6], dtype=torch.int32))
    with pytest.raises(UserError) as caught:
        decode.mimo_step_sm90(state, slots, **(token | changes), rotary_dim_divisor=4)
    return str(caught.value)


def test_refusals_name_what_is_wrong() -> None:
    """Each with the offending value."""
    state = all_slots(CASES["reference options"], torch.float32)
    assert "distinct and below 7, got [5, 5, 6]" in refused(slots=torch.tensor([5, 5, 6], dtype=torch.int32))
    assert "below 7, got [5, 2, 7]" in refused(slots=torch.tensor([5, 2, 7], dtype=torch.int32))
    assert "torch.int32" in refused(slots=torch.tensor([5, 2, 6]))
    assert "(3,)" in refused(slots=torch.tensor([5, 2], dtype=torch.int32))
    assert "state.k must be contiguous torch.float32" in refused(state=state._replace(k=state.k.double()))
    strided = state.ssm.transpose(2, 3).contiguous().transpose(2, 3)
    assert "not contiguous" in refused(state=state._replace(ssm=strided))
    assert "no backward" in refused(v=torch.zeros(3, 4, 8, requires_grad=True))


def test_a_state_size_that_is_no_power_of_two_is_refused() -> None:
    """Reductions over it have no layout on the GPU; the CPU refuses the same."""
    shape = Shape(B=1, S=1, N=12)
    token, state = one_token(shape, torch.float32), all_slots(shape, torch.float32)
    with pytest.raises(UserError, match="N=12"):
        decode.mimo_step_sm90(state, torch.zeros(1, dtype=torch.int32), **token, rotary_dim_divisor=4)


def assert_compiles(spec: StepSpec) -> str:
    """No spills, at least four blocks a multiprocessor, no known wrong code, the state moved 16 bytes at a time."""
    dialect = CudaDialect("plain")
    dialect.dynamic = {"n_sequences": 8, "n_slots": 64}.get  # a grid of numbers, for the inspection alone
    func = make_step(dialect, spec)
    facts = inspect(func, dialect)
    assert facts.spills == 0
    assert facts.blocks >= 4
    assert facts.lint == ()
    source = str(dialect.lower(func).kernel_source)
    assert "= *(float4*)(ssm" in source
    assert "*(float4*)(ssm" in source.split("= *(float4*)(ssm")[-1], "the state is stored 16 bytes at a time"
    return source


@needs_nvcc
def test_compiles_for_hopper() -> None:
    """The reference shape; and nothing may be laid over the keys while tiles of the state are still to come."""
    assert_compiles(StepSpec(16, 1, 4, 64, 64))
    source = assert_compiles(StepSpec(16, 1, 4, 128, 80, norm=True))
    places = {}
    for line in source.splitlines():
        if "buf_dyn_shmem + " in line:
            places[line.split("void* ")[1].split(" =")[0]] = line.split("buf_dyn_shmem + ")[1]
    kept = [places[name] for name in ("q_sh", "k_sh", "k_before_sh", "before_sh", "now_sh", "y_sh")]
    assert len(set(kept)) == len(kept)


@needs_nvcc
@pytest.mark.slow
def test_the_launcher_takes_it() -> None:
    """Built as for a GPU, with any number of sequences and slots; the launcher reads its shared memory."""
    dialect = CudaDialect("plain")
    kernel = launch.compile_cuda(make_step(dialect, StepSpec(16, 1, 4, 64, 64)), dialect, "make_step")
    assert launch.launch_shared(kernel) == 6336


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_of_the_table_compiles(shape) -> None:
    """With all options on."""
    assert_compiles(StepSpec(16, 1, shape.R, shape.N, shape.P, norm=True))
