"""Write wheels.lock from a folder of downloaded wheels: each with its version, hash and size.

For `prepare.sh --relock`. Not a resolver: pip has decided before what is in the folder. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

HEADER = """\
# Every wheel of an offline GPU machine (x86-64 Linux, CPython 3.11, CUDA 13), made by `prepare.sh --relock`.
# {count} wheels, {total} bytes to carry.
"""


def entry(wheel: Path) -> str:
    """One requirement line; the file name of a wheel starts with NAME-VERSION- (PEP 427)."""
    name, version = wheel.name.split("-")[:2]
    with wheel.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return f"{name.replace('_', '-').lower()}=={version} --hash=sha256:{digest}  # {wheel.stat().st_size} bytes"


def main() -> None:
    """Read FOLDER, write LOCK."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("lock", type=Path)
    args = parser.parse_args()
    wheels = sorted(args.folder.glob("*.whl"), key=lambda path: path.name.lower())
    assert wheels, f"no wheels in {args.folder}"
    total = sum(path.stat().st_size for path in wheels)
    lines = [entry(path) for path in wheels]
    args.lock.write_text(HEADER.format(count=len(wheels), total=total) + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
