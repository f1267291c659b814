"""Writes the documents of one split: `<split>.bin`, `<split>.idx`, and its lines of `documents.jsonl`.

For `build`. Not for making documents (see `pack`).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from apps.train.data.material import Draft, Material
from apps.train.data.options import BuildOptions
from apps.train.data.pack import documents
from libs.model.text.document import DocumentMeta
from libs.model.text.manifest import DOCUMENTS_NAME, KindStats, SplitStats
from libs.parallel.indexed_dataset import DocumentWriter


def store(directory: Path, split: str, material: Material, options: BuildOptions, source_bytes: int) -> SplitStats:
    """Write every document of the split in order; the statistics of what was written."""
    counts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    token_bytes = material.tokenizer.token_bytes
    with (
        DocumentWriter(directory / split, material.tokenizer.vocab_size) as writer,
        (directory / DOCUMENTS_NAME).open("a", encoding="utf-8") as lines,
    ):
        for index, made in enumerate(documents(material, options)):
            size = int(token_bytes[made.ids].sum(dtype="int64"))
            writer.add(made.ids)
            lines.write(_meta(split, index, made, size).model_dump_json(exclude_defaults=True) + "\n")
            counts[made.kind].append((int(made.ids.size), size))
    kinds = {
        kind: KindStats(documents=len(pairs), tokens=sum(t for t, _ in pairs), bytes=sum(b for _, b in pairs))
        for kind, pairs in sorted(counts.items())
    }
    return SplitStats(
        files=len(material.graph.files),
        source_bytes=source_bytes,
        documents=sum(stats.documents for stats in kinds.values()),
        tokens=sum(stats.tokens for stats in kinds.values()),
        bytes=sum(stats.bytes for stats in kinds.values()),
        kinds=kinds,
    )


def _meta(split: str, index: int, made: Draft, size: int) -> DocumentMeta:
    return DocumentMeta(
        split=split,
        index=index,
        kind=made.kind,
        package=made.package,
        paths=made.paths,
        licences=made.licences,
        bytes=size,
        tokens=int(made.ids.size),
        target=made.target,
        part=made.part,
        ambiguity=made.ambiguity,
        sections=made.spans,
    )
