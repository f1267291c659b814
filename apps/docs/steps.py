"""The table of steps in libs/parallel/xla/README.md, from the records of `fathom train --aot` in infra/tpu/aot.

Nothing in it was measured. Not for the crossover's plot, which reads the same files (apps/eval/bench/modelled.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apps.docs.blocks import table
from libs.flags.catalog import CATALOG
from libs.flags.errors import UserError
from libs.parallel.xla.topology import topology

RECORDS = "infra/tpu/aot"
GIB = 2**30
_COLUMNS = (
    "step", "tokens", "parameters + moments", "temporaries", "code", "peak", "modelled", "products", "HBM",
    "collectives", "command",
)  # fmt: skip


def step_table(root: Path) -> str:
    """A row for every record, by slice, length and recipe: GiB of one chip, modelled time, the bound's two sides.

    Raises:
        UserError: a file that is no record of a compiled step with full effort, from committed code.
    """
    records = [(path, _read(path)) for path in sorted((root / RECORDS).glob("*.json"))]
    ordered = sorted(
        records, key=lambda one: (one[1]["slice"], one[1]["window"], one[1]["recipe"], len(one[1]["gates"]))
    )
    return table(_COLUMNS, (_row(path, record) for path, record in ordered))


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        shown = record["effort"] == "full" and record["git_dirty"] is False and "compiled" in record
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of `fathom train --aot`: {error!r}") from error
    if not shown:
        raise UserError(f"{path}: only a step that compiled with full effort, from committed code, is shown")
    return record


def _row(path: Path, record: dict[str, Any]) -> Iterable[str]:
    compiled, chip = record["compiled"], topology(record["slice"]).chip
    counted, held = compiled["counted"], record["argument_bytes_per_chip"]
    gates = [f"{CATALOG[name].variable}={value}" for name, value in record["gates"].items()]
    modelled = f"{record['modelled_seconds']:.2f} s"
    if compiled["modelled"]["uncounted"]:
        modelled += f" and {compiled['modelled']['uncounted']} kernel calls"
    collectives = (counted["collectives"].get(kind, 0) for kind in ("all-gather", "reduce-scatter"))
    return (
        f"[{record['recipe']}{''.join(f', {name}' for name in record['gates'])}](../../../{RECORDS}/{path.name})",
        f"{record['tokens_per_step']:,}",
        *(
            f"{size / GIB:.2f}"
            for size in (
                held["parameters"] + held["optimizer"], compiled["temporaries"], compiled["code"],
                record["peak_bytes_per_chip"],
            )
        ),
        modelled,
        f"{counted['flops'] / chip.peak_bf16 * 1e3:.0f} ms",
        f"{counted['hbm_bytes'] / chip.bandwidth:.2f} s",
        ", ".join(str(n) for n in (*collectives, sum(counted["in_loops"].values()))),
        f"`{' '.join([*gates, *record['command']])}`",
    )  # fmt: skip
