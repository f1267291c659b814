"""Four virtual devices, rows cut in two and heads in two: is every chip given its share, and is the whole right?"""

from __future__ import annotations

from collections.abc import Sequence

from libs.flags.environment import choose_xla_platform


def main() -> None:
    choose_xla_platform("CPU", 4)
    from libs.parallel.xla.mesh import open_mesh
    from libs.parallel.xla.topology import MeshShape

    open_mesh(MeshShape(1, 2, 2))
    import torch
    import torch_xla
    from torch import Tensor

    from libs.kernels.attention import attention
    from libs.kernels.attention.pallas import operator
    from libs.kernels.attention.pallas.kernels import Problem
    from tests.support.mimo import relative_error
    from tests.support.pallas import plain

    seen = set()

    def call(kernel: str, problem: Problem, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        seen.add((problem.B, problem.H, problem.G))
        return plain(kernel, problem, given)

    operator.tpu_call = call
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 256, heads, 64, generator=generator) for heads in (4, 2, 2)]
    ids = torch.stack([torch.arange(256) // 100, torch.arange(256) // 60]).int()
    device = torch_xla.device()

    def run(where: torch.device) -> list[Tensor]:
        q, k, v = (u.to(where).requires_grad_() for u in leaves)
        if where.type == "xla":
            out = attention(q, k, v, document_ids=ids.to(where), backend="pallas")
        else:
            bounds = ([0, 100, 200, 256], [0, 60, 120, 180, 240, 256])
            rows = [attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], cu_seqlens=bounds[b]) for b in (0, 1)]
            out = torch.cat(rows)
        out.square().sum().backward()
        found = [out.detach(), *(u.grad for u in (q, k, v) if u.grad is not None)]
        if where.type == "xla":
            torch_xla.sync()
        return [u.cpu() for u in found]

    errors = [relative_error(got, want) for got, want in zip(run(device), run(torch.device("cpu")), strict=True)]
    assert seen == {(1, 2, 1)}, seen
    assert len(errors) == 4
    assert max(errors) <= 1e-5, errors


if __name__ == "__main__":
    main()
