"""`fathom data build`: the whole pipeline, from files on disk to a data directory in place.

Only the order of the steps is here; each step has its own module. Not for reading the result (see
`libs.model.text.shards`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from apps.train.data.analyse import Analysis, analyse
from apps.train.data.callgraph import CallGraph, GraphFile
from apps.train.data.curate import DropLog, KeptFile, read_files, within_budget
from apps.train.data.duplicates import near_duplicates
from apps.train.data.holdout import Split, hold_out
from apps.train.data.interrupt import held_back
from apps.train.data.licence import licence_of
from apps.train.data.material import Material, chance
from apps.train.data.options import PIPELINE_VERSION, BuildOptions
from apps.train.data.overlap import overlap
from apps.train.data.progress import Steps
from apps.train.data.publish import DATA_NAMES, found_build, written_aside
from apps.train.data.source import Corpus, discover
from libs.flags.errors import UserError
from libs.model.text.manifest import (
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_NAME,
    CallGraphStats,
    Holdout,
    Manifest,
    PackageStats,
    SplitStats,
    TokenizerInfo,
    digest_file,
    fingerprint_of,
    write_manifest,
)
from libs.model.text.tokenizer import Tokenizer

_LIBRARIES = ("tokenizers", "tree-sitter", "tree-sitter-cpp", "datasketch")


class Built(NamedTuple):
    """manifest of the directory; up_to_date: it was there already and nothing was written."""

    manifest: Manifest
    up_to_date: bool


class _File(NamedTuple):
    """A file that made it into the corpus."""

    kept: KeptFile
    analysis: Analysis
    licence: str


class _Plan(NamedTuple):
    """All that decides what is written."""

    options: BuildOptions
    key: str
    split: Split
    sides: dict[str, list[_File]]
    tokenizer: Tokenizer
    drops: DropLog


def build(
    options: BuildOptions,
    out: Path,
    *,
    window: int,
    workers: int = 2,
    force: bool = False,
    quiet: bool = False,
) -> Built:
    """Build the data directory `out`; every split must fill one window of `window` tokens.

    Raises:
        UserError: nothing usable in the source, too little of it, or `out` cannot be written.
    """
    if window < 2:
        raise UserError(f"--window {window}: at least 2 tokens are needed")
    drops = DropLog()
    with Steps(quiet=quiet) as steps:
        corpus = discover(options.source_dir, options.layout)
        advance = steps.step("reading", len(corpus.files))
        readable = read_files(corpus.files, options, drops, lambda: advance(1))
        if not readable:
            raise UserError(f"no usable C++ file in {options.source}: all {len(corpus.files)} left out ({drops})")
        key = _build_key(options, corpus, readable, drops)
        there = found_build(out, key, force=force)
        if there is not None:
            for name, stats in there.splits.items():
                _require_window(name, stats.tokens, window)
            return Built(there, True)
        files = _corpus_files(options, corpus, readable, drops, workers, steps)
        split = hold_out([f.kept for f in files], [f.analysis.parsed for f in files], options)
        sides = {
            "train": [file for file in files if file.kept.source.path not in split.valid],
            "valid": [file for file in files if file.kept.source.path in split.valid],
        }
        tokenizer = _tokenizer(options, sides["train"], steps)
        plan = _Plan(options, key, split, sides, tokenizer, drops)
        with written_aside(out) as aside:
            manifest = _write(aside, plan, window, steps)
    return Built(manifest, False)


def _corpus_files(
    options: BuildOptions,
    corpus: Corpus,
    readable: list[KeptFile],
    drops: DropLog,
    workers: int,
    steps: Steps,
) -> list[_File]:
    """Within the byte budget, analysed, without near-duplicates, with licences."""
    kept = within_budget(readable, options.max_bytes, options.seed, drops)
    texts = [file.text for file in kept]
    analyses = analyse(texts, workers, steps.step("parsing", sum(map(len, texts))))
    signatures = [analysis.hashes.signature for analysis in analyses]
    repeated = near_duplicates(signatures, options.duplicate_threshold)
    files: list[_File] = []
    for i, (file, analysis) in enumerate(zip(kept, analyses, strict=True)):
        if i in repeated:
            drops.add("near_duplicate", file.source.path, len(file.text))
            continue
        licence = licence_of(file.text, corpus.licences.get(file.source.package))
        files.append(_File(file, analysis, licence))
    return files


def _tokenizer(options: BuildOptions, train: Sequence[_File], steps: Steps) -> Tokenizer:
    """As asked for; BPE is trained on training text only, a seeded sample of it."""
    if options.tokenizer == "bytes":
        return Tokenizer.bytes_tokenizer()
    if options.tokenizer_path is not None:
        return Tokenizer.load(options.tokenizer_path)
    sample: list[bytes] = []
    used = 0
    for file in sorted(train, key=lambda f: chance(options.seed, "tokenizer:" + f.kept.source.path)):
        if used >= options.tokenizer_bytes:
            break
        sample.append(file.kept.text)
        used += len(file.kept.text)
    steps.step(f"training {options.tokenizer}", 1)
    return Tokenizer.train(sample, options.bpe_size)


def _write(aside: Path, plan: _Plan, window: int, steps: Steps) -> Manifest:
    """Write every file of the directory; the manifest last."""
    plan.tokenizer.save(aside / TOKENIZER_NAME)
    splits, graphs = _write_splits(aside, plan, window, steps)
    digests = {name: digest_file(aside / name) for name in DATA_NAMES}
    train, valid = plan.sides["train"], plan.sides["valid"]
    described = plan.options.canonical()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        build_key=plan.key,
        fingerprint=fingerprint_of(digests),
        source=str(described["source"]),
        options=described,
        versions=_versions(),
        tokenizer=TokenizerInfo(
            spec=str(described["tokenizer"]),
            vocab_size=plan.tokenizer.vocab_size,
            fingerprint=plan.tokenizer.fingerprint,
        ),
        splits=splits,
        dropped=plan.drops.summary(),
        packages=_packages(plan.sides),
        holdout=Holdout(unit=plan.split.unit, names=plan.split.names, share=plan.split.share),
        overlap=overlap(
            [file.analysis.hashes.ngrams for file in train],
            [file.analysis.hashes.ngrams for file in valid],
            [file.kept.source.path for file in valid],
        ),
        callgraph=graphs,
        syntax_errors=sum(file.analysis.parsed.has_error for file in (*train, *valid)),
        files=digests,
    )
    write_manifest(aside, manifest)
    return manifest


def _write_splits(
    aside: Path, plan: _Plan, window: int, steps: Steps
) -> tuple[dict[str, SplitStats], dict[str, CallGraphStats]]:
    """Documents of both splits; what was written and how calls resolved."""
    # Imports megatron, seconds that a source which is refused has no use for.
    with held_back():
        from apps.train.data.store import store

    splits: dict[str, SplitStats] = {}
    graphs: dict[str, CallGraphStats] = {}
    for name in SPLITS:
        files = plan.sides[name]
        texts = [file.kept.text for file in files]
        size = sum(map(len, texts))
        advance = steps.step(f"encoding {name}", 2 * size)
        sources = [(file.kept.source, file.analysis.parsed) for file in files]
        graph = CallGraph([GraphFile(source.path, source.package, parsed) for source, parsed in sources])
        material = Material(graph, texts, [file.licence for file in files], plan.tokenizer, advance)
        splits[name] = store(aside, name, material, plan.options, size)
        graphs[name] = graph.stats
        _require_window(name, splits[name].tokens, window)
    return splits, graphs


def _require_window(split: str, tokens: int, window: int) -> None:
    if tokens < window:
        raise UserError(
            f"corpus too small: split {split!r} has {tokens} tokens, less than one window of "
            f"{window}; give more source text or a smaller --window"
        )


def _packages(sides: dict[str, list[_File]]) -> dict[str, PackageStats]:
    groups: dict[tuple[str, str], list[_File]] = defaultdict(list)
    for name, files in sides.items():
        for file in files:
            groups[file.kept.source.package, name].append(file)
    both = {package for package, name in groups if name == "train"} & {p for p, n in groups if n == "valid"}
    return {
        f"{package} ({name})" if package in both else package: PackageStats(
            split=name,
            files=len(files),
            bytes=sum(len(file.kept.text) for file in files),
            licences=dict(sorted(Counter(file.licence for file in files).items())),
        )
        for (package, name), files in sorted(groups.items())
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def _build_key(options: BuildOptions, corpus: Corpus, kept: list[KeptFile], drops: DropLog) -> str:
    """sha256 over everything that decides the content: source text, licences, options, library versions."""
    described = {
        "pipeline": PIPELINE_VERSION,
        "options": options.canonical(),
        "versions": _versions(),
        "licences": corpus.licences,
        "files": [(file.source.path, file.sha256) for file in kept],
        "dropped": {reason: dropped.model_dump() for reason, dropped in drops.summary().items()},
    }
    if options.tokenizer_path is not None:
        described["tokenizer"] = Tokenizer.load(options.tokenizer_path).fingerprint
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
