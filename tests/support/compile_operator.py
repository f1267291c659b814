"""One operator of a 130m layer, forward and backward, compiled by libtpu for one v6e chip; prints a JSON line.

`attention S D dtype backend`, or `scan S`. modelled_ms is the compiler's estimate; kernel calls are not in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from libs.flags import Facts, install, resolve
from libs.flags.environment import choose_xla_platform, compile_without_a_tpu


def main(what: str, S: int, words: Sequence[str]) -> dict[str, Any]:
    """In a process that has not imported torch_xla."""
    compile_without_a_tpu()
    choose_xla_platform("CPU", 1)
    install(resolve({}, Facts(device="xla", mimo_backend="xla")))
    return compiled(what, S, words)


def compiled(what: str, S: int, words: Sequence[str]) -> dict[str, Any]:
    """In one that has, and has gates installed."""
    import torch
    from torch import Tensor

    from libs.kernels.attention import attention
    from libs.kernels.mimo import mamba3_mimo
    from libs.parallel.xla.aot import Argument, compile_for, lower, placeholder
    from libs.parallel.xla.topology import MeshShape, topology
    from tests.support.mimo import Shape, operands

    def run() -> tuple[list[Tensor], Tensor]:
        if what == "attention":
            D, dtype, backend = int(words[0]), getattr(torch, words[1]), words[2]
            leaves = [placeholder((1, S, heads, D), dtype).requires_grad_() for heads in (12, 4, 4)]
            ids = placeholder((1, S), torch.int32)
            return [*leaves, ids], attention(*leaves, document_ids=ids, backend=backend)
        shape = Shape(S=S, H=24, R=4, N=128, P=64)
        named = {
            name: placeholder(u.shape, torch.bfloat16 if name in ("Q", "K", "V", "Z") else torch.float32)
            for name, u in operands(shape).items()
            if u is not None
        }
        leaves = [u.requires_grad_() for u in named.values()]
        options = {name: None for name, u in operands(shape._replace(S=64)).items() if u is None}
        out = mamba3_mimo(
            **named, **options, chunk_size=64, rotary_dim_divisor=shape.divisor, dtype=torch.bfloat16, backend="xla"
        )
        return leaves, out

    given, out = run()
    d_out = placeholder(tuple(out.shape), out.dtype)
    grads = torch.autograd.grad(out, [u for u in given if u.requires_grad], d_out)
    arguments = [Argument(u.detach(), "given", (None,) * u.dim()) for u in (*given, d_out)]
    target = topology("v6e-1")
    compiled = compile_for(lower(arguments, [out.detach(), *grads], MeshShape()), target)
    modelled = compiled.modelled
    return {
        "modelled_ms": modelled.cycles / target.chip.clock * 1e3, "calls": modelled.uncounted,
        "temporaries": compiled.temporaries, "results": compiled.results, "compile_seconds": compiled.seconds,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])))
