"""The one way to run a scan kernel on torch tensors: built for where they are, called, and its build recorded.

CPU tensors run the kernel's source through TileLang's "c" target, for checking only; CUDA tensors run it compiled for
sm_90a, on the current stream. Outputs are tensors of the caller's, written in place.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import tilelang
import torch
from torch import Tensor

from libs.kernels.mimo.sm90.dialect import CpuDialect, CudaDialect, Dialect, Precision
from libs.kernels.mimo.sm90.gates import Mode
from libs.kernels.mimo.sm90.tiles import require_shared


class Compiled(NamedTuple):
    """One kernel built by this process.

    Attributes:
        spec: with zeros for the sizes it is not specialised on.
        mode: that of the gates, or the dialect of a CPU build.
        seconds: of tracing, lowering and the compilers; little when TileLang found the kernel in its cache on disk.
    """

    kernel: str
    spec: Hashable
    mode: str
    device: str
    seconds: float


class _Key(NamedTuple):
    version: str
    factory: str
    spec: Hashable
    dialect: str
    device: str
    flags: tuple[str, ...]


# A kernel factory: `make(dialect, spec)` traces a kernel.
Factory = Callable[[Any, Any], Any]

# Of the host compiler, since TileLang itself passes no -O. Quick to build, not to run.
CPU_FLAGS: tuple[str, ...] = ("-O1", "-fno-strict-aliasing", "-w")
_CPU_PASS_CONFIGS = {"tirx.disable_vectorize": True}  # vector casts are wrong for half and hide bounds errors

_TMA_ALIGNMENT = 16  # bytes

_built: dict[_Key, Callable[..., Any]] = {}
_compiled: list[Compiled] = []


def compiled() -> tuple[Compiled, ...]:
    """Every kernel built so far, in order. After warm-up it must not grow."""
    return tuple(_compiled)


def cpu_dialect(precision: Precision) -> CpuDialect:
    """The dialect of CPU runs; tests replace it to reverse loops or poison tiles."""
    return CpuDialect(precision)


def precision_of(tensors: Sequence[Tensor]) -> Precision:
    """fp64 tensors run in "float64", bf16 ones in emulated "bf16", others in "float32"."""
    dtypes = {u.dtype for u in tensors}
    assert not {torch.float64, torch.bfloat16} <= dtypes, "bf16 goes with fp32, fp64 stands alone"
    if torch.float64 in dtypes:
        return "float64"
    return "bf16" if torch.bfloat16 in dtypes else "float32"


def launch(make: Factory, spec: Hashable, mode: Mode, tensors: Sequence[Tensor]) -> None:
    """Run the kernel of `make(dialect, spec)` on `tensors`, inputs and outputs in the order of its parameters.

    Args:
        mode: how a CUDA kernel is built; the CPU has only one way.
        tensors: contiguous, on one device, of the dtypes that the kernel declares.

    Raises:
        UserError: the kernel asks for more shared memory than a block can have.
    """
    device = tensors[0].device
    for i, u in enumerate(tensors):
        assert u.is_contiguous(), f"argument {i} of {make.__name__} is not contiguous"
        assert u.device == device, f"argument {i} of {make.__name__} is on {u.device}, others on {device}"
    if device.type == "cuda":
        misplaced = [i for i, u in enumerate(tensors) if u.data_ptr() % _TMA_ALIGNMENT]
        assert not misplaced, f"arguments {misplaced} of {make.__name__} do not start on {_TMA_ALIGNMENT} bytes"
        kernel = _get(make, spec, CudaDialect(mode), device, ())
        with torch.cuda.device(device):
            kernel(*tensors)
        return
    dialect = cpu_dialect(precision_of(tensors))
    wide = [u.float() if u.dtype == torch.bfloat16 else u for u in tensors]
    for i, u in enumerate(wide):
        right = not u.is_floating_point() or u.dtype == getattr(torch, dialect.dtype)
        assert right, f"argument {i} of {make.__name__} is {u.dtype} among {dialect.dtype}"
    _get(make, spec, dialect, device, CPU_FLAGS)(*wide)
    for u, w in zip(tensors, wide, strict=True):
        if u is not w:
            u.copy_(w)  # rounds what was written; what was read is unchanged


# A kernel serves any number of sequences and of tokens: a new length compiles nothing. (The number of splits could stay
# open too, but then bulk copies of the weights turn into one-dimensional descriptor loads.)
OPEN = ("B", "S")


def opened(dialect: Dialect, spec: Hashable) -> tuple[Hashable, Hashable]:
    """A spec to build from, with symbols for the sizes that stay open, and the same with zeros: its name in caches."""
    names = [name for name in OPEN if hasattr(spec, name)]
    replace: Any = getattr(spec, "_replace", None)
    if not names:
        return spec, spec
    return replace(**{name: dialect.dynamic(name) for name in names}), replace(**dict.fromkeys(names, 0))


def _get(
    make: Factory, spec: Hashable, dialect: Dialect, device: torch.device, flags: tuple[str, ...]
) -> Callable[..., Any]:
    factory = f"{make.__module__}.{make.__qualname__}"
    symbolic, closed = opened(dialect, spec)
    key = _Key(tilelang.__version__, factory, closed, dialect.key, str(device), flags)
    if key not in _built:
        start = time.perf_counter()
        func = make(dialect, symbolic)
        if isinstance(dialect, CudaDialect):
            kernel, mode = compile_cuda(func, dialect, make.__name__), str(dialect.mode)
        else:
            assert isinstance(dialect, CpuDialect)
            kernel, mode = compile_cpu(func, dialect, flags), dialect.key
        _built[key] = kernel
        _compiled.append(Compiled(make.__name__, closed, mode, str(device), time.perf_counter() - start))
    return _built[key]


def compile_cpu(func: Any, dialect: CpuDialect, flags: Sequence[str]) -> Callable[..., Any]:
    """A callable on CPU tensors for a traced kernel. TileLang keeps it on disk too, by the kernel's own text."""
    with dialect.target:
        kernel: Callable[..., Any] = tilelang.compile(
            func, target="c", target_host="c", execution_backend="cython", compile_flags=list(flags),
            pass_configs=_CPU_PASS_CONFIGS,
        )  # fmt: skip
    return kernel


