"""The public operator `mamba3_mimo` and the choice of its backend.

One signature for every backend: upstream's names and order for what it also has, keyword-only for what it has not.
"""
# B sequences  S tokens  H heads  G groups of B/C  R MIMO rank  N state  P head width  A rotary angles

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor

from libs.flags.installed import value_of
from libs.kernels.backend import Choice, pick
from libs.kernels.chunk_loop import Driver
from libs.kernels.mimo.chunked import mimo_chunked
from libs.kernels.mimo.reference import mimo_reference
from libs.kernels.mimo.shapes import (
    Dims,
    MimoInputs,
    MimoResult,
    MimoState,
    check_boundaries,
    check_inputs,
    check_state,
    checked_boundaries,
)
from libs.kernels.mimo.xla.scan import PSIV_STAGES, document_ids, mimo_xla

Backend: TypeAlias = Callable[[MimoInputs, Dims, MimoState | None], MimoResult]


def _runs_anywhere(device_type: str) -> str | None:
    return None if device_type in ("cpu", "cuda", "meta") else "plain torch kernels are checked on cpu and cuda only"


def _needs_xla(device_type: str) -> str | None:
    return None if device_type == "xla" else "it is a loop for XLA devices"


def _needs_hopper(device_type: str) -> str | None:
    if device_type != "cuda":
        return "its kernels are for Hopper GPUs (on a CPU their sources run in tests only)"
    if importlib.util.find_spec("tilelang") is None:
        return "the package tilelang is not installed (it is in the extra fathom[cuda])"
    major, minor = torch.cuda.get_device_capability()
    return None if major == 9 else f"its kernels need compute capability 9.x, this device has {major}.{minor}"


# "auto" takes the first that runs. The Hopper kernels come last, so they are taken by name only, until a receipt shows
# that they win end to end. "xla" is one while loop over chunks, "xla_loop" the same unrolled into the graph.
XLA_DRIVERS: Mapping[str, Driver] = {"xla": "scan", "xla_loop": "loop"}
BACKENDS: Mapping[str, Callable[[str], str | None]] = {
    "chunked": _runs_anywhere,
    "reference": _runs_anywhere,
    **dict.fromkeys(XLA_DRIVERS, _needs_xla),
    "tilelang": _needs_hopper,
}


def choose_backend(requested: str, device: torch.device | str) -> Choice:
    """Resolve "auto" or a backend's name for a device, with the reason. See `libs.kernels.backend.pick`."""
    return pick("mamba3_mimo", requested, torch.device(device).type, BACKENDS)


