"""Options and output of `fathom bench ops`, on either device. The parts for a GPU are imported only when asked for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from apps.eval.bench.ops import RedGate, full_plan, quick_plan, run_ops
from apps.eval.bench.receipt import Receipt, write_receipt
from apps.eval.bench.table import print_receipt
from libs.flags.errors import ExitStatus, UserError

MAX_ROUNDS = 1000
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
    threads = torch.get_num_threads() if args.threads is None else args.threads
    cores = os.cpu_count() or 1
    _in_range("--n", args.n, 1, MAX_ROUNDS)
    _in_range("--threads", threads, 1, cores)
    if args.receipt_dir is not None and args.receipt_dir.exists() and not args.receipt_dir.is_dir():
        raise UserError(f"--receipt-dir {args.receipt_dir} is not a directory")
    command = ["fathom", "bench", *arguments]
    try:
        receipt = _on_cpu(args, command, threads) if args.device == "cpu" else _on_cuda(args, command, threads, cores)
    except RedGate as red:
        print(f"error: {red}", file=sys.stderr)
        return ExitStatus.FAILURE
    if args.json:
        print(receipt.model_dump_json(indent=2))
    else:
        print_receipt(receipt, Console())
    if args.receipt_dir is not None:
        print(f"receipt: {write_receipt(receipt, args.receipt_dir)}", file=sys.stderr)
    return ExitStatus.OK


def _on_cpu(args: argparse.Namespace, command: Sequence[str], threads: int) -> Receipt:
    _only_with("cuda", args, ("against", "base", "minutes", "jobs"))
    chunk_size = CHUNK if args.chunk_size is None else args.chunk_size
    _in_range("--chunk-size", chunk_size, 1, 256)
    make_plan = quick_plan if args.quick else full_plan
    plan = make_plan(rounds=args.n, chunk_size=chunk_size, threads=threads, seed=args.seed)
    return run_ops(plan, command=command, machine=args.machine)


def _on_cuda(args: argparse.Namespace, command: Sequence[str], threads: int, cores: int) -> Receipt:
    from apps.eval.bench.cuda import plan as plans
    from apps.eval.bench.cuda.run import run_cuda

    _only_with("cpu", args, ("chunk_size",))
    base = "off" if args.base is None else args.base
    workers = cores if args.jobs is None else args.jobs
    _in_range("--jobs", workers, 1, cores)
    if args.minutes is not None:
        _in_range("--minutes", args.minutes, 0.1, MAX_MINUTES)
    make_plan = plans.quick_plan if args.quick else plans.full_plan
    plan = make_plan(
        rounds=args.n, seed=args.seed, base=base, workers=workers, against=args.against,
        seconds=None if args.minutes is None else 60 * args.minutes,
    )  # fmt: skip
    torch.set_num_threads(threads)
    return run_cuda(plan, base=base, command=command, machine=args.machine)


def _in_range(option: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise UserError(f"{option} {value}: allowed are {lowest} to {highest}")


def _only_with(device: str, args: argparse.Namespace, names: Sequence[str]) -> None:
    for name in names:
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} {getattr(args, name)}: only with --device {device}, not {args.device}")
