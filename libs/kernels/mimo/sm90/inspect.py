"""Facts about a kernel's CUDA side without a GPU: launch, shared memory, TMA and wgmma sites, registers, spills, lint.

Lowering needs no nvcc; registers need nvcc and ptxas. Nothing here runs a kernel. `inspect` keeps its findings on disk.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tilelang
from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH
from tilelang.env import env as tilelang_env

from libs.flags.errors import UserError
from libs.kernels.mimo.sm90 import lint as lint_module
from libs.kernels.mimo.sm90.dialect import REGISTERS_PER_SM, CudaDialect
from libs.kernels.mimo.sm90.gates import Mode
from libs.kernels.mimo.sm90.lint import lint, overlaps

SHARED_PER_BLOCK = 232_448  # bytes a block may have on sm_90
SHARED_PER_SM = 233_472  # 228 KiB; every resident block takes 1 KiB more than it asks for
SHARED_RESERVED = 1024
THREADS_PER_SM = 2048
BLOCKS_PER_SM = 32
MULTIPROCESSORS = 132  # H100 SXM, H200

_SETMAXNREG = re.compile(r"tl::warpgroup_reg_(?:de)?alloc<\d+>\(\);")
NVCC_WHEEL = "nvidia-cuda-nvcc"


class Registers(NamedTuple):
    """What ptxas says of one kernel: registers a thread, bytes of spill stores and loads, static shared bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    static_shared: int


class Facts(NamedTuple):
    """One compiled kernel.

    Attributes:
        grid, threads: as launched; 0 for an extent that is known at launch only. `threads` includes a producer group.
        shared: dynamic and static bytes a block.
        registers: as compiled, that is with the ceiling that setmaxnreg or a wanted occupancy sets.
        needed: without setmaxnreg and without a wanted occupancy.
        spills: bytes, stores plus loads, as compiled.
        blocks: resident on one multiprocessor, by registers, shared memory and threads.
        lint: known wrong code in the emitted source; empty is clean.
    """

    grid: tuple[int, ...]
    threads: int
    shared: int
    registers: int
    needed: int
    spills: int
    blocks: int
    tma_loads: int
    tma_stores: int
    bulk_copies: int
    async_copies: int
    wgmma: int
    mma: int
    specialized: bool
    tma_ranks: tuple[int, ...]
    lint: tuple[str, ...]


def inspect(func: Any, dialect: CudaDialect) -> Facts:
    """All facts of one traced kernel. A block that asks for more shared memory than there is counts 0 `blocks`.

    From disk when the same text was inspected before, by the same tools and the same code of this module.
    """
    path = Path(tilelang_env.TILELANG_CACHE_DIR) / "facts" / f"{_text_key(func, dialect)}.json"
    if path.is_file():
        return _read(path.read_text(encoding="utf-8"))
    facts = inspect_now(func, dialect)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(facts._asdict(), file)
    Path(file.name).replace(path)  # whole or not at all: two processes may write it
    return facts


