"""Options and output of `fathom bench kernels`. The compilers are imported only when it runs."""

from __future__ import annotations

import argparse
import importlib.util
from typing import get_args

from rich.console import Console

from apps.eval.bench.kernel_table import KernelName
from libs.flags.errors import ExitStatus, UserError

KERNELS: tuple[KernelName, ...] = get_args(KernelName)
GATES = ("off", "tma", "tma+ws", "tma+ws, psiv precomputed", "tma+ws, psiv reused")
STATES = (64, 128)


def add_kernels_options(parser: argparse.ArgumentParser) -> None:
    """Which part of the table, and in which form."""
    parser.add_argument("--json", action="store_true", help="the table on stdout as JSON")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="only this kernel (may be repeated)")
    parser.add_argument("--gates", action="append", choices=GATES, help="only this setting (may be repeated)")
    parser.add_argument("--state", action="append", type=int, choices=STATES, help="only this N (may be repeated)")


def run_kernels(args: argparse.Namespace) -> int:
    """Compile, tabulate, print; 1 when a kernel has a problem.

    Raises:
        UserError: TileLang or nvcc is missing.
    """
    if importlib.util.find_spec("tilelang") is None:
        raise UserError("fathom bench kernels needs tilelang; install the extra `dev` or `cuda` of this project")
    from apps.eval.bench.kernel_report import print_kernels
    from apps.eval.bench.kernels import kernel_table

    found = kernel_table(args.kernel or KERNELS, args.gates or GATES, args.state or STATES)
    if args.json:
        print(found.model_dump_json(indent=2))
    else:
        print_kernels(found, Console())
    return ExitStatus.FAILURE if found.problems else ExitStatus.OK
