"""Small kernels that TileLang 0.1.15 compiles wrongly without a word, each with its right form beside it.

What lint finds must be what the compiler emits today, not what it emitted when the pattern was written down.
"""
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

# No `from __future__ import annotations`: as strings, parameter types would see only names that the body uses too.

from typing import Any


def reversed_rows(T: Any, wrong: bool) -> Any:
    """Reads a tile last to first, four threads an element."""

    @T.prim_func
    def main(a: T.Tensor((32,), T.f32), o: T.Tensor((128,), T.f32)):
        with T.Kernel(1, threads=128) as _:
            tile = T.alloc_shared((32,), T.f32)
            T.copy(a, tile)
            for i in T.Parallel(128):
                if wrong:
                    o[i] = tile[(127 - i) // 4]
                else:
                    o[i] = tile[31 - i // 4]

    return main


def tile_before_the_loop(T: Any, wrong: bool) -> Any:
    """An accumulator copied to a bf16 tile, before the specialized loop or inside it."""

    @T.prim_func
    def main(a: T.Tensor((64, 64), T.f32), k: T.Tensor((1024, 2, 64), T.bf16), o: T.Tensor((64, 64), T.f32)):
        with T.Kernel(1, threads=128) as _:
            h = T.alloc_fragment((64, 64), T.f32)
            h_sh = T.alloc_shared((64, 64), T.bf16)
            k_sh = T.alloc_shared((64, 64), T.bf16)
            T.copy(a, h)
            if wrong:
                T.copy(h, h_sh)
            for c in T.Pipelined(16, num_stages=2):
                T.copy(k[c * 64 : c * 64 + 64, 0, 0:64], k_sh)
                if not wrong:
                    T.copy(h, h_sh)
                T.gemm(k_sh, h_sh, h)
            T.copy(h, o)

    return main


def ranks_in_a_tile(T: Any, wrong: bool) -> Any:
    """Queries of 16 tokens and 4 ranks: as a three-dimensional tile seen flat, or as a flat tile."""
    flat = not wrong
    source = (4096, 2, 64) if flat else (1024, 4, 2, 64)

    @T.prim_func
    def main(q: T.Tensor(source, T.bf16), w: T.Tensor((64, 64), T.bf16), o: T.Tensor((64, 64), T.f32)):
        with T.Kernel(1, threads=128) as _:
            tile = T.alloc_shared((64, 64) if flat else (16, 4, 64), T.bf16)
            w_sh = T.alloc_shared((64, 64), T.bf16)
            y = T.alloc_fragment((64, 64), T.f32)
            rows = tile if flat else T.reshape(tile, (64, 64))
            T.clear(y)
            for c in T.Pipelined(64, num_stages=2):
                T.copy(w, w_sh)
                if flat:
                    T.copy(q[c * 64 : c * 64 + 64, 0, 0:64], tile)
                else:
                    T.copy(q[c * 16 : c * 16 + 16, 0:4, 0, 0:64], tile)
                T.gemm(rows, w_sh, y)
            T.copy(y, o)

    return main
