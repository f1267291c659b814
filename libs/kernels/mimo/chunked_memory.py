"""Elements that the chunked scan keeps from forward to backward, and those it works with: for memory estimates.

Formulas beside the code they count (`chunked`, `chunked_layout`, `chunked_grad`), in the accumulation dtype.
The inputs are not in them: their owner counts those.
"""
# B sequences  S tokens  H heads  G groups  R rank  N state  P head width  A rotary angles
# C tokens of a chunk  F = R*C  x matrices of a tile

from __future__ import annotations

from libs.kernels.mimo.chunked_layout import plan
from libs.kernels.mimo.shapes import Dims

EPS = 1e-5  # of the plan only: no size depends on it


def saved_weights(dims: Dims, chunk_size: int, *, packed: bool) -> int:
    """Of `chunked_terms`, and of what dt and A*dt come from: eleven numbers a head and token (both sides of softplus
    for dt, its output for A, A after its floor, dt padded, pi dt, lambda, 1 - lambda, the running decay, the weights on
    later outputs and on the next chunk's), tanh of the angles, theta, and with packed documents each chunk's matrix of
    who sees whom, as numbers and as bytes."""
    per_token = 11 * dims.H + 2 * dims.H * dims.A + (chunk_size + chunk_size // 4 if packed else 0)
    return dims.B * dims.S * per_token


def saved_states(dims: Dims, chunk_size: int) -> int:
    """One state (N, P) per head and tile."""
    layout = plan(dims, chunk_size, dims.N // dims.A, EPS)
    return dims.B * dims.H * dims.N * dims.P * -(-layout.chunks // layout.tile_chunks)


def backward_elements(dims: Dims, chunk_size: int) -> int:
    """What `_Scan.backward` holds beside what was saved: gradients of its operands (`GradStore`), cos and sin of theta,
    and the buffers of one tile (`Scratch`)."""
    layout = plan(dims, chunk_size, dims.N // dims.A, EPS)
    tokens = dims.B * layout.chunks * layout.C
    per_token = 2 * dims.G * dims.R * dims.N + 2 * dims.H * dims.P + 3 * dims.H + 3 * dims.H * dims.A
    x = min(layout.tile_chunks, layout.chunks) * layout.tile_heads
    F, N, P = dims.R * layout.C, dims.N, dims.P
    keys = 5 * x * N * F  # q and k, the same of gradients, scaled keys
    values = 6 * x * F * P  # x, d_x, y, d_y, the gate and its gradient
    pairs = 3 * x * F * F  # scores, weighed scores, their gradient
    states = 3 * x * N * P + x * N * max(F, P)  # updates, states, gradients of states, of keys
    turns = 3 * x * dims.A * F
    return tokens * per_token + keys + values + pairs + states + turns