def compile_cuda(func: Any, dialect: CudaDialect, name: str) -> Callable[..., Any]:
    """A callable on CUDA tensors. Needs nvcc and no GPU.

    Raises:
        UserError: more shared memory than a block can have.
    """
    kernel = tilelang.compile(
        func, target=dialect.target, execution_backend="tvm_ffi", pass_configs=dict(dialect.pass_configs)
    )
    require_shared(name, launch_shared(kernel))
    done: Callable[..., Any] = kernel
    return done


_ARGUMENT = re.compile(r"v_int64\) = \(\(int64_t\)(.+)\);|v_ptr\) = ")
_SIGNATURE = re.compile(r"main_kernel\(([^)]*)\)")
_STATIC = re.compile(r"^\s*__shared__.* (\w+) \w+\[(\d+)\];", re.MULTILINE)
_DYNAMIC = "extern __shared__"
_GRID_AND_BLOCK = range(4, 7)  # numbers: the grid has one to three, the block three
_ALIGNMENT = 1024  # of the dynamic part, which begins behind the static one


def launch_shared(kernel: Any) -> int:
    """Bytes of shared memory a block, as the host code asks for and the device code declares.

    Read from the sources, since a kernel that TileLang found on disk has nothing else.
    """
    host: str = kernel.adapter.get_host_source()
    device: str = kernel.get_kernel_source()
    numbers: list[str] = []  # behind the last pointer: sizes left open, then grid, block and dynamic bytes
    for found in _ARGUMENT.finditer(host[: host.rindex('"main_kernel"')]):
        numbers = [] if found[1] is None else [*numbers, found[1]]
    signature = _SIGNATURE.search(device)
    assert signature is not None, "no kernel in its own source"
    dynamic = int(numbers.pop()) if _DYNAMIC in device else 0
    extents = len(numbers) - len(re.findall(r"\bint \w+", signature[1]))
    assert extents in _GRID_AND_BLOCK, f"launch arguments {numbers}"
    sizes = {"uint64_t": 8, "float": 4, "int": 4, "bfloat16_t": 2}
    static = sum(sizes[kind] * int(n) for kind, n in _STATIC.findall(device))
    return dynamic + math.ceil(static / _ALIGNMENT) * _ALIGNMENT
