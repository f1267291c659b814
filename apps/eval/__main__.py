"""`fathom eval`: argument parsing and the summary on the console."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from apps.eval.config import ALL, EvalConfig, parse_tokens
from apps.eval.run import run_eval
from apps.eval.suites import SUITES
from apps.eval.summary import print_summary
from libs.flags.errors import ExitStatus, run_entry


def build_parser() -> argparse.ArgumentParser:
    """The options of `fathom eval`; their ranges are in config.py."""
    suites = "; ".join(f"{suite.name}: {suite.summary}" for suite in SUITES.values())
    parser = argparse.ArgumentParser(
        prog="fathom eval",
        description=f"Score a checkpoint. Suites: {suites}.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_DIR", help="a run (its newest) or a checkpoint")
    parser.add_argument("--suite", dest="suites", required=True, help=f"one or more of {', '.join(SUITES)}; or {ALL}")
    parser.add_argument("--data", help="data directory (default: the one the run was trained on)")
    parser.add_argument("--split", help="valid (default) or train")
    parser.add_argument(
        "--context", dest="contexts", help="lengths in tokens, as 1k,4k,16k (default: each suite's own)"
    )
    parser.add_argument("--span-tokens", type=int, help="target tokens of the ablation (256)")
    parser.add_argument("--ablation-documents", type=int, help="at most so many documents in the ablation (32)")
    parser.add_argument("--max-documents", type=int, help="a seeded draw of so many documents (default: all)")
    parser.add_argument("--max-tokens", help="longer documents are excluded, counted and listed (64k)")
    parser.add_argument(
        "--batch-documents", type=int, help="documents packed into one pass (1: scores bit for bit alone)"
    )
    parser.add_argument("--items", type=int, help="contexts or items per cell (default: each suite's own number)")
    parser.add_argument("--max-batch", type=int, help="requests in flight (8); the scores have the same bits for any")
    parser.add_argument("--seed", type=int, help="of the draw and the bootstrap (0)")
    parser.add_argument("--device", help="auto (default), cpu or cuda")
    parser.add_argument("--out", help="the result file, or a directory for several suites (default: RUN/eval)")
    parser.add_argument("--detached", action="store_true", help="write the result only, leave the run's log alone")
    parser.add_argument("--json", action="store_true", help="the whole result on stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print a summary, or the result as JSON."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    values: dict[str, Any] = vars(build_parser().parse_args(arguments))
    as_json = values.pop("json", False)
    for name in ("checkpoint", "data", "out"):
        if name in values:
            values[name] = Path(values[name])
    if "contexts" in values:
        values["contexts"] = tuple(parse_tokens(part) for part in values["contexts"].split(","))
    if "max_tokens" in values:
        values["max_tokens"] = parse_tokens(values["max_tokens"])
    found = run_eval(EvalConfig.parse(values), command=["fathom", "eval", *arguments])
    if as_json:
        shown = [evaluated.report.model_dump(mode="json") for evaluated in found]
        print(json.dumps(shown[0] if len(shown) == 1 else shown, indent=1))
        return ExitStatus.OK
    console = Console()
    for evaluated in found:
        print_summary(evaluated.report, console)
        print(f"result: {evaluated.path}")
    return ExitStatus.OK


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
