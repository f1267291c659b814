"""Options and output of `fathom bench ops`, on either device. The parts for a GPU are imported only when asked for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from apps.eval.bench.ops import full_plan, quick_plan, run_ops
from apps.eval.bench.output import checked_threads, deliver, in_range
from apps.eval.bench.receipt import Receipt
from libs.flags.errors import UserError

MAX_MINUTES = 24 * 60
CHUNK = 16


def add_ops_options(parser: argparse.ArgumentParser) -> None:
    """What to time, how often, and where the receipt goes. None: the option was not given."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", action="store_true", help="the receipt on stdout as JSON")
    parser.add_argument("--n", type=int, default=7, help="interleaved samples per contender (cpu: 3 above S=8192)")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, not how fast")
    parser.add_argument("--receipt-dir", type=Path, help="also write <date>_<subject>_<hardware>/receipt.json there")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own number)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", help="name of the machine in the receipt (default: its CPU and threads, or GPU)")
    cpu = parser.add_argument_group("with --device cpu")
    cpu.add_argument("--chunk-size", type=int, help=f"chunk of the op (default {CHUNK}, where FLOPs are counted)")
    cuda = parser.add_argument_group("with --device cuda")
    cuda.add_argument("--against", metavar="PACKAGE", help="also time mamba_ssm, where it is installed")
    cuda.add_argument("--base", help="lane that PsiV stages and split are added to: off (default), tma, tma_ws")
    cuda.add_argument("--minutes", type=float, help="begin no further round after this time")
    cuda.add_argument("--jobs", type=int, help="processes that compile kernels ahead (default: all cores)")


def run_ops_command(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the benchmark and print its receipt; 1 when the correctness gate is red.

    Raises:
        UserError: an option out of its range, or one that belongs to the other device.
    """
    threads, command = checked_threads(args), ["fathom", "bench", *arguments]

    def run() -> Receipt:
        if args.device == "cpu":
            return _on_cpu(args, command, threads)
        return _on_cuda(args, command, threads, os.cpu_count() or 1)

    return deliver(args, run)


def _on_cpu(args: argparse.Namespace, command: Sequence[str], threads: int) -> Receipt:
    _only_with("cuda", args, ("against", "base", "minutes", "jobs"))
    chunk_size = CHUNK if args.chunk_size is None else args.chunk_size
    in_range("--chunk-size", chunk_size, 1, 256)
    make_plan = quick_plan if args.quick else full_plan
    plan = make_plan(rounds=args.n, chunk_size=chunk_size, threads=threads, seed=args.seed)
    return run_ops(plan, command=command, machine=args.machine)


def _on_cuda(args: argparse.Namespace, command: Sequence[str], threads: int, cores: int) -> Receipt:
    from apps.eval.bench.cuda import plan as plans
    from apps.eval.bench.cuda.run import run_cuda

    _only_with("cpu", args, ("chunk_size",))
    base = "off" if args.base is None else args.base
    workers = cores if args.jobs is None else args.jobs
    in_range("--jobs", workers, 1, cores)
    if args.minutes is not None:
        in_range("--minutes", args.minutes, 0.1, MAX_MINUTES)
    make_plan = plans.quick_plan if args.quick else plans.full_plan
    plan = make_plan(
        rounds=args.n, seed=args.seed, base=base, workers=workers, against=args.against,
        seconds=None if args.minutes is None else 60 * args.minutes,
    )  # fmt: skip
    torch.set_num_threads(threads)
    return run_cuda(plan, base=base, command=command, machine=args.machine)


def _only_with(device: str, args: argparse.Namespace, names: Sequence[str]) -> None:
    for name in names:
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} {getattr(args, name)}: only with --device {device}, not {args.device}")
