"""`fathom report RUN`: argument parsing only."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from libs.flags.errors import ExitStatus, UserError, run_entry
from libs.flags.runs import find_run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fathom report", description="Write one self-contained HTML file about a run."
    )
    parser.add_argument("run", metavar="RUN", help="a run directory, its name under runs/, or runs/latest")
    parser.add_argument("--out", type=Path, help="the file to write (default: RUN/report.html)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and print where it is."""
    args = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    if importlib.util.find_spec("jinja2") is None:
        raise UserError("fathom report needs the package jinja2: install the extra with `pip install 'fathom[eval]'`")
    from apps.eval.report.build import REPORT_NAME, write_report
    from apps.eval.report.load import load_run

    run_dir = find_run(args.run)
    out: Path = run_dir / REPORT_NAME if args.out is None else args.out
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: give the name of a file in a directory that exists")
    write_report(load_run(run_dir), out)
    print(f"report: {out}")
    return ExitStatus.OK


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
