"""Wrong code that TileLang 0.1.15 emits and every tool accepts, found in the emitted CUDA source.

Not for what a kernel costs (`inspect`), and not a proof: each check knows one pattern that was seen.
"""

from __future__ import annotations

import math
import re
from typing import Any

from libs.kernels.mimo.sm90.dialect import WARP_GROUP

_SETMAXNREG_COUNT = re.compile(r"tl::warpgroup_reg_(?:de)?alloc<(\d+)>\(\);")
_POINTER = re.compile(r"void\* (\w+) = \(\(void\*\)\(\(char\*\)buf_dyn_shmem \+ (\d+)\)\)")
_TILE = re.compile(r"(\w+) = T\.(?:sblock_)?alloc_buffer\((\([^)]*\)|\d+)(?:, \"(\w+)\")?, scope=\"shared")
_FILLED = re.compile(r"\(\((?:bfloat16_t|float|int)\*\)(\w+)\)\[")
# Scratch of a reduction across warps: its threads, or vectors a thread times their stride, and the element's type.
_SCRATCH = re.compile(
    r"tl::AllReduce<[^;]*?NamedBarrier<(\d+)>(?:, (\d+), (\d+))?>::run(?:_batch)?\([^;]*?\(\((float\d?)\*\)(\w+)\)\["
)
_BYTES = {"bfloat16": 2, "float32": 4, "int32": 4}
_PRODUCER = re.compile(
    r"if \(\(\(int\)threadIdx\.x\) < \d+\) \{\n"
    r"(?:\s*tl::warpgroup_reg_dealloc|(?:.*\n){0,3}?\s*for \(|\s*tl::__sync_thread_partial)"
)
_RING = re.compile(r"\((\w+) & (\d+)\)|\((\w+) % (\d+)\)")


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


def overlaps(source: str, func: Any) -> list[str]:
    """Tiles filled by TMA that share memory with another tile: the fill may come while the other is in use.

    Sizes come from the traced kernel; those of the scratch that lowering adds for reductions, from its uses.
    """
    sizes = {name: _bytes(shape, dtype or "float32") for name, shape, dtype in _TILE.findall(func.script())}
    for threads, batch, stride, kind, name in _SCRATCH.findall(source):
        elements = int(batch) * int(stride) if batch else int(threads)
        sizes[name] = max(sizes.get(name, 0), elements * 4 * int(kind.removeprefix("float") or 1))
    starts = {name: int(at) for name, at in _POINTER.findall(source)}
    assert starts.keys() <= sizes.keys(), f"tiles of unknown size: {', '.join(starts.keys() - sizes.keys())}"
    spans = {name: (at, at + sizes[name]) for name, at in starts.items()}
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