def _text_key(func: Any, dialect: CudaDialect) -> str:
    code = b"".join(Path(str(name)).read_bytes() for name in (__file__, lint_module.__file__))
    parts = [func.script(show_meta=True), dialect.key, *tool_versions().values(), code.hex()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read(text: str) -> Facts:
    found: dict[str, Any] = json.loads(text)
    values: list[Any] = [tuple(v) if isinstance(v, list) else v for v in (found[name] for name in Facts._fields)]
    return Facts(*values)


def inspect_now(func: Any, dialect: CudaDialect) -> Facts:
    """`inspect` without the disk."""
    artifact = dialect.lower(func)
    source: str = artifact.kernel_source
    grid, threads, dynamic = _launch(artifact)
    built = ptxas(source)
    free = re.sub(r"(__launch_bounds__\(\d+), \d+\)", r"\1, 1)", _SETMAXNREG.sub("", source))
    needed = ptxas(free) if free != source else built
    shared = dynamic + built.static_shared
    found = lint(source, built.registers, threads) + overlaps(source, func)
    return Facts(
        grid, threads, shared, built.registers, needed.registers, built.spill_stores + built.spill_loads,
        resident_blocks(threads, built.registers, shared),
        tma_loads=len(re.findall(r"tl::tma_load\(\w+_desc", source)),
        tma_stores=len(re.findall(r"tl::tma_store\(", source)),
        bulk_copies=len(re.findall(r"tl::tma_load\((?!\w+_desc)", source)),
        async_copies=len(re.findall(r"cp_async_gs", source)),
        wgmma=len(re.findall(r"tl::wgmma_(?:ss|rs)<", source)),
        mma=len(re.findall(r"tl::mma_sync<", source)),
        specialized="warpgroup_reg_dealloc" in source or "tl_tiled_ws_applied" in _host_attributes(artifact),
        tma_ranks=tma_ranks(artifact),
        lint=tuple(found),
    )  # fmt: skip


def resident_blocks(threads: int, registers: int, shared: int) -> int:
    """Blocks that fit on one multiprocessor of sm_90. Registers are given out 8 a thread, 256 a warp at a time."""
    if shared > SHARED_PER_BLOCK:
        return 0
    warps = -(-threads // 32)
    by_registers = REGISTERS_PER_SM // (warps * 32 * max(24, -(-registers // 8) * 8))
    by_shared = SHARED_PER_SM // (shared + SHARED_RESERVED)
    return min(by_registers, by_shared, THREADS_PER_SM // (warps * 32), BLOCKS_PER_SM)


def _host_attributes(artifact: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for func in artifact.host_mod.functions.values():
        for name, value in func.attrs.items():
            if value is not None and bool(value):
                found[str(name)] = value
    return found


def tma_ranks(artifact: Any) -> tuple[int, ...]:
    """Dimensions larger than one of the box of every TMA descriptor: 2 where tiles are flat."""
    described = _host_attributes(artifact).get("tma_descriptor_args", {})
    ranks = []
    for arguments in described.values():
        words = [str(x) for x in list(arguments)[1:]]
        # name, dtype, rank, tensor, then sizes, strides and box, `rank` of each
        rank = int(words[2])
        box = words[4 + 2 * rank : 4 + 3 * rank]
        ranks.append(sum(int(extent) > 1 for extent in box))
    return tuple(ranks)


def mismatches(mode: Mode, facts: Facts) -> tuple[str, ...]:
    """What in the emitted code of a scan kernel is not what `mode` says; () when all is as asked.

    plain: no TMA at all. tma, ws: tiles come by TMA in boxes of at most two dimensions. ws: from a producer group.
    """
    found = []
    tma = facts.tma_loads + facts.tma_stores + facts.bulk_copies
    if mode == "plain" and tma:
        found.append(f"{tma} TMA sites, although TMA is off")
    if mode != "plain" and not facts.tma_loads + facts.bulk_copies:
        found.append("no tile comes by TMA, although TMA is on")
    if mode != "plain" and not facts.tma_ranks:
        found.append("no tile has a TMA descriptor, although TMA is on")
    if any(rank > 2 for rank in facts.tma_ranks):
        found.append(f"TMA boxes of {', '.join(map(str, facts.tma_ranks))} dimensions; tiles must be two-dimensional")
    if facts.specialized != (mode == "ws"):
        found.append(f"warp specialization is {'on' if facts.specialized else 'off'} in mode {mode}")
    return tuple(found)


def _launch(artifact: Any) -> tuple[tuple[int, ...], int, int]:
    functions = list(artifact.device_mod.functions.values())
    assert len(functions) == 1, "one kernel a module"
    attributes = functions[0].attrs
    # A size left open is a variable here
    extents = {str(k): int(getattr(v, "value", 0)) for k, v in attributes["thread_extent"].items()}
    grid = tuple(extents.get(f"blockIdx.{axis}", 1) for axis in "xyz")
    dynamic = int(attributes["dyn_shared_memory_buf"]) if "dyn_shared_memory_buf" in attributes else 0
    return grid, extents["threadIdx.x"], dynamic


@cache
def nvcc_path() -> str:
    """nvcc from the PATH, else from the wheel.

    Raises:
        UserError: neither is there.
    """
    on_path = shutil.which("nvcc")
    return nvcc_of_wheel() if on_path is None else on_path


def nvcc_of_wheel() -> str:
    """nvcc of the wheel nvidia-cuda-nvcc, 13 or newer; those for CUDA 12 have ptxas only.

    Raises:
        UserError: the wheel is not installed, or has no nvcc.
    """
    try:
        files = importlib.metadata.files(NVCC_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvcc":
            return str(file.locate())
    raise UserError(
        "nvcc is neither on the PATH nor installed as a wheel; install the extra `dev` of this project, or CUDA 13"
    )


def ptxas(source: str, arch: str = "sm_90a") -> Registers:
    """Compile a CUDA source to a cubin and read what ptxas reports."""
    number = arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        command = [
            nvcc_path(), "-std=c++20", "-cubin", "-gencode", f"arch=compute_{number},code=sm_{number}",
            "-Xptxas", "-v", "-w", f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}", str(path),
            "-o", str(path.with_suffix(".cubin")),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"nvcc refused a generated source:\n{done.stderr[-3000:]}"
    return parse_ptxas(done.stderr)


@cache
def tool_versions() -> dict[str, str]:
    """Versions of the compilers: what facts are good for."""
    said = subprocess.run([nvcc_path(), "--version"], capture_output=True, text=True, check=True).stdout
    return {"tilelang": str(tilelang.__version__), "nvcc": said.splitlines()[-1]}


def parse_ptxas(log: str) -> Registers:
    """Registers and spills of the only kernel in a `-Xptxas -v` log."""
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers", log)
    assert spills is not None, f"no kernel in the log of ptxas:\n{log[-2000:]}"
    assert used is not None, f"no kernel in the log of ptxas:\n{log[-2000:]}"
    static = re.search(r"(\d+) bytes smem", log)
    return Registers(int(used[1]), int(spills[1]), int(spills[2]), int(static[1]) if static else 0)
