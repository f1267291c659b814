"""`python -m libs.flags ...` is `fathom flags ...`.

Not for `fathom log`, which is `libs.flags.cli.main_log`.
"""

from __future__ import annotations

from libs.flags.cli import main_flags as main
from libs.flags.errors import run_entry

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(run_entry(main))
