"""The whole scan for XLA: operands cut into chunks once, then one loop whose backward recomputes each chunk.

Not for one chunk's arithmetic (`body`) nor for how the loop is driven (`libs.kernels.chunk_loop`).
"""
# B sequences  S tokens  H heads  c chunks  C tokens of a chunk  G groups  R rank  N state  P head width  A angles

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnF

from libs.kernels.chunk_loop import Driver, Tensors, chunk_loop
from libs.kernels.mimo.shapes import Dims, MimoInputs, MimoResult, MimoState, accumulation_dtype
from libs.kernels.mimo.xla.body import Carry, ChunkInputs, HeadParams, rotated, run_chunk, running_sum

# What of gate psiv_cache there is: the products of every rank made once, before the loop, and kept for backward.
PSIV_STAGES = ("python_precompute",)


def mimo_xla(
    inputs: MimoInputs, dims: Dims, chunk_size: int, norm_eps: float,
    state: MimoState | None, ids_BS: Tensor | None = None, *, driver: Driver = "scan", psiv: bool = False,
) -> MimoResult:  # fmt: skip
    """Equal to `reference.mimo_reference` for every chunk size; see `api.mamba3_mimo`. Static shapes only.

    Matrix products take operands in v's dtype and add up in fp32 (fp64 for fp64), as do the state and the angles.

    Args:
        ids_BS: (B,S) integers, rising along a row; state, angle and shifted term restart where they change. A
            given state belongs to the first document of its row.
        driver: "scan" is one while loop (needs an XLA device), "loop" unrolls it (any device).
        psiv: make v * mimo_v before the loop and keep it (gate psiv_cache).
    """
    acc = accumulation_dtype(inputs.v.dtype)
    params, chunks = _params(inputs, acc), _chunks(inputs, dims, chunk_size, ids_BS, psiv, acc)

    # Autograd keeps the body until the graph is gone, so it may close over no tensor.
    params_there, chunks_there, dtype = _there(params), _there(chunks), inputs.v.dtype

    def body(constants: Tensors, carry: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
        given, chunk = HeadParams(*_restored(params_there, constants)), ChunkInputs(*_restored(chunks_there, x))
        after, y = run_chunk(given, Carry(*carry), chunk, norm_eps=norm_eps, dtype=dtype)
        return tuple(after), (y,)

    carry, (y_cBC,) = chunk_loop(body, _present(params), _entry(inputs, dims, state, acc), _present(chunks), driver)
    angle_BHA, h_BHNP = carry
    out = y_cBC.transpose(0, 1).flatten(1, 2)[:, : dims.S]
    k_BHR1N = rotated(inputs.k[:, -1:], params.k_bias_BHRN, angle_BHA[:, :, None])
    last = MimoState(angle_BHA, h_BHNP.transpose(2, 3), k_BHR1N[:, :, :, 0].transpose(1, 2), inputs.v[:, -1].to(acc))
    return out, last


def document_ids(bounds: Sequence[int], tokens: int) -> Tensor:
    """(1,S) int32 numbers of the documents between `bounds`: the same shape, however many there are. On the CPU."""
    edges = torch.tensor(list(bounds[1:-1]), dtype=torch.int64)
    return torch.bucketize(torch.arange(tokens), edges, right=True).to(torch.int32)[None]


def _present(parts: HeadParams | ChunkInputs) -> Tensors:
    """Without those that are None: a loop carries tensors only."""
    return tuple(u for u in parts if u is not None)


def _there(parts: HeadParams | ChunkInputs) -> tuple[bool, ...]:
    return tuple(u is not None for u in parts)


def _restored(there: tuple[bool, ...], tensors: Tensors) -> Any:
    """Tensors in the places where there was one, None in the others."""
    rest = iter(tensors)
    return (next(rest) if present else None for present in there)


def _params(inputs: MimoInputs, acc: torch.dtype) -> HeadParams:
    parts = (
        inputs.q_bias, inputs.k_bias, inputs.mimo_v, inputs.mimo_z, inputs.mimo_out, inputs.d, inputs.norm_weight,
    )  # fmt: skip
    rows = inputs.v.shape[0]
    return HeadParams(*(None if u is None else u.to(acc).expand(rows, *u.shape) for u in parts))  # type: ignore[arg-type]


def _entry(inputs: MimoInputs, dims: Dims, state: MimoState | None, acc: torch.dtype) -> Tensors:
    """Angle and state that enter the first chunk: a given one, with the shifted term of the token before."""
    if state is None:
        zeros = MimoState.zeros(dims.B, dims.H, dims.P, dims.N, dims.R, dims.A, inputs.v.device, acc)
        return zeros.angle, zeros.ssm.transpose(2, 3)
    first_BH = inputs.dt[..., 0].to(acc) * (1 - torch.sigmoid(inputs.trap[..., 0].to(acc)))
    values_BHRP = state.x.to(acc)[:, :, None] * inputs.mimo_v.to(acc)
    product_BHNP = state.k.to(acc).permute(0, 2, 3, 1) @ values_BHRP
    return state.angle.to(acc), state.ssm.to(acc).transpose(2, 3) + first_BH[..., None, None] * product_BHNP


def _chunks(inputs: MimoInputs, dims: Dims, C: int, ids_BS: Tensor | None, psiv: bool, acc: torch.dtype) -> ChunkInputs:
    """Every per-token operand as (c,B,...), padded with tokens that have dt = 0 and so do nothing."""
    chunks = -(-dims.S // C)
    missing = chunks * C - dims.S

    def along_1(u: Tensor) -> Tensor:
        u = nnF.pad(u, [0, 0] * (u.dim() - 2) + [0, missing]) if missing else u
        return u.view(u.shape[0], chunks, C, *u.shape[2:]).transpose(0, 1)

    def along_2(u_BHS: Tensor) -> Tensor:
        return nnF.pad(u_BHS, (0, missing)).view(*u_BHS.shape[:2], chunks, C).permute(2, 0, 1, 3)

    dt, lam = inputs.dt.to(acc), torch.sigmoid(inputs.trap.to(acc))
    gamma, lead = lam * dt, dt * (1 - lam)
    ids = before = None
    if ids_BS is not None:
        # Padding continues the last document.
        tail = ids_BS[:, -1:].expand(-1, missing)
        ids = torch.cat([ids_BS, tail], dim=1).view(-1, chunks, C).transpose(0, 1)
        before = torch.cat([ids[:1, :, 0], ids[:-1, :, -1]])
    turn_BSHA = torch.tanh(inputs.angles.to(acc)) * (dt.transpose(1, 2) * torch.pi)[..., None]
    turn_BHAS = along_1(turn_BSHA).permute(0, 1, 3, 4, 2)
    return ChunkInputs(
        q_BCRGN=along_1(inputs.q),
        k_BCRGN=along_1(inputs.k),
        v_BCHP=along_1(inputs.v),
        log_BHC=running_sum(along_2(inputs.adt.to(acc)), None if ids is None else ids[:, :, None]),
        theta_BHCA=running_sum(turn_BHAS, None if ids is None else ids[:, :, None, None]).transpose(3, 4),
        gamma_BHC=along_2(gamma),
        # The shifted term of the last token of a document is masked with the document, that of the last token is 0.
        later_BHC=along_2(gamma + nnF.pad(lead[..., 1:], (0, 1))),
        z_BCHP=None if inputs.z is None else along_1(inputs.z),
        x_BCRHP=along_1(_spread_values(inputs)) if psiv else None,
        documents_BC=ids,
        before_B=before,
    )


def _spread_values(inputs: MimoInputs) -> Tensor:
    """(B,S,R,H,P) in v's dtype: v times mimo_v of every rank (PsiV)."""
    return (inputs.v[:, :, None] * inputs.mimo_v.transpose(0, 1).to(inputs.v.dtype)).contiguous()
