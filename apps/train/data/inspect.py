"""`fathom data inspect`: counts, lengths, licences, what was dropped, and a document to look at.

Reads a built directory and checks every checksum on the way. Not for changing anything.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from apps.train.data.summary import callgraph_table, dropped_table, holdout_line, packages_table, splits_table
from libs.flags.errors import UserError
from libs.model.text.document import DocumentMeta, Kind, Role, read_sections
from libs.model.text.manifest import SPLITS
from libs.model.text.shards import DataDir

_PERCENTILES = (5, 25, 50, 75, 95, 100)
_LINES_PER_SECTION = 30
_COLOURS = {Role.CALLERS: "cyan", Role.TARGET: "bold yellow", Role.CALLEES: "green"}


def inspect(directory: Path, *, split: str, example: int | None, as_json: bool) -> None:
    """Print what is in `directory`; `example` -1 picks a telling document of `split`.

    Raises:
        UserError: no data directory, a damaged one, or no such document.
    """
    data = DataDir.open(directory)
    lengths = {name: length_percentiles(data.metadata(name)) for name in SPLITS}
    chosen = None if example is None else _choose(data, split, example)
    if as_json:
        described: dict[str, Any] = {**data.manifest.model_dump(mode="json"), "lengths": lengths}
        if chosen is not None:
            described["example"] = _example_json(data, chosen)
        json.dump(described, sys.stdout, indent=1, sort_keys=True)
        sys.stdout.write("\n")
        return
    console = Console()
    console.print(splits_table(data.manifest))
    for name, percentiles in lengths.items():
        shown = ", ".join(f"{key} {value:,}" for key, value in percentiles.items())
        console.print(f"tokens per document, {name}: {shown}", highlight=False)
    console.print(holdout_line(data.manifest), highlight=False)
    for table in (packages_table, dropped_table, callgraph_table):
        console.print(table(data.manifest))
    console.print(f"files with syntax errors (kept): {data.manifest.syntax_errors:,}", highlight=False)
    console.print(f"fingerprint {data.fingerprint}", highlight=False, soft_wrap=True)
    if chosen is not None:
        _print_example(console, data, chosen)


def length_percentiles(metadata: Sequence[DocumentMeta]) -> dict[str, int]:
    """Tokens per document at some percentiles."""
    lengths = np.array([meta.tokens for meta in metadata])
    return {f"p{p}": int(np.percentile(lengths, p, method="lower")) for p in _PERCENTILES} if lengths.size else {}


def _choose(data: DataDir, split: str, example: int) -> DocumentMeta:
    metadata = data.metadata(split)
    if example < -1 or example >= len(metadata):
        raise UserError(f"--example {example}: split {split!r} has documents 0 to {len(metadata) - 1}")
    if example >= 0:
        return metadata[example]
    roles = {Role.CALLERS, Role.TARGET, Role.CALLEES}
    telling = [
        meta
        for meta in metadata
        if meta.kind is Kind.CALLGRAPH and {s.role for s in meta.sections} == roles and len(meta.paths) > 1
    ]
    return min(telling or metadata, key=lambda meta: (abs(meta.tokens - 2_000), meta.index))


def _example_json(data: DataDir, meta: DocumentMeta) -> dict[str, Any]:
    sections = read_sections(data.tokenizer, data.documents(meta.split)[meta.index])
    shown = [{"role": s.role, "path": s.path, "code": s.code.decode("utf-8", "replace")} for s in sections]
    return {**meta.model_dump(mode="json"), "text": shown}


def _print_example(console: Console, data: DataDir, meta: DocumentMeta) -> None:
    """The document, section by section; long sections are shortened and say so."""
    target = f", target {meta.target}" if meta.target else ""
    console.rule(f"{meta.split} document {meta.index}: {meta.kind}{target}")
    facts = f"{meta.tokens:,} tokens, {meta.bytes:,} bytes, package {meta.package}, {', '.join(meta.licences)}"
    console.print(f"{facts}, ambiguity {meta.ambiguity}", highlight=False)
    for section in read_sections(data.tokenizer, data.documents(meta.split)[meta.index]):
        colour = _COLOURS.get(section.role, "white")
        console.rule(Text(f"{section.role}: {section.path}", style=colour), align="left", style=colour)
        lines = section.code.decode("utf-8", "replace").split("\n")
        console.print(Text("\n".join(lines[:_LINES_PER_SECTION])), soft_wrap=True)
        if len(lines) > _LINES_PER_SECTION:
            console.print(f"... {len(lines) - _LINES_PER_SECTION} more lines", style="dim", highlight=False)
