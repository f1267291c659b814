"""The start-up check of the scan: a backend's output and gradients at the geometry of the model, against the oracle on
a short packed sequence, or against the chunked backend in fp64 at the length that a run will use.

Random operands of its own. Not for speed, and not for the acceptance figures, which need more shapes (tests, bench).
"""
# B = 1 sequence  S tokens  H heads  G groups of B/C  R MIMO rank  N state  P head width  A rotary angles  C chunk

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from libs.flags.errors import RunRefused, UserError
from libs.kernels.mimo.api import mamba3_mimo
from libs.kernels.mimo.capabilities import HOPPER, Geometry
from libs.kernels.mimo.shapes import MimoInputs, check_inputs

if TYPE_CHECKING:
    from libs.kernels.mimo.sm90.gates import KernelGates

SEED = 2026
ORACLE, EXACT = "reference", "chunked"
# fp64 numbers of one state (the oracle keeps about eight states per token) and of one operand (chunked in fp64).
SLICE = {ORACLE: 1 << 18, EXACT: 1 << 26}
# Where the heads are, when they are not the first axis.
HEAD_AXIS = {"out": 2, "V": 2, "Z": 2, "Angles": 2, "ADT": 1, "DT": 1, "Trap": 1}
NORM_EPS = 1e-5


class Limits(NamedTuple):
    """Largest allowed max |error| / max |oracle|, of the output and of every gradient (MAMBA3.md)."""

    forward: float
    gradient: float


LIMITS: Mapping[torch.dtype, Limits] = {
    torch.float64: Limits(1e-9, 1e-9),
    torch.float32: Limits(1e-5, 1e-5),
    torch.bfloat16: Limits(0.01, 0.012),
}


class SelfTestResult(NamedTuple):
    """Attributes:
    against: "reference" or "chunked", in fp64.
    tokens, bounds: length of the sequence and the document boundaries in it.
    errors: "out" and each operand's gradient by its name in `mamba3_mimo` -> relative error; inf for NaN.
    seconds: of the whole check, a compilation included.
    """

    backend: str
    against: str
    geometry: Geometry
    dtype: str
    gates: dict[str, str]
    tokens: int
    bounds: tuple[int, ...]
    errors: dict[str, float]
    limits: Limits
    seconds: float

    @property
    def wrong(self) -> dict[str, float]:
        """The errors beyond their limit."""
        return {name: error for name, error in self.errors.items() if not error <= self._limit(name)}

    def _limit(self, name: str) -> float:
        return self.limits.forward if name == "out" else self.limits.gradient

    def describe(self) -> str:
        """What was compared, with what was asked of the kernels, and how it came out."""
        found = "; ".join(f"{name} {error:.2g} (limit {self._limit(name):g})" for name, error in self.wrong.items())
        shape = ", ".join(f"{letter}={value}" for letter, value in self.geometry._asdict().items())
        gates = ", ".join(f"{gate}={value}" for gate, value in self.gates.items()) or "none"
        where = f"scan backend {self.backend} in {self.dtype} against {self.against}"
        return f"{where}, shape {shape}, S={self.tokens}, gates {gates}: {f'wrong: {found}' if found else 'right'}"

    def summary(self) -> str:
        """One short line of a check that passed."""
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"self-test of scan backend {self.backend} in {self.dtype}, {self.tokens} tokens, {self.seconds:.1f} s: "
            f"largest relative error {self.errors[worst]:.1e} ({worst})"
        )


class SelfTestFailed(RunRefused):
    """A backend does not compute what the oracle computes: the run must not start (exit 78)."""

    def __init__(self, result: SelfTestResult) -> None:
        self.result = result
        super().__init__(
            f"self-test failed: {result.describe()}\n  remedy: train.mimo_backend = chunked, or gates that pass; "
            "report the shape, the gates and the versions in env.snapshot"
        )


