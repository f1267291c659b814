"""`fathom bench ops`, `kernels` and `comm`: argument parsing and output only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apps.eval.bench.comm_command import add_comm_options, run_comm_command
from apps.eval.bench.kernels_command import add_kernels_options, run_kernels
from apps.eval.bench.ops_command import add_ops_options, run_ops_command
from libs.flags.errors import run_entry


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fathom bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_ops_options(commands.add_parser("ops", help="the MIMO scan: against GEMM rate, plain PyTorch, SDPA; on a GPU"))
    add_kernels_options(commands.add_parser("kernels", help="resources of the Hopper kernels, compiled without a GPU"))
    add_comm_options(commands.add_parser("comm", help="context parallelism: state hand-over against all-to-all"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when the correctness gate is red."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    if args.command == "kernels":
        return run_kernels(args)
    if args.command == "comm":
        return run_comm_command(args, arguments)
    return run_ops_command(args, arguments)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
