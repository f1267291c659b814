"""`fathom runs list|show|diff`: questions about a folder of runs, as tables or as JSON.

Not for one run's chain or log (`fathom flags verify`, `fathom log check`). Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from libs.flags import fleet_views
from libs.flags.errors import ExitStatus, UserError, legible
from libs.flags.fleet import OUTCOMES, STATUSES, Query, differences
from libs.flags.index import RunIndex
from libs.flags.runs import RUNS, find_run, name_of
from libs.flags.summary import RunSummary, summarise

Handler = Callable[[argparse.Namespace], int]


def indexed_runs(folder: Path, *, rebuild: bool) -> list[RunSummary]:
    """Every run of a folder, from its index where that still holds; what is odd about the index goes to stderr.

    Raises:
        UserError: no such folder.
    """
    index = RunIndex.open(folder, rebuild=rebuild)
    for note in index.notes:
        print(f"note: {note}", file=sys.stderr)
    found = index.runs()
    index.close()
    return found


def exit_status(listed: Sequence[RunSummary], of: int) -> int:
    """USAGE, with a line on stderr, when a run among those listed cannot be trusted."""
    bad = [run for run in listed if run.problem is not None]
    if not bad:
        return ExitStatus.OK
    why = legible(f"{bad[0].run}: {bad[0].problem}")
    print(f"error: {len(bad)} of {of} runs cannot be trusted: {why}", file=sys.stderr)
    return ExitStatus.USAGE


def _list(options: argparse.Namespace) -> int:
    if options.outcome is not None and options.gate is None:
        raise UserError(f"--outcome {options.outcome} says nothing without a gate; name it with --gate")
    conditions = {name: getattr(options, name) for name in ("status", "refused", "changed", "untrusted")}
    query = Query.about(options.gate, options.outcome or OUTCOMES[0], **conditions)
    everything = indexed_runs(Path(options.runs_dir), rebuild=options.rebuild)
    found = [run for run in everything if query.matches(run)]
    shown = found[-options.limit :] if options.limit is not None else found
    if options.json:
        print(json.dumps([run.model_dump(mode="json") for run in shown], indent=1))
    else:
        fleet_views.runs(shown, len(everything))
    return exit_status(shown, len(everything))


def _show(options: argparse.Namespace) -> int:
    summary = summarise(_run(options.run))
    if options.json:
        print(summary.model_dump_json(indent=1))
    else:
        fleet_views.run(summary)
    return exit_status([summary], 1)


def _run(name: str) -> Path:
    """The run's own directory, not a link to it: its name is shown."""
    found = find_run(name)
    return found.resolve() if found.is_symlink() else found


def _diff(options: argparse.Namespace) -> int:
    a, b = _run(options.run_a), _run(options.run_b)
    rows = differences(a, b)
    if options.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
    else:
        fleet_views.diff(name_of(a), name_of(b), rows)
    return ExitStatus.OK


def adder(parser: argparse.ArgumentParser) -> Callable[[str, Handler, str], argparse.ArgumentParser]:
    """What adds a subcommand to `parser`: from its name, what answers it, and a line about it. Each takes --json."""
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(handler=handler)
        return sub

    return add


def add_index_options(parser: argparse.ArgumentParser) -> None:
    """The folder, and a fresh index."""
    parser.add_argument("runs_dir", metavar="RUNS_DIR", nargs="?", default=str(RUNS))
    parser.add_argument("--rebuild", action="store_true", help="make the index anew from the runs' own files")


def at_least_one(text: str) -> int:
    """An option's value that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: allowed are 1 and above")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The options of `fathom runs list`, `show` and `diff`."""
    parser = argparse.ArgumentParser("fathom runs", description="Many runs at once.", allow_abbrev=False)
    command = adder(parser)
    listing = command("list", _list, "the runs of a folder that meet every condition given")
    add_index_options(listing)
    listing.add_argument("--gate", metavar="GATE[=VALUE]", help="had this gate, active unless --outcome says otherwise")
    listing.add_argument("--outcome", choices=OUTCOMES, help=f"with --gate (default: {OUTCOMES[0]})")
    listing.add_argument("--status", choices=STATUSES, help="how its last attempt ended; open: it has no end")
    listing.add_argument("--refused", action="store_true", help="a gate was refused")
    listing.add_argument("--changed", action="store_true", help="a gate was changed on resume")
    listing.add_argument("--untrusted", action="store_true", help="its audit chain does not verify, or is not there")
    listing.add_argument("--limit", type=at_least_one, metavar="N", help="only the last N by name")
    command("show", _show, "one run, read from its own files").add_argument("run", metavar="RUN")
    diff = command("diff", _diff, "what two runs differ in: code, data, packages, gates, config, results")
    diff.add_argument("run_a", metavar="RUN_A")
    diff.add_argument("run_b", metavar="RUN_B")
    return parser


def main_runs(argv: Sequence[str] | None = None) -> int:
    """`fathom runs ...`."""
    options = build_parser().parse_args(argv)
    handler: Handler = options.handler
    return handler(options)