def self_test(
    geometry: Geometry, backend: str, device: torch.device, dtype: torch.dtype, gates: KernelGates | None = None, *,
    tokens: int | None = None,
) -> SelfTestResult:  # fmt: skip
    """Compare output and all gradients of `backend` on operands rounded to `dtype` with what is right in fp64.

    Args:
        dtype: of q, k, v and z, as the model gives them; everything else is fp32, or fp64 with fp64.
        gates: of the Hopper kernels; None where the backend has none.
        tokens: None for a short sequence against `reference`. A length, for kernels that are compiled for one: against
            `chunked`, which this file checks as well and which is fast enough for it.

    Raises:
        SelfTestFailed: an error beyond the limit of `dtype`. UserError: `dtype` has no limit, or what the backend
            itself refuses.
    """
    start = time.perf_counter()
    if dtype not in LIMITS:
        raise UserError(f"self-test in {dtype}: known are {', '.join(str(known) for known in LIMITS)}")
    against = ORACLE if tokens is None else EXACT
    length, bounds = packed_sequence(geometry.C, tokens)
    # Operands and oracle are on the device itself, but for XLA, which has neither fp64 units nor such generators.
    home = torch.device("cpu") if device.type == "xla" else device
    generator = torch.Generator(home).manual_seed(SEED)
    given = random_operands(geometry, length, dtype, generator)
    d_out = torch.randn(given["V"].shape, generator=generator, device=home).to(dtype)
    got = _of_backend(backend, geometry, given, bounds, d_out, gates, device)
    want = _of_heads(against, geometry, given, bounds, d_out)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    words = {} if gates is None else {name: str(value) for name, value in vars(gates).items()}
    result = SelfTestResult(
        backend, against, geometry, str(dtype).removeprefix("torch."), words, length, tuple(bounds), errors,
        LIMITS[dtype], time.perf_counter() - start,
    )  # fmt: skip
    if result.wrong:
        raise SelfTestFailed(result)
    return result


def gates_in_force(backend: str) -> KernelGates | None:
    """The installed gates of the Hopper kernels, for the backend that has them."""
    if backend != HOPPER:
        return None
    from libs.kernels.mimo.sm90.gates import KernelGates

    return KernelGates.from_installed()


