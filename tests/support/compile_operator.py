"""One operator of a 130m layer, forward and backward, compiled by libtpu for one v6e chip; prints a JSON line.

`attention S D dtype backend [rows]`, or `scan S [rows]`, packed documents in both. Times are the compiler's estimate;
kernel calls are not in it.
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
    from libs.model.presets import preset
    from libs.parallel.xla.aot import Argument, compile_for, lower, placeholder
    from libs.parallel.xla.topology import MeshShape, topology
    from tests.support.mimo import Shape, operands

    options = {"attention": 3, "scan": 0}[what]
    rows = int(words[options]) if len(words) > options else 1
    ids = placeholder((rows, S), torch.int32)

    def run() -> tuple[list[Tensor], Tensor]:
        if what == "attention":
            D, dtype, backend = int(words[0]), getattr(torch, words[1]), words[2]
            leaves = [placeholder((rows, S, heads, D), dtype).requires_grad_() for heads in (12, 4, 4)]
            return leaves, attention(*leaves, document_ids=ids, backend=backend)
        mixer = preset("130m").mixer
        shape = Shape(rows, S, mixer.nheads, mixer.ngroups, mixer.mimo_rank, mixer.d_state, mixer.headdim)
        named: dict[str, Tensor | None] = {}
        for name, u in operands(shape, torch.float32).items():
            dtype = torch.bfloat16 if name in ("Q", "K", "V", "Z") else torch.float32
            named[name] = None if u is None else placeholder(u.shape, dtype).requires_grad_()
        out = mamba3_mimo(
            **named, chunk_size=64, rotary_dim_divisor=shape.divisor, dtype=torch.bfloat16, document_ids=ids,
            backend="xla",
        )  # fmt: skip
        return [u for u in named.values() if u is not None], out

    given, out = run()
    d_out = placeholder(tuple(out.shape), out.dtype)
    grads = torch.autograd.grad(out, given, d_out)
    arguments = [Argument(u.detach(), "given", (None,) * u.dim()) for u in (*given, ids, d_out)]
    target = topology("v6e-1")
    compiled = compile_for(lower(arguments, [out.detach(), *grads], MeshShape()), target)
    modelled = compiled.modelled
    return {
        "modelled_ms": modelled.cycles / target.chip.clock * 1e3, "cycles_per_token": modelled.cycles / (rows * S),
        "calls": modelled.uncounted, "costly": modelled.costly, "temporaries": compiled.temporaries,
        "results": compiled.results, "compile_seconds": compiled.seconds,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])))
