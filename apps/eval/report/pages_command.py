"""`fathom report receipts`, `flags`, `crossover` and `kernels`: options of the pages that are not about runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

RECEIPTS_NAME, FLAGS_NAME, CROSSOVER_NAME = "receipts.html", "flags.html", "crossover.html"
KERNELS_NAME = "kernels.html"


class Page(NamedTuple):
    """Its options, `out` among them, and what makes its text of them."""

    build_parser: Callable[[], argparse.ArgumentParser]
    make: Callable[[argparse.Namespace], str]


def _receipts_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fathom report receipts", description="Every receipt of a folder, on one page."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("infra/receipts"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path(RECEIPTS_NAME), help=f"the file to write ({RECEIPTS_NAME})")
    return parser


def _receipts(args: argparse.Namespace) -> str:
    from apps.eval.report.receipts_page import receipts_page

    return receipts_page(args.folder)


def _flags_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fathom report flags", description="Every gate, and what became of it.")
    parser.add_argument("runs_dir", nargs="?", type=Path, metavar="RUNS_DIR", help="whose outcomes to show (none)")
    parser.add_argument("--out", type=Path, default=Path(FLAGS_NAME), help=f"the file to write ({FLAGS_NAME})")
    return parser


def _flags(args: argparse.Namespace) -> str:
    from apps.eval.report.flags_page import flags_page

    return flags_page(args.runs_dir)


def _crossover_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fathom report crossover", description="Both curves, and where they cross.")
    parser.add_argument("receipt", type=Path, help="of `fathom bench crossover`: the file, or its folder")
    parser.add_argument("--out", type=Path, default=Path(CROSSOVER_NAME), help=f"the file to write ({CROSSOVER_NAME})")
    return parser


def _crossover(args: argparse.Namespace) -> str:
    from apps.eval.report.crossover_page import crossover_page, read_crossover

    return crossover_page(read_crossover(args.receipt))


def _kernels_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fathom report kernels", description="Registers, spills, shared memory, occupancy by kernel and gates."
    )
    parser.add_argument("table", type=Path, help="what `fathom bench kernels --json` wrote")
    parser.add_argument("--out", type=Path, default=Path(KERNELS_NAME), help=f"the file to write ({KERNELS_NAME})")
    return parser


def _kernels(args: argparse.Namespace) -> str:
    from apps.eval.report.kernels_page import kernels_page, read_kernels

    return kernels_page(read_kernels(args.table))


# The first word of the command line -> the page it asks for.
PAGES: Mapping[str, Page] = {
    "receipts": Page(_receipts_parser, _receipts),
    "flags": Page(_flags_parser, _flags),
    "crossover": Page(_crossover_parser, _crossover),
    "kernels": Page(_kernels_parser, _kernels),
}
