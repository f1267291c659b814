"""One tile kernel source, two targets: TileLang's "c" target for numerics, sm_90a for layout, registers and real runs.

A kernel factory takes a dialect as its parameter named `T` and writes `T.copy`, `T.gemm`, `T.Parallel` as usual.
What is not overridden here is `tilelang.language` itself. Compiling and calling: `run.py`.

Rules for kernel sources (TileLang 0.1.15): statements only in `@T.prim_func` and `@T.macro` bodies (elsewhere a bare
`T.copy` is dropped silently); `T.round_bf16` around every value stored into a bf16 tile by a loop; two-dimensional
shared tiles; never `(c - i) // k` in an index; tiles filled from registers inside the pipelined loop, not before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import tilelang
import tilelang.language as TL
from tilelang import tvm
from tilelang.language.eager.builder import Builder
from tilelang.language.kernel import kernel_launch_factory

from libs.kernels.mimo.sm90.gates import Mode
from libs.kernels.mimo.sm90.gates import pass_configs as mode_configs

Precision = Literal["float64", "float32", "bf16"]
Order = Literal["forward", "reverse"]

LOG2_E = 1.4426950408889634
PI = 3.141592653589793
REGISTERS_PER_SM = 65_536
WARP_GROUP = 128  # threads; a specialized kernel has one group that loads and one that computes
PRODUCER_REGISTERS = 24

# By name: inside a class two leading underscores would be mangled.
_FAST_COS, _FAST_SIN = getattr(TL, "__cos"), getattr(TL, "__sin")


class Dialect:
    """Common part. `cpu` may be asked at trace time; `f32` and `bf16` are the dtypes to declare tiles with."""

    cpu: bool
    bf16: str
    f32: str
    i32 = "int32"
    key: str  # what tells one dialect from another in a kernel cache
    target: Any
    prim_func = staticmethod(TL.prim_func)
    macro = staticmethod(TL.macro)

    def __getattr__(self, name: str) -> Any:
        return getattr(TL, name)

    def zero(self) -> Any:
        """0 in the accumulation dtype."""
        return TL.cast(0, str.__str__(self.f32))

    def number(self, value: float) -> Any:
        """A constant in the accumulation dtype."""
        return TL.FloatImm(str.__str__(self.f32), value)

    def wide(self, x: Any) -> Any:
        """`x` in the accumulation dtype. An expression of bf16 values alone would be computed in bf16."""
        return TL.cast(x, str.__str__(self.f32))


class CudaDialect(Dialect):
    """sm_90a, dtypes as written, built in one of the modes of `gates.py`."""

    cpu = False
    bf16, f32 = "bfloat16", "float32"

    def __init__(
        self, mode: Mode = "ws", pass_configs: Mapping[str, object] | None = None, arch: str = "sm_90a"
    ) -> None:
        self.mode = mode
        self.pass_configs = mode_configs(mode) | dict(pass_configs or {})
        self.key = f"cuda:{arch}:{mode}:{sorted(self.pass_configs.items())!r}"
        self.target = tvm.target.Target({"kind": "cuda", "arch": arch})

    def stages(self, wanted: int) -> int:
        """`num_stages` of the main loop. TMA without a producer is synchronous and exists in unpipelined loops only."""
        return 0 if self.mode == "tma" else wanted

    def load(self, src: Any, dst: Any) -> Any:
        """Copy a slice of global memory into a shared tile, the way the mode says."""
        # One-dimensional TMA loads need no descriptor and no 2-D tile; a loop without stages asks for TMA by name.
        return TL.copy(src, dst, prefer_instruction="tma") if self.mode == "tma" else TL.copy(src, dst)

    def occupancy(self, blocks: int) -> Any:
        """Ask for `blocks` resident blocks per multiprocessor, which caps registers; 0 asks for nothing.

        With a producer group the split of registers must be said too: TileLang's own, 24 and 240, is more than two
        groups of 128 registers have, and the consumer would wait for the difference forever.
        """
        if not blocks:
            return None
        if self.mode == "ws":
            launched = REGISTERS_PER_SM // (blocks * 2 * WARP_GROUP) // 8 * 8
            TL.evaluate(TL.annotate_producer_reg_dealloc(PRODUCER_REGISTERS))
            TL.evaluate(TL.annotate_consumer_reg_alloc(min(240, 2 * launched - PRODUCER_REGISTERS)))
        return TL.annotate_min_blocks_per_sm(blocks)

    def round_bf16(self, x: Any) -> Any:
        """Rounding happens in the store to the bf16 tile that follows."""
        return x

    def exp(self, x: Any) -> Any:
        """e**x by exp2: one special-function instruction, within 2 ulp, and no fast-math flag needed."""
        return TL.exp2(x * self.number(LOG2_E))

    def silu(self, x: Any) -> Any:
        """x * sigmoid(x), by the hardware reciprocal."""
        return x * TL.fast_rcp(self.number(1.0) + self.exp(-x))

    def cos_sin(self, theta: Any) -> tuple[Any, Any]:
        """By the hardware functions, shifted to [-pi, pi), where they are good to 2**-21 absolute."""
        turned = theta - self.number(PI)
        return -_FAST_COS(turned), -_FAST_SIN(turned)

    def lower(self, func: Any) -> Any:
        """The lowered artifact: device and host modules and the CUDA source. Needs no nvcc and no GPU."""
        with tvm.transform.PassContext(opt_level=3, config=self.pass_configs), self.target:
            return tilelang.lower(func, target=self.target)


class _Rounded(str):
    """A dtype name that says: stored as this, rounded to bfloat16 where a tile is written by copy or round_bf16."""


class CpuDialect(Dialect):
    """Target "c". Every float is `precision`; "bf16" is fp32 with tiles declared bf16 rounded to bfloat16.

    order: "reverse" runs the iterations of every `T.Parallel` last to first, so a result that changes shows a race.
    poison: tiles start as NaN, so reading before writing shows.
    """

    cpu = True

    def __init__(self, precision: Precision = "float64", order: Order = "forward", poison: bool = False) -> None:
        self.dtype = "float32" if precision == "bf16" else precision
        self.f32 = self.dtype
        self.rounds = precision == "bf16"
        self.bf16 = _Rounded(self.dtype) if self.rounds else self.dtype
        self._low: list[Any] = []  # tiles that stand for bf16 ones
        self.order, self.poison = order, poison
        self.key = f"c:{precision}:{order}:{'poison' if poison else 'plain'}"
        self.target = tvm.target.Target("c")

    @staticmethod
    @kernel_launch_factory  # type: ignore[untyped-decorator]
    def Kernel(*grid: Any, threads: int | None = None, **_hints: Any) -> Any:
        """The grid as plain loops."""
        return TL.Kernel(*grid)

    def _alloc(self, shape: Any, dtype: str) -> Any:
        assert len(shape) <= 2, "shared tiles and fragments have at most two dimensions: TMA and gemm take no more"
        buffer = TL.alloc_local(shape, str.__str__(dtype))
        if isinstance(dtype, _Rounded):
            self._low.append(buffer)
        if self.poison and str(dtype).startswith("float"):
            TL.evaluate(TL.fill(buffer, float("nan")))
        return buffer

    def alloc_shared(self, shape: Any, dtype: str, scope: str | None = None) -> Any:
        """One address space: a local array."""
        return self._alloc(shape, dtype)

    def alloc_fragment(self, shape: Any, dtype: str, scope: str | None = None) -> Any:
        """One address space: a local array."""
        return self._alloc(shape, dtype)

    def Parallel(self, *extents: int, **_hints: Any) -> Any:
        """Nested loops, in the order the dialect was made with."""
        return TL.grid(*extents) if self.order == "forward" else self._reversed(extents)

    @staticmethod
    def _reversed(extents: tuple[int, ...]) -> Iterator[Any]:
        # The index goes through a variable: 0.1.15 lowers (c - i) // k in a buffer index wrongly.
        with Builder.current().with_frame(TL.grid(*extents)) as frame:
            indices = []
            for extent, i in zip(extents, list(frame) if len(extents) > 1 else [frame], strict=True):
                variable = TL.alloc_var("int32")
                TL.buffer_store(variable, extent - 1 - i, 0)
                indices.append(variable[0])
            yield tuple(indices) if len(indices) > 1 else indices[0]

    def Pipelined(self, start: Any, stop: Any = None, num_stages: int = 0, **_hints: Any) -> Any:
        """A serial loop."""
        return TL.Pipelined(start, stop, num_stages=0)

    def copy(self, src: Any, dst: Any, **_hints: Any) -> Any:
        """A copy; into a bf16 tile from a wider one it rounds."""
        narrows = any(dst is b for b in self._low) and not any(src is b for b in self._low)
        if narrows and getattr(src, "shape", None) is not None and src.scope() != "global":
            with Builder.current().with_frame(TL.grid(*[int(n) for n in dst.shape])) as frame:
                at = list(frame) if len(dst.shape) > 1 else [frame]
                TL.buffer_store(dst, self.round_bf16(src[tuple(at)]), at)
            return None
        return TL.copy(src, dst)

    def gemm(
        self, A: Any, B: Any, C: Any, transpose_A: bool = False, transpose_B: bool = False, policy: Any = None,
        clear_accum: bool = False, **_hints: Any,
    ) -> Any:  # fmt: skip
        """C (+)= A B. With clear_accum C must be a whole tile: the CPU gemm clears all of it, whatever the slice."""
        assert not clear_accum or hasattr(C, "scope"), "clear_accum on a slice clears the whole tile on the CPU"
        return TL.gemm(A, B, C, transpose_A=transpose_A, transpose_B=transpose_B, clear_accum=clear_accum)

    def stages(self, wanted: int) -> int:
        """A serial loop has none."""
        return 0

    def load(self, src: Any, dst: Any) -> Any:
        """A copy."""
        return self.copy(src, dst)

    def occupancy(self, blocks: int) -> None:
        """One thread."""

    def sync_threads(self, *_a: Any) -> None:
        """One thread."""

    def number(self, value: float) -> Any:
        """A constant. TileLang's C generator prints seven digits, so it must have no more."""
        assert float(f"{value:.6e}") == value, f"{value!r} would be cut to {value:.6e} on the CPU"
        return super().number(value)

    def exp(self, x: Any) -> Any:
        """e**x by the math library."""
        return TL.exp(x)

    def silu(self, x: Any) -> Any:
        """x * sigmoid(x)."""
        return x / (self.number(1.0) + self.exp(-x))

    def cos_sin(self, theta: Any) -> tuple[Any, Any]:
        """By the math library."""
        return TL.cos(theta), TL.sin(theta)

    def round_bf16(self, x: Any) -> Any:
        """Round to nearest even to bfloat16, kept in fp32; nothing in the exact precisions. A bare pair of casts
        would be folded away."""
        if not self.rounds:
            return x
        bits = TL.reinterpret(x, "uint32")
        odd = TL.bitwise_and(TL.shift_right(bits, TL.uint32(16)), TL.uint32(1))
        rounded = TL.bitwise_and(bits + TL.uint32(0x7FFF) + odd, TL.uint32(0xFFFF0000))
        return TL.reinterpret(rounded, "float32")
