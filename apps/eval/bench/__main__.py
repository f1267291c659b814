"""`fathom bench NAME`: which benchmarks there are. Argument parsing and output are in each one's command module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from apps.eval.bench.ab_command import add_ab_options, run_ab_command
from apps.eval.bench.all_command import add_all_options, run_all_command
from apps.eval.bench.comm_command import add_comm_options, run_comm_command
from apps.eval.bench.crossover_command import add_crossover_options, run_crossover_command
from apps.eval.bench.inference_command import add_inference_options, run_decode_command, run_prefix_command
from apps.eval.bench.kernels_command import add_kernels_options, run_kernels
from apps.eval.bench.loss_side_command import add_loss_side_options, run_loss_side_command
from apps.eval.bench.ops_command import add_ops_options, run_ops_command
from apps.eval.bench.psiv_command import add_psiv_options, run_psiv_command
from apps.eval.bench.step_command import add_step_options, run_step_command
from libs.flags.errors import run_entry


class Bench(NamedTuple):
    """Its options, what runs it (parsed options, and the words as given), and a line about it."""

    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Sequence[str]], int]
    summary: str


BENCHES = {
    "ops": Bench(add_ops_options, run_ops_command, "the MIMO scan: against GEMM rate, plain PyTorch, SDPA; on a GPU"),
    "kernels": Bench(
        add_kernels_options, lambda args, _: run_kernels(args), "what Hopper kernels need, compiled without a GPU"
    ),
    "comm": Bench(add_comm_options, run_comm_command, "context parallelism: state hand-over against all-to-all"),
    "ab": Bench(add_ab_options, run_ab_command, "two training configurations, whole step against whole step"),
    "prefix": Bench(add_inference_options, run_prefix_command, "equal prompts with and without the prefix cache"),
    "decode": Bench(add_inference_options, run_decode_command, "time per token of a hybrid and its dense twin; drafts"),
    "step": Bench(add_step_options, run_step_command, "a training step by its parts, and what recomputation costs"),
    "crossover": Bench(add_crossover_options, run_crossover_command, "hybrid against dense twin, 4k to 64k tokens"),
    "loss-side": Bench(add_loss_side_options, run_loss_side_command, "the loss of both after equal budgets, by seed"),
    "psiv": Bench(add_psiv_options, run_psiv_command, "PsiV, stage A: what keeping x * mimo_x could win at most"),
    "all": Bench(add_all_options, run_all_command, "all that fits this machine, a receipt each"),
}


def build_parser() -> argparse.ArgumentParser:
    """The options of `fathom bench` and of every benchmark."""
    parser = argparse.ArgumentParser(prog="fathom bench", description="Measure, behind a correctness gate.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, bench in BENCHES.items():
        bench.add_options(commands.add_parser(name, help=bench.summary))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when the correctness gate is red."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    return BENCHES[args.command].run(args, arguments)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
