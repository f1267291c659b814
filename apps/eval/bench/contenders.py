# B sequences, S tokens, H heads, P head width
"""What `fathom bench ops` runs: the op, the plain formulation, causal SDPA, GEMM; with and without backward.

Not for timing (interleave.py) or memory (memory.py): each function here is one call of one contender.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from apps.eval.bench.operands import Operands, Shape, make_operands
from apps.eval.bench.plain import plain_mimo
from libs.kernels.mimo import mamba3_mimo

Kind: TypeAlias = Literal["op", "plain", "sdpa"]
PLAIN_CHUNK = 16

CONTENDER_NOTES: dict[Kind, str] = {
    "op": "mamba3_mimo, backend chunked",
    "plain": f"plain PyTorch formulation: whole-sequence einsums, chunk {PLAIN_CHUNK}, autograd",
    "sdpa": "torch scaled_dot_product_attention, is_causal, H heads of width P",
}


def op_call(operands: Operands, shape: Shape, *, chunk_size: int, backend: str = "chunked") -> Tensor:
    """The project's op on the operands; (B, S, H, P)."""
    return mamba3_mimo(*operands, chunk_size, shape.divisor, operands.v_BSHP.dtype, backend=backend)


def plain_call(operands: Operands, shape: Shape) -> Tensor:
    """The plain formulation on the operands; (B, S, H, P)."""
    return plain_mimo(*operands, PLAIN_CHUNK, shape.divisor)


def tensors_of(kind: Kind, shape: Shape, *, seed: int) -> tuple[Tensor, ...]:
    """The inputs of one contender, each requiring a gradient."""
    if kind == "sdpa":
        generator = torch.Generator().manual_seed(seed)
        size = (shape.B, shape.H, shape.S, shape.P)
        inputs: tuple[Tensor, ...] = tuple(torch.randn(size, generator=generator) for _ in range(3))
    else:
        inputs = make_operands(shape, seed=seed)
    for tensor in inputs:
        tensor.requires_grad_()
    return inputs


def output_of(kind: Kind, inputs: tuple[Tensor, ...], shape: Shape, *, chunk_size: int) -> Tensor:
    """The contender's result on the inputs that `tensors_of` made."""
    if kind == "sdpa":
        q_BHSP, k_BHSP, v_BHSP = inputs
        return torch.nn.functional.scaled_dot_product_attention(q_BHSP, k_BHSP, v_BHSP, is_causal=True)
    operands = Operands(*inputs)
    return op_call(operands, shape, chunk_size=chunk_size) if kind == "op" else plain_call(operands, shape)


def forward_runner(kind: Kind, shape: Shape, *, seed: int, chunk_size: int) -> Callable[[], object]:
    """Forward alone, under no_grad, as in evaluation. Inputs are made here, outside the timed call."""
    inputs = tensors_of(kind, shape, seed=seed)

    def run() -> None:
        with torch.no_grad():
            output_of(kind, inputs, shape, chunk_size=chunk_size)

    return run


def training_runner(kind: Kind, shape: Shape, *, seed: int, chunk_size: int) -> Callable[[], object]:
    """Forward, then the gradients of every input for one fixed gradient of the output."""
    inputs = tensors_of(kind, shape, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    out_shape = (shape.B, shape.H, shape.S, shape.P) if kind == "sdpa" else (shape.B, shape.S, shape.H, shape.P)
    grad_out = torch.randn(out_shape, generator=generator)

    def run() -> None:
        torch.autograd.grad(output_of(kind, inputs, shape, chunk_size=chunk_size), inputs, grad_out)

    return run


def gemm_runner(size: int, *, seed: int) -> Callable[[], object]:
    """One fp32 product of two size x size matrices into a buffer that exists already."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    out = torch.empty(size, size)

    def run() -> None:
        torch.mm(a, b, out=out)

    return run


def gemm_flops(size: int) -> float:
    """2 n^3."""
    return 2.0 * size**3
