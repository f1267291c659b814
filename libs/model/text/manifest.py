"""The manifest of a data directory: what was built from what, what was dropped, and the checksum of every
file.

For reading and writing `manifest.json`. Not for the documents themselves (see `shards`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from libs.flags.errors import UserError

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
DOCUMENTS_NAME = "documents.jsonl"
SPLITS = ("train", "valid")
FORMAT_VERSION: Literal[1] = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileDigest(_Frozen):
    """Size in bytes and sha256 of one file of the directory."""

    size: int
    sha256: str


class TokenizerInfo(_Frozen):
    """Which tokenizer: as asked for ("bpe:4096", "bytes" or a path's name), ids in it, its fingerprint."""

    spec: str
    vocab_size: int
    fingerprint: str


class KindStats(_Frozen):
    """Documents of one kind in one split; bytes as their tokens stand for."""

    documents: int
    tokens: int
    bytes: int


class SplitStats(KindStats):
    """One split. source_bytes: text of the files it draws on;
    a byte appears in `bytes` once per document it is in.
    """

    files: int
    source_bytes: int
    kinds: dict[str, KindStats]


class Dropped(_Frozen):
    """Files left out for one reason."""

    files: int
    bytes: int
    examples: tuple[str, ...]


class PackageStats(_Frozen):
    """One repository of the corpus, after filters and duplicates. licences: licence -> files."""

    split: str
    files: int
    bytes: int
    licences: dict[str, int]


class Holdout(_Frozen):
    """What was kept for evaluation: whole packages, or directories or files of the one package there was."""

    unit: Literal["package", "directory", "file"]
    names: tuple[str, ...]
    share: float


class Overlap(_Frozen):
    """Share of the held-out text's lexical n-grams that also occur in train (estimated on one in
    `one_in`).
    """

    n: int
    one_in: int
    valid_ngrams: int
    shared: int
    share: float
    files_over_half: tuple[str, ...]


class CallGraphStats(_Frozen):
    """Functions and calls of one split. ambiguous:
    resolved, with equally good candidates besides the one taken.
    """

    functions: int
    calls: int
    resolved: int
    cross_file: int
    ambiguous: int
    candidates_beside: int
    too_ambiguous: int
    unreachable: int
    unknown: int


class Manifest(_Frozen):
    """Everything `fathom data inspect` tells without reading the documents."""

    format_version: Literal[1]
    build_key: str
    fingerprint: str
    source: str
    options: dict[str, Any]
    versions: dict[str, str]
    tokenizer: TokenizerInfo
    splits: dict[str, SplitStats]
    dropped: dict[str, Dropped]
    packages: dict[str, PackageStats]
    holdout: Holdout
    overlap: Overlap
    callgraph: dict[str, CallGraphStats]
    syntax_errors: int
    files: dict[str, FileDigest]


def fingerprint_of(files: Mapping[str, FileDigest]) -> str:
    """sha256 over names and checksums: equal data and tokenizer, equal fingerprint."""
    lines = sorted(f"{name} {digest.size} {digest.sha256}" for name, digest in files.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def digest_file(path: Path) -> FileDigest:
    """Size and sha256 of `path`."""
    with path.open("rb") as stream:
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileDigest(size=path.stat().st_size, sha256=checksum)


def read_manifest(directory: Path) -> Manifest:
    """Read and validate. Raises UserError:
    no data directory, or a manifest that is damaged or of another version.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"no data directory at {directory}: build one with `fathom data build --out {directory}`")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise UserError(f"corrupt data directory: {path}: {error}") from error
    if manifest.fingerprint != fingerprint_of(manifest.files):
        raise UserError(f"corrupt data directory: {path}: its fingerprint is not that of the files it lists")
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, indented and sorted, so that two builds can be compared with diff."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True)
    (directory / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
