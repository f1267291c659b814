"""`fathom docs`: which blocks there are, and renewing them. What stands in each is made by its own module."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from apps.docs.blocks import COMMAND, Block, stale, write
from apps.docs.commands import cli_reference
from apps.docs.gates import gate_table
from apps.docs.parsers import build_parser
from apps.docs.recipes import recipe_table
from apps.docs.records import decision_table, measurement_table
from apps.docs.steps import step_table
from libs.flags.errors import ExitStatus, run_entry
from libs.flags.provenance import ROOT

BLOCKS = (
    Block("README.md", "receipts", measurement_table),
    Block("libs/flags/README.md", "gates", gate_table),
    Block("apps/train/README.md", "recipes", recipe_table),
    Block("libs/parallel/xla/README.md", "steps", step_table),
    Block("infra/decisions/README.md", "decisions", decision_table),
    Block("docs/cli.md", "commands", cli_reference),
)


def main(argv: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    """Renew every block; with --check write nothing, and 1 when one is stale.

    Raises:
        UserError: a file without its marks, or a record or receipt that cannot be read.
    """
    check = build_parser().parse_args(argv).check
    found = stale(BLOCKS, root)
    for path, text in found.items():
        if not check:
            write(path, text)
        print(f"{path.relative_to(root)}: {'stale' if check else 'renewed'}")
    if check and found:
        print(f"error: {len(found)} documents are not what the code says; renew them: {COMMAND}", file=sys.stderr)
        return ExitStatus.FAILURE
    return ExitStatus.OK


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
