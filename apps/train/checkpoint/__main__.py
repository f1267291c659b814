"""`fathom checkpoint verify|inspect|export`: the command line for saved checkpoints.

Arguments only; the work is in `inspect` and `export`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from libs.flags.errors import run_entry

_PATH = "a run (its newest checkpoint; for verify: all of them), runs/latest, a checkpoint, or an exported model"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status.

    Raises:
        UserError: no such checkpoint, or a damaged one.
    """
    arguments = build_parser().parse_args(argv)
    # Inside, because these imports take seconds that `--help` need not wait for.
    from apps.train.checkpoint.export import export
    from apps.train.checkpoint.inspect import inspect, verify

    if arguments.command == "verify":
        verify(arguments.path)
    elif arguments.command == "inspect":
        inspect(arguments.path, as_json=arguments.json)
    else:
        export(arguments.path, arguments.out)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The options of `fathom checkpoint verify`, `inspect` and `export`."""
    parser = argparse.ArgumentParser(prog="fathom checkpoint", description="Saved checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify", help="check every checksum and every tensor's extent", allow_abbrev=False)
    show = commands.add_parser("inspect", help="step, layout, gates, data and tensors", allow_abbrev=False)
    take = commands.add_parser("export", help="write a folder with the model for `fathom eval`", allow_abbrev=False)
    for command in (check, show, take):
        command.add_argument("path", type=Path, help=_PATH)
    show.add_argument("--json", action="store_true", help="print JSON")
    take.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
