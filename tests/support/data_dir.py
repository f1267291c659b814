"""A small data directory with the bytes tokenizer, written without `fathom data build`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from libs.model.text.document import DocumentMeta, Kind, Role, Section, assemble
from libs.model.text.manifest import (
    CallGraphStats,
    Holdout,
    Manifest,
    Overlap,
    SplitStats,
    TokenizerInfo,
    digest_file,
    fingerprint_of,
    write_manifest,
)
from libs.model.text.tokenizer import Tokenizer
from libs.parallel.indexed_dataset import DocumentWriter


def write_data_dir(directory: Path, texts: Mapping[str, Iterable[tuple[str, bytes]]]) -> Path:
    """texts: (path, code) of every document, by split."""
    directory.mkdir(parents=True)
    tokenizer = Tokenizer.bytes_tokenizer()
    tokenizer.save(directory / "tokenizer.json")
    lines: list[str] = []
    splits: dict[str, SplitStats] = {}
    for split, files in texts.items():
        sizes: list[int] = []
        with DocumentWriter(directory / split, tokenizer.vocab_size) as writer:
            for index, (name, code) in enumerate(files):
                section = Section(Role.FILE, name, tokenizer.encode(name), tokenizer.encode(code))
                ids, spans = assemble(tokenizer, [section])
                writer.add(ids)
                meta = DocumentMeta(
                    split=split, index=index, kind=Kind.FILE, package="p", paths=(name,), licences=("MIT",),
                    bytes=int(tokenizer.token_bytes[ids].sum()), tokens=int(ids.size), sections=spans,
                )  # fmt: skip
                lines.append(meta.model_dump_json() + "\n")
                sizes.append(len(code))
        n, total = len(sizes), sum(sizes)
        splits[split] = SplitStats(files=n, source_bytes=total, documents=n, tokens=total, bytes=total, kinds={})
    (directory / "documents.jsonl").write_text("".join(lines))
    digests = {path.name: digest_file(path) for path in sorted(directory.iterdir())}
    manifest = Manifest(
        format_version=1, build_key="k", fingerprint=fingerprint_of(digests), source="hand", options={}, versions={},
        tokenizer=TokenizerInfo(spec="bytes", vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint),
        splits=splits, dropped={}, packages={}, holdout=Holdout(unit="file", names=("x",), share=0.1),
        overlap=Overlap(n=13, one_in=4, valid_ngrams=0, shared=0, share=0.0, files_over_half=()),
        callgraph=dict.fromkeys(splits, CallGraphStats(**dict.fromkeys(CallGraphStats.model_fields, 0))),
        syntax_errors=0, files=digests,
    )  # fmt: skip
    write_manifest(directory, manifest)
    return directory
