"""Facts about a kernel's CUDA side without a GPU: launch, shared memory, TMA and wgmma sites, registers, spills, lint.

Lowering needs no nvcc; registers need nvcc and ptxas. Nothing here runs a kernel.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

from libs.flags.errors import UserError
from libs.kernels.mimo.sm90.dialect import REGISTERS_PER_SM, WARP_GROUP, CudaDialect

SHARED_PER_BLOCK = 232_448  # bytes a block may have on sm_90
SHARED_PER_SM = 233_472  # 228 KiB; every resident block takes 1 KiB more than it asks for
SHARED_RESERVED = 1024
THREADS_PER_SM = 2048
BLOCKS_PER_SM = 32
MULTIPROCESSORS = 132  # H100 SXM, H200

_SETMAXNREG = re.compile(r"tl::warpgroup_reg_(?:de)?alloc<\d+>\(\);")
_SETMAXNREG_COUNT = re.compile(r"tl::warpgroup_reg_(?:de)?alloc<(\d+)>\(\);")
_POINTER = re.compile(r"void\* (\w+) = \(\(void\*\)\(\(char\*\)buf_dyn_shmem \+ (\d+)\)\)")
_TILE = re.compile(r"(\w+) = T\.(?:sblock_)?alloc_buffer\((\([^)]*\)|\d+)(?:, \"(\w+)\")?, scope=\"shared")
_FILLED = re.compile(r"\(\((?:bfloat16_t|float|int)\*\)(\w+)\)\[")
_BYTES = {"bfloat16": 2, "float32": 4, "int32": 4}
_PRODUCER = re.compile(
    r"if \(\(\(int\)threadIdx\.x\) < \d+\) \{\n"
    r"(?:\s*tl::warpgroup_reg_dealloc|(?:.*\n){0,3}?\s*for \(|\s*tl::__sync_thread_partial)"
)
_RING = re.compile(r"\((\w+) & (\d+)\)|\((\w+) % (\d+)\)")


class Registers(NamedTuple):
    """What ptxas says of one kernel: registers a thread, bytes of spill stores and loads, static shared bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    static_shared: int


class Facts(NamedTuple):
    """One compiled kernel.

    Attributes:
        grid, threads: as launched; `threads` includes a producer warp group.
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

    @property
    def busy(self) -> int:
        """Multiprocessors of 132 that get a block."""
        blocks = 1
        for extent in self.grid:
            blocks *= extent
        return min(blocks, MULTIPROCESSORS)


def inspect(func: Any, dialect: CudaDialect) -> Facts:
    """All facts of one traced kernel. A block that asks for more shared memory than there is counts 0 `blocks`."""
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


def _launch(artifact: Any) -> tuple[tuple[int, ...], int, int]:
    functions = list(artifact.device_mod.functions.values())
    assert len(functions) == 1, "one kernel a module"
    attributes = functions[0].attrs
    extents = {str(k): int(v) for k, v in attributes["thread_extent"].items()}
    grid = tuple(extents.get(f"blockIdx.{axis}", 1) for axis in "xyz")
    dynamic = int(attributes["dyn_shared_memory_buf"]) if "dyn_shared_memory_buf" in attributes else 0
    return grid, extents["threadIdx.x"], dynamic


def ptxas(source: str, arch: str = "sm_90a") -> Registers:
    """Compile a CUDA source to a cubin and read what ptxas reports."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise UserError("nvcc is not on the PATH; install a CUDA 13 toolkit or the wheel nvidia-cuda-nvcc")
    number = arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        command = [
            nvcc, "-std=c++20", "-cubin", "-gencode", f"arch=compute_{number},code=sm_{number}", "-Xptxas", "-v", "-w",
            f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}", str(path), "-o", str(path.with_suffix(".cubin")),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"nvcc refused a generated source:\n{done.stderr[-3000:]}"
    return parse_ptxas(done.stderr)


def parse_ptxas(log: str) -> Registers:
    """Registers and spills of the only kernel in a `-Xptxas -v` log."""
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers", log)
    assert spills is not None, f"no kernel in the log of ptxas:\n{log[-2000:]}"
    assert used is not None, f"no kernel in the log of ptxas:\n{log[-2000:]}"
    static = re.search(r"(\d+) bytes smem", log)
    return Registers(int(used[1]), int(spills[1]), int(spills[2]), int(static[1]) if static else 0)


def overlaps(source: str, func: Any) -> list[str]:
    """Tiles filled by TMA that share memory with another tile: the fill may come while the other is in use."""
    sizes = {name: _bytes(shape, dtype or "float32") for name, shape, dtype in _TILE.findall(func.script())}
    spans = {name: (int(at), int(at) + sizes[name]) for name, at in _POINTER.findall(source)}
    filled = set()
    for call in re.findall(r"tl::tma_load\(.*", source):
        for name in _FILLED.findall(call):
            if name in spans:
                filled.add(name)
                ring = _RING.search(call[call.index(name) :])
                slots = 1 if ring is None else int(ring[2]) + 1 if ring[2] else int(ring[4])
                spans[name] = (spans[name][0], spans[name][0] + slots * sizes[name])
    return [
        f"{name} is filled by TMA and shares memory with {other}"
        for name in sorted(filled)
        for other in sorted(spans)
        if other != name and spans[other][0] < spans[name][1] and spans[name][0] < spans[other][1]
    ]


def _bytes(shape: str, dtype: str) -> int:
    return math.prod(int(extent) for extent in re.findall(r"\d+", shape)) * _BYTES[dtype]


def lint(source: str, registers: int, threads: int) -> list[str]:
    """Code of TileLang 0.1.15 that compiles and is wrong; [] is clean. `registers` a thread are launched with."""
    body = source[source.index("main_kernel(") :]
    found = []
    wanted = sum(int(n) for n in _SETMAXNREG_COUNT.findall(source)) * WARP_GROUP
    if wanted > registers * threads:
        found.append(f"setmaxnreg asks for {wanted} registers of the block's {registers * threads}: it would hang")
    split = _PRODUCER.search(body)
    if "mbarrier" in body and split and "stmatrix" in body[: split.start()]:
        found.append("stmatrix before the warp-specialized loop: the producer's registers overwrite the tile")
    for load in re.findall(r"tl::tma_load\((.*)\);", body):
        barrier = re.search(r"mbarrier\[(.*?)\]", load)
        ring = _RING.search(barrier[1]) if barrier else None
        target = load[load.index("(&(") :].split("])), ")[0] if "(&(" in load else ""
        if ring and ring.group(0) not in target:
            found.append(f"a TMA load signals ring slot {ring.group(0)} but writes an unstaged tile: {target[:60]}")
    for division in sorted(set(re.findall(r"\brdiv\w* = \(.* / -\d+\)", body))):
        found.append(f"division by a negative constant, from an index (c - i) // k: {division}")
    return found
