"""Attention on one v6e chip, forward and backward, compiled by libtpu: `S D dtype [backend]`. Prints a JSON line.

seconds_modelled is the compiler's estimate and has nothing of a kernel call in it."""

from __future__ import annotations

import json
import sys

from libs.flags.environment import choose_xla_platform, compile_without_a_tpu


def main(S: int, D: int, dtype: str, backend: str = "pallas") -> None:
    compile_without_a_tpu()
    choose_xla_platform("CPU", 1)
    import torch

    from libs.kernels.attention import attention
    from libs.parallel.xla.aot import Argument, compile_for, lower, placeholder
    from libs.parallel.xla.topology import MeshShape, topology

    kind = getattr(torch, dtype)
    q, k, v = (placeholder((1, S, heads, D), kind).requires_grad_() for heads in (8, 2, 2))
    ids = placeholder((1, S), torch.int32)
    out = attention(q, k, v, document_ids=ids, backend=backend)
    d_out = placeholder(tuple(out.shape), kind)
    grads = torch.autograd.grad(out, (q, k, v), d_out)
    given = [Argument(u.detach(), "given", (None,) * u.dim()) for u in (q, k, v, ids, d_out)]
    compiled = compile_for(lower(given, [out.detach(), *grads], MeshShape()), topology("v6e-1"))
    modelled = compiled.modelled.cycles / topology("v6e-1").chip.clock
    found = {
        "seconds_modelled": modelled,
        "calls": compiled.modelled.uncounted,
        "temporaries": compiled.temporaries,
        "seconds": compiled.seconds,
    }
    print(json.dumps(found | {"flops": compiled.flops, "results": compiled.results}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