def packed_sequence(C: int, tokens: int | None) -> tuple[int, list[int]]:
    """A length and document boundaries. By itself two chunks and part of a third; one document ends inside a chunk,
    one on the grid."""
    length = 2 * C + C // 2 + 1 if tokens is None else tokens
    inside = {C // 2 + 1, (length - 1) // C * C} - {0, length}
    return length, [0, *sorted(edge for edge in inside if edge < length), length]


def random_operands(
    geometry: Geometry, tokens: int, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Operands of `mamba3_mimo` by name, of the size a mixer gives them, on the generator's device. Torch's own random
    state is left alone."""
    H, G, R, N, P, _, divisor, norm = geometry
    full = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=full, device=generator.device)

    dt = torch.nn.functional.softplus(normal(1, H, tokens) - 2)
    operands = {
        "Q": normal(1, tokens, R, G, N), "K": normal(1, tokens, R, G, N) / N**0.5, "V": normal(1, tokens, H, P),
        "ADT": -dt * torch.nn.functional.softplus(normal(1, H, tokens)), "DT": dt, "Trap": normal(1, H, tokens),
        "Q_bias": 1 + 0.3 * normal(H, R, N), "K_bias": (1 + 0.3 * normal(H, R, N)) / N**0.5,
        "MIMO_V": normal(H, R, P), "MIMO_Z": normal(H, R, P), "MIMO_Out": normal(H, R, P),
        "Angles": normal(1, tokens, H, N // divisor), "D": normal(H), "Z": normal(1, tokens, H, P),
    }  # fmt: skip
    if norm:
        operands["norm_weight"] = 1 + 0.1 * normal(H, P)
    return {name: u.to(dtype) if name in ("Q", "K", "V", "Z") else u for name, u in operands.items()}


def relative_error(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|; infinite if anything is not finite."""
    difference = (got.double() - want.double()).abs().max()
    scale = want.double().abs().max()
    return float(difference / scale) if bool(torch.isfinite(difference)) and bool(scale > 0) else float("inf")


def _of_backend(
    backend: str, geometry: Geometry, given: Mapping[str, Tensor], bounds: list[int], d_out: Tensor,
    gates: KernelGates | None, device: torch.device | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """ "out" and every gradient, as the backend gives them on `device`, where the operands were."""
    home = d_out.device
    device = home if device is None else device
    leaves = {name: u.detach().to(device).requires_grad_() for name, u in given.items()}
    with torch.enable_grad():
        out = (
            _hopper(geometry, leaves, bounds, gates)
            if gates is not None
            else _public(backend, geometry, leaves, bounds)
        )
        torch.autograd.backward(out, d_out.to(out.device, out.dtype))
    found = {"out": out.detach()} | _grads(leaves)
    if device.type == "xla":
        import torch_xla  # one program for all results; reading them one by one would compile one for each

        torch_xla.sync()
    return {name: u.to(home) for name, u in found.items()}


def _hopper(geometry: Geometry, operands: Mapping[str, Tensor], bounds: list[int], gates: KernelGates) -> Tensor:
    """With gates that need not be in force, and also on CPU tensors."""
    from libs.kernels.mimo.sm90.autograd import mimo_sm90

    given = {name.lower(): u for name, u in operands.items()}
    inputs = MimoInputs(**dict.fromkeys(MimoInputs._fields) | given)  # type: ignore[arg-type]
    dims = check_inputs(inputs, geometry.divisor)
    return mimo_sm90(inputs, dims, geometry.C, geometry.divisor, NORM_EPS, None, bounds, gates=gates)[0]


def _public(backend: str, geometry: Geometry, operands: Mapping[str, Tensor], bounds: list[int]) -> Tensor:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=operands["V"].device)
    out: Tensor = mamba3_mimo(  # type: ignore[call-overload]
        **operands, chunk_size=geometry.C, rotary_dim_divisor=geometry.divisor, dtype=None, cu_seqlens=cu_seqlens,
        norm_eps=NORM_EPS, backend=backend,
    )  # fmt: skip
    return out


def _grads(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A gradient that never came is a wrong one: NaN, which counts as an infinite error."""
    return {name: torch.full_like(u, float("nan")) if u.grad is None else u.grad for name, u in leaves.items()}


def _of_heads(
    backend: str, geometry: Geometry, given: Mapping[str, Tensor], bounds: list[int], d_out: Tensor
) -> dict[str, Tensor]:
    """The same from a torch backend in fp64, a few heads at a time: heads do not meet, and memory is bounded."""
    found: dict[str, list[Tensor]] = {}
    shared = {name: torch.zeros_like(given[name], dtype=torch.float64) for name in ("Q", "K")}
    per_head = geometry.P * (geometry.N if backend == ORACLE else d_out.shape[1])
    for h0, h1, group in _head_slices(geometry, SLICE[backend] // per_head):
        leaves = {name: _heads(name, u, h0, h1, group).double().requires_grad_() for name, u in given.items()}
        with torch.enable_grad():
            out = _public(backend, geometry, leaves, bounds)
            torch.autograd.backward(out, d_out[:, :, h0:h1].double())
        for name, u in ({"out": out.detach()} | _grads(leaves)).items():
            if name in shared:
                shared[name][:, :, :, group : group + 1] += u
            else:
                found.setdefault(name, []).append(u)
    return {name: torch.cat(parts, dim=HEAD_AXIS.get(name, 0)) for name, parts in found.items()} | shared


def _head_slices(geometry: Geometry, at_most: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of heads with their group: never across groups, never more than `at_most`, but one."""
    per_group = geometry.H // geometry.G
    for group in range(geometry.G):
        start, end = group * per_group, (group + 1) * per_group
        for h0, h1 in itertools.pairwise([*range(start, end, max(1, at_most)), end]):
            yield h0, h1, group


def _heads(name: str, u: Tensor, h0: int, h1: int, group: int) -> Tensor:
    """An operand's part for heads h0..h1 of one group, a copy."""
    if name in ("Q", "K"):
        return u[:, :, :, group : group + 1].detach().clone()
    return u.narrow(HEAD_AXIS.get(name, 0), h0, h1 - h0).detach().clone()
