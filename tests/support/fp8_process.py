"""A process that has a DOUBLE of transformer-engine from its beginning, before it imports megatron-core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def results(module: str, *words: object) -> Any:
    """What `main(WORDS)` of a module of tests.support printed, as JSON, on its last line."""
    code = f"import sys\nfrom tests.support.{module} import main\nif __name__ == '__main__':\n    main(*sys.argv[1:])"
    environ = {k: v for k, v in os.environ.items() if not k.upper().startswith("FATHOM_")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, words)]
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=540, check=False)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return json.loads(ended.stdout.strip().splitlines()[-1])
