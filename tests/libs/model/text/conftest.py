"""A small data directory written by hand, so that reading is tested without the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from libs.model.text.document import DocumentMeta, Kind, Role, Section, assemble
from libs.model.text.manifest import (
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

Make = Callable[..., Path]


def write_data_dir(directory: Path, lengths: dict[str, list[int]], seed: int = 0) -> Path:
    """Documents of random letters; `lengths` are bytes of code, per split."""
    directory.mkdir(parents=True)
    tokenizer = Tokenizer.bytes_tokenizer()
    tokenizer.save(directory / "tokenizer.json")
    draw = np.random.default_rng(seed)
    lines: list[str] = []
    for split, sizes in lengths.items():
        with DocumentWriter(directory / split, tokenizer.vocab_size) as writer:
            for index, size in enumerate(sizes):
                code = bytes(draw.integers(97, 123, size, dtype=np.uint8))
                section = Section(Role.FILE, f"p/{index}.h", tokenizer.encode(f"p/{index}.h"), tokenizer.encode(code))
                ids, spans = assemble(tokenizer, [section])
                writer.add(ids)
                meta = DocumentMeta(
                    split=split, index=index, kind=Kind.FILE, package="p", paths=(f"p/{index}.h",), licences=("MIT",),
                    bytes=int(tokenizer.token_bytes[ids].sum()), tokens=int(ids.size), sections=spans,
                )  # fmt: skip
                lines.append(meta.model_dump_json())
    (directory / "documents.jsonl").write_text("\n".join(lines) + "\n")
    names = ("tokenizer.json", "documents.jsonl", "train.bin", "train.idx", "valid.bin", "valid.idx")
    files = {name: digest_file(directory / name) for name in names}
    stats = SplitStats(files=1, source_bytes=1, documents=1, tokens=1, bytes=1, kinds={})
    manifest = Manifest(
        format_version=1, build_key="k", fingerprint=fingerprint_of(files), source="hand", options={}, versions={},
        tokenizer=TokenizerInfo(spec="bytes", vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint),
        splits={"train": stats, "valid": stats}, dropped={}, packages={},
        holdout=Holdout(unit="file", names=("x",), share=0.1),
        overlap=Overlap(n=13, one_in=4, valid_ngrams=0, shared=0, share=0.0, files_over_half=()),
        callgraph={}, syntax_errors=0, files=files,
    )  # fmt: skip
    write_manifest(directory, manifest)
    return directory


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(train=[sizes], valid=[sizes], seed=0)` -> directory."""
    made = 0

    def run(train: list[int], valid: list[int] | None = None, seed: int = 0) -> Path:
        nonlocal made
        made += 1
        sizes = {"train": train, "valid": valid if valid is not None else [50]}
        return write_data_dir(tmp_path / f"data{made}", sizes, seed)

    return run
