"""Files that appear whole or not at all, and whether one could be made at a place.

Not for logs, which grow by lines (append_file.py), nor for checkpoints, which are folders (libs.model.checkpoint).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write aside and rename: whoever reads `path` sees the old content or the new one. OSError as it comes."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(content)
    os.replace(aside, path)


def try_folder(folder: Path) -> None:
    """Make a file in `folder`, or in the nearest one above it that is there, and take it away again.

    Raises:
        OSError: none can be made. Permission bits do not tell that of every place.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    with tempfile.TemporaryFile(dir=there):
        pass
