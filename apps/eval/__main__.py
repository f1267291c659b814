"""`fathom eval`: argument parsing and the summary on the console."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apps.eval.config import EvalConfig, parse_tokens
from apps.eval.results import Estimate, EvalReport
from apps.eval.run import run_eval
from apps.eval.suites import SUITES
from libs.flags.errors import ExitStatus, run_entry


def _parser() -> argparse.ArgumentParser:
    suites = "; ".join(f"{suite.name}: {suite.summary}" for suite in SUITES.values())
    parser = argparse.ArgumentParser(
        prog="fathom eval",
        description=f"Score a checkpoint. Suites: {suites}.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_DIR", help="a run (its newest) or a checkpoint")
    parser.add_argument("--suite", required=True, help=", ".join(SUITES))
    parser.add_argument("--data", help="data directory (default: the one the run was trained on)")
    parser.add_argument("--split", help="valid (default) or train")
    parser.add_argument(
        "--context", dest="contexts", help="ablation lengths in tokens, as 1k,4k,16k (default: from the data)"
    )
    parser.add_argument("--span-tokens", type=int, help="target tokens of the ablation (256)")
    parser.add_argument("--ablation-documents", type=int, help="at most so many documents in the ablation (32)")
    parser.add_argument("--max-documents", type=int, help="a seeded draw of so many documents (default: all)")
    parser.add_argument("--max-tokens", help="longer documents are excluded, counted and listed (64k)")
    parser.add_argument(
        "--batch-documents", type=int, help="documents packed into one pass (1: scores bit for bit alone)"
    )
    parser.add_argument("--seed", type=int, help="of the draw and the bootstrap (0)")
    parser.add_argument("--device", help="auto (default), cpu or cuda")
    parser.add_argument("--out", help="the result file (default: RUN/eval/<suite>.json)")
    parser.add_argument("--detached", action="store_true", help="write the result only, leave the run's log alone")
    parser.add_argument("--json", action="store_true", help="the whole result on stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print a summary, or the result as JSON."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    values: dict[str, Any] = vars(_parser().parse_args(arguments))
    as_json = values.pop("json", False)
    for name in ("checkpoint", "data", "out"):
        if name in values:
            values[name] = Path(values[name])
    if "contexts" in values:
        values["contexts"] = tuple(parse_tokens(part) for part in values["contexts"].split(","))
    if "max_tokens" in values:
        values["max_tokens"] = parse_tokens(values["max_tokens"])
    evaluated = run_eval(EvalConfig.parse(values), command=["fathom", "eval", *arguments])
    if as_json:
        print(evaluated.report.model_dump_json(indent=1))
    else:
        _print_summary(evaluated.report, Console())
        print(f"result: {evaluated.path}")
    return ExitStatus.OK


def _print_summary(report: EvalReport, console: Console) -> None:
    details = report.details
    console.print(
        f"{report.suite} of {report.checkpoint.path}: {report.n} documents, {len(report.excluded)} excluded, "
        f"{report.available - report.n - len(report.excluded)} not drawn",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("bytes from", "to", "documents", "bits per byte", "95 % interval")
    for bucket in details.buckets:
        table.add_row(str(bucket.start), str(bucket.end), str(bucket.documents), *_cells(bucket.bpb))
    table.add_row("all", "", str(report.n), *_cells(details.bpb), style="bold")
    console.print(table)
    for compressor in details.compression.compressors:
        console.print(
            f"{compressor.name}: {compressor.per_document_bpb:.3f} per document, "
            f"{compressor.one_stream_bpb:.3f} as one stream (bits per byte, same bytes)",
            highlight=False,
        )
    for point in details.ablation.points:
        value, interval = _cells(point.gain)
        console.print(f"context {point.context}: gain {value} ({interval})", highlight=False)
    if details.ablation.reason is not None:
        console.print(f"context ablation: {details.ablation.reason}", highlight=False, soft_wrap=True)


def _cells(estimate: Estimate) -> tuple[str, str]:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.4f}", "one document"
    return f"{estimate.value:.4f}", f"{estimate.low:.4f} - {estimate.high:.4f}"


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
