"""Stub libraries in place of NVIDIA's wheels, so that PyPI's torch can be imported on a machine without a GPU.

PyPI has one torch wheel for Linux, built with CUDA. It does not load without fourteen NVIDIA libraries (gigabytes of
wheels), of which nothing is ever called here: torch_xla computes on the CPU or on a TPU. This script reads from torch's
own libraries which files and symbols they ask for, and compiles libraries that have exactly these, each of which aborts
with its name when it is called. Only the CUDA runtime, which is asked for the number of GPUs, is the real one (1 MB).

    .venv-tpu/bin/python infra/tpu/cuda_stubs.py        into this environment's site-packages/nvidia

Needs gcc and readelf. Where the CPU build of torch can be had (its own package index), take that and leave this.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path

# Library -> folder of site-packages/nvidia in which torch looks for it.
FOLDERS = {
    "libcublas.so.12": "cublas",
    "libcublasLt.so.12": "cublas",
    "libcudnn.so.9": "cudnn",
    "libcufft.so.11": "cufft",
    "libcufile.so.0": "cufile",
    "libcupti.so.12": "cuda_cupti",
    "libcurand.so.10": "curand",
    "libcusolver.so.11": "cusolver",
    "libcusparse.so.12": "cusparse",
    "libcusparseLt.so.0": "cusparselt",
    "libnccl.so.2": "nccl",
    "libnvrtc.so.12": "cuda_nvrtc",
    "libnvshmem_host.so.3": "nvshmem",
    "libnvJitLink.so.12": "nvjitlink",
}
# Symbols without a version may come from any library that is loaded; they go into this one.
CATCH_ALL = "libcudnn.so.9"
NVIDIA = re.compile("cu|nccl|nv")
SYMBOL = re.compile(r"^\s*\d+: \S+\s+\d+ (\S+)\s+(\S+)\s+\S+\s+(\S+) ([^\s@]+)(?:@+(\S+))?")
NEEDED = re.compile(r"File: (\S+)")
VERSION = re.compile(r"Name: (\S+)\s+Flags")
CODE = 'extern int dprintf(int, const char *, ...);\nextern void abort(void);\nstatic void called(const char *name) {\n\
  dprintf(2, "%s was called: this environment has stubs in place of CUDA\\n", name);\n  abort();\n}\n'


def homes(library: Path) -> dict[str, str]:
    """Version name -> the library that a library expects it from."""
    text = subprocess.run(["readelf", "-W", "-V", str(library)], capture_output=True, text=True, check=True).stdout
    found, needed = {}, ""
    for line in text.splitlines():
        if match := NEEDED.search(line):
            needed = match.group(1)
        elif needed and (match := VERSION.search(line)):
            found[match.group(1)] = needed
    return found


def symbols(library: Path) -> tuple[set[tuple[str, str]], set[str]]:
    """(name, version or "") of what a library asks for, and the names it has."""
    text = subprocess.run(
        ["readelf", "-W", "--dyn-syms", str(library)], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    asked, defined = set(), set()
    for line in text.splitlines():
        if (match := SYMBOL.match(line)) is None:
            continue
        _type, binding, section, name, version = match.groups()
        if section != "UND":
            defined.add(name)
        elif binding != "WEAK":
            asked.add((name, version or ""))
    return asked, defined


def stub(target: Path, wanted: dict[str, set[str]]) -> None:
    """Compile a library with these symbols; wanted: version ("" for none) -> names."""
    names = sorted({name for group in wanted.values() for name in group})
    declared = [f'void f{i}(void) __asm__("{name}");' for i, name in enumerate(names)]
    lines = [*declared, *(f'void f{i}(void) {{ called("{name}"); }}' for i, name in enumerate(names))]
    versions = [f"{version} {{ global: {'; '.join(sorted(group))}; }};" for version, group in wanted.items() if version]
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder) / "stub.c", Path(folder) / "versions"
        source.write_text(CODE + "\n".join(lines) + "\n")
        script.write_text("\n".join(versions) + "\n")
        target.parent.mkdir(parents=True, exist_ok=True)
        options = [f"-Wl,--version-script={script}"] if versions else []
        command = ["gcc", "-shared", "-fPIC", "-O0", "-w", f"-Wl,-soname,{target.name}", *options]
        subprocess.run([*command, "-o", str(target), str(source)], check=True)


def main() -> int:
    """Write every stub; 2 when torch is not installed."""
    site = Path(sysconfig.get_paths()["purelib"])
    libraries = sorted((site / "torch" / "lib").glob("*.so*"))
    if not libraries:
        print(f"error: no torch in {site}: install torch==2.9.0 with --no-deps first", file=sys.stderr)
        return 2
    asked: set[tuple[str, str]] = set()
    home: dict[str, str] = {}
    defined: set[str] = set()
    runtime = sorted((site / "nvidia").glob("cuda_runtime/lib/*.so*"))
    for library in (*libraries, *runtime):
        wants, has = symbols(library)
        if library in libraries:
            asked |= wants
            home |= homes(library)
        defined |= has
    by_library: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in FOLDERS}
    for name, version in asked:
        if home.get(version) in by_library:
            by_library[home[version]][version].add(name)
        elif not version and name not in defined and NVIDIA.match(name):
            by_library[CATCH_ALL][""].add(name)
    for name, wanted in by_library.items():
        target = site / "nvidia" / FOLDERS[name] / "lib" / name
        stub(target, wanted)
    print(f"{len(by_library)} stub libraries in {site / 'nvidia'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