@overload
def mamba3_mimo(
    Q: Tensor, K: Tensor, V: Tensor, ADT: Tensor, DT: Tensor, Trap: Tensor, Q_bias: Tensor, K_bias: Tensor,
    MIMO_V: Tensor, MIMO_Z: Tensor | None, MIMO_Out: Tensor | None, Angles: Tensor, D: Tensor | None,
    Z: Tensor | None, chunk_size: int, rotary_dim_divisor: int, dtype: torch.dtype | None,
    return_state: Literal[False] = False, cu_seqlens: Tensor | None = None, *,
    initial_state: MimoState | None = None, norm_weight: Tensor | None = None, norm_eps: float = 1e-5,
    backend: str = "auto", document_ids: Tensor | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def mamba3_mimo(
    Q: Tensor, K: Tensor, V: Tensor, ADT: Tensor, DT: Tensor, Trap: Tensor, Q_bias: Tensor, K_bias: Tensor,
    MIMO_V: Tensor, MIMO_Z: Tensor | None, MIMO_Out: Tensor | None, Angles: Tensor, D: Tensor | None,
    Z: Tensor | None, chunk_size: int, rotary_dim_divisor: int, dtype: torch.dtype | None,
    return_state: Literal[True], cu_seqlens: Tensor | None = None, *,
    initial_state: MimoState | None = None, norm_weight: Tensor | None = None, norm_eps: float = 1e-5,
    backend: str = "auto", document_ids: Tensor | None = None,
) -> tuple[Tensor, MimoState]: ...  # fmt: skip


def mamba3_mimo(
    Q: Tensor, K: Tensor, V: Tensor, ADT: Tensor, DT: Tensor, Trap: Tensor, Q_bias: Tensor, K_bias: Tensor,
    MIMO_V: Tensor, MIMO_Z: Tensor | None, MIMO_Out: Tensor | None, Angles: Tensor, D: Tensor | None,
    Z: Tensor | None, chunk_size: int, rotary_dim_divisor: int, dtype: torch.dtype | None,
    return_state: bool = False, cu_seqlens: Tensor | None = None, *,
    initial_state: MimoState | None = None, norm_weight: Tensor | None = None, norm_eps: float = 1e-5,
    backend: str = "auto", document_ids: Tensor | None = None,
) -> Tensor | tuple[Tensor, MimoState]:  # fmt: skip
    """The Mamba-3 MIMO scan (Lahoti et al. 2026): rotation, trapezoidal recurrence, gate and sum over ranks.

    Args:
        Q, K: (B,S,R,G,N) C and B of the mixer after their norm, before bias; H % G == 0.
        V, Z: (B,S,H,P); Z is the gate before silu and needs MIMO_Z.
        ADT, DT, Trap: (B,H,S) A*dt (<= 0), dt (>= 0), trapezoidal weight before the sigmoid.
        Q_bias, K_bias: (H,R,N), added before rotation. MIMO_V, MIMO_Z, MIMO_Out: (H,R,P).
        Angles: (B,S,H,A) before tanh, A = N / rotary_dim_divisor. D: (H,) skip weight.
        chunk_size: tokens per step of a chunked backend; any value >= 1 gives the same result.
        rotary_dim_divisor: 4 (half of the state rotates) or 2 (all of it).
        dtype: of the result; None keeps V's. Arithmetic is fp32 (fp64 when V is), also under autocast.
        return_state: also return the state after the last token, one row per sequence.
        cu_seqlens: (num_seq+1,) integer boundaries of documents packed into B = 1; state, angle and shifted
            term restart at each.
        initial_state: one row per sequence; feeding a sequence in two calls equals one call.
        norm_weight: (H,P) turns the output norm on: RMSNorm over P, before the gate.
        backend: "auto", "chunked", "reference", "tilelang" (bf16 on Hopper, shapes of its tile table), or on XLA
            devices "xla" and "xla_loop".
        document_ids: (B,S) int32 in place of cu_seqlens, for the XLA backends: the number of the document each token is
            in, rising along a row. Its shape does not depend on how many there are, so nothing is compiled again.

    Returns:
        (B,S,H,P), or (B,S,R,H,P) when MIMO_Out is None; with `return_state` also a `MimoState`.

    Raises:
        ValueError: shapes or a dtype that do not fit, or a backend that cannot run here.
    """
    inputs = MimoInputs(
        q=Q, k=K, v=V, adt=ADT, dt=DT, trap=Trap, q_bias=Q_bias, k_bias=K_bias, mimo_v=MIMO_V, angles=Angles,
        mimo_z=MIMO_Z, mimo_out=MIMO_Out, d=D, z=Z, norm_weight=norm_weight,
    )  # fmt: skip
    dims = check_inputs(inputs, rotary_dim_divisor)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    choice = choose_backend(backend, V.device)
    if initial_state is not None:
        check_state(initial_state, dims.B if cu_seqlens is None else len(cu_seqlens) - 1, dims)

    # The scan keeps its own precision rules; autocast would round the state update to bf16.
    with contextlib.nullcontext() if V.device.type == "meta" else torch.autocast(V.device.type, enabled=False):
        if choice.value == "tilelang":
            out, state = _on_hopper(
                inputs, dims, chunk_size, rotary_dim_divisor, norm_eps, initial_state, cu_seqlens, return_state
            )
            out = out.to(V.dtype if dtype is None else dtype)
            return (out, state) if return_state else out
        if choice.value in XLA_DRIVERS:
            out, state = _on_xla(
                inputs, dims, chunk_size, norm_eps, initial_state, cu_seqlens, document_ids,
                XLA_DRIVERS[choice.value], return_state,
            )  # fmt: skip
            out = out.to(V.dtype if dtype is None else dtype)
            return (out, state) if return_state else out
        if document_ids is not None:
            raise ValueError(f"document_ids are for the XLA backends, backend {choice.value!r} takes cu_seqlens")
        bounds = None if cu_seqlens is None else check_boundaries(cu_seqlens, dims)
        if choice.value == "reference":

            def run(part: MimoInputs, part_dims: Dims, state: MimoState | None) -> MimoResult:
                return mimo_reference(part, part_dims, rotary_dim_divisor, norm_eps, state)
        else:

            def run(part: MimoInputs, part_dims: Dims, state: MimoState | None) -> MimoResult:
                return mimo_chunked(part, part_dims, chunk_size, rotary_dim_divisor, norm_eps, state)

        if bounds is None:
            out, state = run(inputs, dims, initial_state)
        elif choice.value == "chunked" and not return_state and initial_state is None:
            out, state = mimo_chunked(inputs, dims, chunk_size, rotary_dim_divisor, norm_eps, None, bounds)
        else:
            out, state = _document_by_document(run, inputs, dims, bounds, initial_state)
    out = out.to(V.dtype if dtype is None else dtype)
    return (out, state) if return_state else out


def _on_hopper(
    inputs: MimoInputs, dims: Dims, chunk_size: int, rotary_dim_divisor: int, norm_eps: float,
    state: MimoState | None, cu_seqlens: Tensor | None, return_state: bool,
) -> MimoResult:  # fmt: skip
    # tilelang is an optional dependency, and takes seconds to import.
    from libs.kernels.mimo.sm90.autograd import mimo_sm90

    if inputs.v.is_cuda and inputs.v.dtype != torch.bfloat16:
        raise ValueError(f"backend 'tilelang' computes in bfloat16, V is {inputs.v.dtype}; use bf16 or 'chunked'")
    bounds = None if cu_seqlens is None else checked_boundaries(cu_seqlens, dims).to(inputs.v.device)
    return mimo_sm90(
        inputs, dims, chunk_size, rotary_dim_divisor, norm_eps, state, bounds, return_state=return_state
    )  # fmt: skip


def _on_xla(
    inputs: MimoInputs, dims: Dims, chunk_size: int, norm_eps: float,
    state: MimoState | None, cu_seqlens: Tensor | None, ids_BS: Tensor | None, driver: Driver, return_state: bool,
) -> MimoResult:  # fmt: skip
    psiv = value_of("psiv_cache") in PSIV_STAGES

    def run(part: MimoInputs, part_dims: Dims, state: MimoState | None) -> MimoResult:
        return mimo_xla(part, part_dims, chunk_size, norm_eps, state, ids_BS, driver=driver, psiv=psiv)

    if cu_seqlens is not None:
        if ids_BS is not None:
            raise ValueError("cu_seqlens and document_ids say the same thing: give one of them")
        bounds = check_boundaries(cu_seqlens, dims)
        if return_state or state is not None:
            return _document_by_document(run, inputs, dims, bounds, state)
        ids_BS = document_ids(bounds, dims.S).to(inputs.v.device)
    if ids_BS is not None and tuple(ids_BS.shape) != (dims.B, dims.S):
        raise ValueError(f"document_ids must be (B,S) = {(dims.B, dims.S)}, got {tuple(ids_BS.shape)}")
    return run(inputs, dims, state)


def _document_by_document(
    run: Backend, inputs: MimoInputs, dims: Dims, bounds: list[int], initial: MimoState | None
) -> MimoResult:
    """Run each packed document on its own, so that every one has a state before and after it."""
    outputs: list[Tensor] = []
    states: list[MimoState] = []
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        state = None if initial is None else MimoState(*(part[row : row + 1] for part in initial))
        out, final = run(_slice_tokens(inputs, start, end), dims._replace(S=end - start), state)
        outputs.append(out)
        states.append(final)
    merged = MimoState(*(torch.cat(parts) for parts in zip(*states, strict=True)))
    return torch.cat(outputs, dim=1), merged


def _slice_tokens(inputs: MimoInputs, start: int, end: int) -> MimoInputs:
    return inputs._replace(
        q=inputs.q[:, start:end], k=inputs.k[:, start:end], v=inputs.v[:, start:end],
        angles=inputs.angles[:, start:end], z=None if inputs.z is None else inputs.z[:, start:end],
        adt=inputs.adt[:, :, start:end], dt=inputs.dt[:, :, start:end], trap=inputs.trap[:, :, start:end],
    )  # fmt: skip
