"""`fathom` in a process of its own: torch_xla reads runtime and number of devices once, at its first import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
XLA = ("PJRT_DEVICE", "CPU_NUM_DEVICES")


def fathom(
    folder: Path, *words: object, code: str = "", timeout: float = 280, **variables: str
) -> tuple[int, str, str]:
    """`fathom WORDS` in `folder`: exit status, stdout, stderr.

    code: Python that runs before it, to break something. variables: of the environment, beside this process's own
    without those that torch_xla has read.
    """
    start = f"{code}\nfrom apps.cli import main\nraise SystemExit(main())"
    environment = {name: value for name, value in os.environ.items() if name not in XLA}
    done = subprocess.run(
        [sys.executable, "-c", start, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=timeout,
        env=environment | {"PYTHONPATH": str(ROOT)} | variables,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr
