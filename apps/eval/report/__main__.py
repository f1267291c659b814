"""`fathom report RUN | compare | all | receipts | flags | crossover | kernels`: argument parsing only."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from apps.eval.report.pages_command import PAGES
from libs.flags.errors import ExitStatus, UserError, run_entry
from libs.flags.fleet_cli import at_least_one
from libs.flags.logcheck import no_collections
from libs.flags.runs import RUNS, find_run


def build_parser() -> argparse.ArgumentParser:
    """The options of `fathom report RUN`."""
    parser = argparse.ArgumentParser(
        prog="fathom report",
        description="Write one self-contained HTML file about a run.",
        epilog=f"Other pages: fathom report {' | '.join((*_SEVERAL, *PAGES))}, each with --help.",
    )
    parser.add_argument("run", metavar="RUN", help="a run directory, its name under runs/, or runs/latest")
    parser.add_argument("--out", type=Path, help="the file to write (default: RUN/report.html)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and print where it is."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _SEVERAL:
        return _SEVERAL[words[0]](words[1:])
    if words and words[0] in PAGES:
        return _page(words[0], words[1:])
    args = build_parser().parse_args(words)
    _need_jinja()
    from apps.eval.report.build import REPORT_NAME, write_report
    from apps.eval.report.load import load_run

    run_dir = find_run(args.run)
    out = _checked(run_dir / REPORT_NAME if args.out is None else args.out)
    with no_collections():
        write_report(load_run(run_dir), out)
    print(f"report: {out}")
    return ExitStatus.OK


def compare_parser() -> argparse.ArgumentParser:
    """The options of `fathom report compare`."""
    parser = argparse.ArgumentParser(
        prog="fathom report compare", description="Write one self-contained HTML file about several runs."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directories, or their names under runs/")
    parser.add_argument("--out", type=Path, help="the file to write (default: compare.html here)")
    return parser


def _compare(words: list[str]) -> int:
    args = compare_parser().parse_args(words)
    _need_jinja()
    from apps.eval.report.compare import COMPARE_NAME, load_runs, write_comparison

    out = _checked(Path(COMPARE_NAME) if args.out is None else args.out)
    write_comparison(load_runs([find_run(run) for run in args.runs]), out)
    print(f"comparison: {out}")
    return ExitStatus.OK


def site_parser() -> argparse.ArgumentParser:
    """The options of `fathom report all`."""
    parser = argparse.ArgumentParser(
        prog="fathom report all", description="Every page about a folder of runs, side by side, with links."
    )
    parser.add_argument("runs_dir", nargs="?", type=Path, default=RUNS, metavar="RUNS_DIR", help=f"({RUNS})")
    parser.add_argument("--receipts", type=Path, metavar="DIR", help="of receipts: a page of them, and of crossovers")
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="what `fathom bench kernels --json` wrote")
    parser.add_argument("--limit", type=at_least_one, default=20, metavar="N", help="pages for the last N runs (20)")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="where to (report)")
    return parser


def _site(words: list[str]) -> int:
    args = site_parser().parse_args(words)
    _need_jinja()
    from apps.eval.report.site import Sources, write_site

    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: give the name of a folder; this is a file")
    written = write_site(Sources(args.runs_dir, args.receipts, args.kernels, args.limit), args.out)
    print(f"report: {written[0]} and {len(written) - 1} pages beside it")
    return ExitStatus.OK


def _page(name: str, words: list[str]) -> int:
    args = PAGES[name].build_parser().parse_args(words)
    _need_jinja()
    from apps.eval.report.page import write_page

    out = _checked(args.out)
    write_page(PAGES[name].make(args), out)
    print(f"report: {out}")
    return ExitStatus.OK


_SEVERAL: Mapping[str, Callable[[list[str]], int]] = {"compare": _compare, "all": _site}


def _need_jinja() -> None:
    if importlib.util.find_spec("jinja2") is None:
        raise UserError("fathom report needs the package jinja2: install the extra with `pip install 'fathom[eval]'`")


def _checked(out: Path) -> Path:
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: give the name of a file in a directory that exists")
    return out


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
