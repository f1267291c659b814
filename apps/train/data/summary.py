"""Tables of a data directory for people: what is in it, what was dropped and why, what is held out.

For `build` and `inspect`. Everything comes from the manifest; document lengths are in `inspect`.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from libs.model.text.manifest import KindStats, Manifest


def print_built(out: Path, manifest: Manifest, console: Console | None = None) -> None:
    """What a build says at its end."""
    console = console if console is not None else Console()
    console.print(splits_table(manifest))
    console.print(holdout_line(manifest), highlight=False)
    dropped = ", ".join(f"{reason} {d.files}" for reason, d in manifest.dropped.items()) or "none"
    console.print(f"dropped files: {dropped}", highlight=False)
    console.print(f"{out}: fingerprint {manifest.fingerprint[:16]}", highlight=False, soft_wrap=True)


def splits_table(manifest: Manifest) -> Table:
    """Documents, tokens and bytes by split and kind."""
    table = Table(title=f"{manifest.source}, tokenizer {manifest.tokenizer.spec}", title_justify="left")
    for name in ("split", "kind", "documents", "tokens", "bytes", "bytes/token"):
        table.add_column(name, justify="left" if name in ("split", "kind") else "right")
    for split, stats in manifest.splits.items():
        rows: list[tuple[str, KindStats]] = [*stats.kinds.items(), ("all", stats)]
        for kind, row in rows:
            ratio = f"{row.bytes / row.tokens:.2f}" if row.tokens else "-"
            table.add_row(split, kind, f"{row.documents:,}", f"{row.tokens:,}", f"{row.bytes:,}", ratio)
        table.add_section()
    return table


def holdout_line(manifest: Manifest) -> str:
    """One paragraph on the held-out side and what it shares with training."""
    held, shared = manifest.holdout, manifest.overlap
    names = ", ".join(held.names[:8]) + (f" and {len(held.names) - 8} more" if len(held.names) > 8 else "")
    caution = {
        "package": "",
        "directory": " (one repository: its directories, so both sides share its style)",
        "file": " (one repository: single files, so both sides share its code; read results with care)",
    }[held.unit]
    return (
        f"held out: {names}{caution}; {100 * held.share:.1f} % of the text; "
        f"{100 * shared.share:.2f} % of its {shared.n}-grams occur in train"
    )


def dropped_table(manifest: Manifest) -> Table:
    """Files left out, by reason."""
    table = Table(title="left out", title_justify="left")
    for name in ("reason", "files", "bytes", "for example"):
        table.add_column(name, justify="right" if name in ("files", "bytes") else "left", overflow="fold")
    for reason, dropped in manifest.dropped.items():
        table.add_row(reason, f"{dropped.files:,}", f"{dropped.bytes:,}", dropped.examples[0])
    return table


def packages_table(manifest: Manifest) -> Table:
    """Repositories with their side, size and licences."""
    table = Table(title="packages", title_justify="left")
    for name in ("package", "split", "files", "bytes", "licences (files)"):
        table.add_column(name, justify="right" if name in ("files", "bytes") else "left", overflow="fold")
    for name, package in sorted(manifest.packages.items(), key=lambda item: -item[1].bytes):
        licences = ", ".join(f"{licence} ({n})" for licence, n in package.licences.items())
        table.add_row(name, package.split, f"{package.files:,}", f"{package.bytes:,}", licences)
    return table


def callgraph_table(manifest: Manifest) -> Table:
    """Functions and how their calls resolved."""
    table = Table(title="call graph (distinct calls per function)", title_justify="left")
    table.add_column("")
    for split in manifest.callgraph:
        table.add_column(split, justify="right")
    fields = type(next(iter(manifest.callgraph.values()))).model_fields
    for field in fields:
        values = [f"{getattr(stats, field):,}" for stats in manifest.callgraph.values()]
        table.add_row(field.replace("_", " "), *values)
    return table
