"""The table in libs/flags/README.md equals the catalogue, cell by cell, and GATES's names are all there."""

from __future__ import annotations

from pathlib import Path

from libs.flags.catalog import CATALOG
from libs.flags.events import EVENTS
from libs.flags.registry import GateSpec

README = Path(__file__).resolve().parents[3] / "libs" / "flags" / "README.md"
COLUMNS = (
    "gate",
    "variable",
    "values",
    "default",
    "stage",
    "since",
    "owner",
    "expires",
    "what it needs",
    "summary",
)


def _needs(spec: GateSpec) -> str:
    if spec.decision is not None:
        return f"retired: {spec.decision}"
    needs = [p.requires + (f" ({', '.join(p.values)})" if p.values else "") for p in spec.preconditions]
    needs += [f"{d.gate} {' or '.join(d.values)} ({d.value})" for d in spec.depends_on]
    return "; ".join(needs)


def expected_rows() -> list[tuple[str, ...]]:
    return [
        (
            s.name,
            f"`{s.variable}`",
            ", ".join(s.values),
            s.default,
            str(s.stage),
            s.since,
            s.owner,
            s.expiry or "never",
            _needs(s),
            s.summary,
        )
        for s in CATALOG.values()
    ]


def test_gate_table_equals_the_catalogue() -> None:
    lines = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    start = lines.index("| " + " | ".join(COLUMNS) + " |")
    rows = []
    for line in lines[start + 2 :]:
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        if len(cells) != len(COLUMNS):
            break
        rows.append(cells)
    wanted = "\n".join("| " + " | ".join(row) + " |" for row in expected_rows())
    assert rows == expected_rows(), f"libs/flags/README.md: the table must be\n{wanted}"


def test_every_event_is_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    missing = [name for name in EVENTS if f"`{name}`" not in text]
    assert not missing
