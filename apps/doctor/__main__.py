"""`fathom doctor`: options and output only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from rich.console import Console

from apps.doctor.lanes import Diagnosis, diagnose
from apps.doctor.machine import probe
from apps.doctor.selftests import run_selftests
from libs.flags.catalog import CATALOG
from libs.flags.errors import ExitStatus, run_entry


def build_parser() -> argparse.ArgumentParser:
    """The options of `fathom doctor`."""
    parser = argparse.ArgumentParser("fathom doctor", description="What this machine can run.", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Diagnose this machine; 1 when not even the CPU lane works.

    Raises:
        UserError: the catalogue of gates is damaged: no lane can be trusted before that is mended.
    """
    options = build_parser().parse_args(argv)
    len(CATALOG)  # the first look reads it whole
    found = diagnose(probe(), run_selftests())
    if options.json:
        print(json.dumps(_plain(found), indent=2))
    else:
        _print(found)
    return ExitStatus.OK if found.healthy else ExitStatus.FAILURE


def _plain(found: Diagnosis) -> dict[str, object]:
    return {
        "healthy": found.healthy,
        "machine": found.machine._asdict() | {"gpus": [gpu._asdict() for gpu in found.machine.gpus]},
        "known_bad": [bad._asdict() for bad in found.bad],
        "selftests": [test._asdict() for test in found.selftests],
        "lanes": [lane._asdict() | {"works": lane.works} for lane in found.lanes],
    }


def _print(found: Diagnosis) -> None:
    out = Console(highlight=False, soft_wrap=True)
    machine = found.machine
    gpus = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    out.print(f"{machine.cpu}, {machine.cores} cores; {gpus}; Python {machine.python}", markup=False)
    for test in found.selftests:
        mark = "[green]ok[/]  " if test.passed else "[red]bad[/] "
        out.print(mark, end="")
        out.print(f"self-test of {test.what}: {test.detail} ({test.seconds:.1f} s)", markup=False)
    for bad in found.bad:
        out.print("[red]bad[/] ", end="")
        out.print(str(bad), markup=False)
    for lane in found.lanes:
        out.print(f"\n[bold]{lane.name}[/]: {'[green]works[/]' if lane.works else '[yellow]does not work here[/]'}")
        for line in (*lane.missing, *(f"limit: {limit}" for limit in lane.limits)):
            out.print(f"  - {line}", markup=False)
        out.print(f"  {'try' if lane.works else 'to make it work'}: {lane.command}", markup=False)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
