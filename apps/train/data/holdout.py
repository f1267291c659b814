"""Chooses what is held out for evaluation: whole packages; of a single repository, directories or files.

Decided by names, sizes and the share of code, so the same corpus is split the same way everywhere. Not for
measuring what the two sides share (see `overlap`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from apps.train.data.curate import KeptFile
from apps.train.data.options import BuildOptions
from apps.train.data.parse import ParsedFile
from libs.flags.errors import UserError

_LEAST, _MOST = 0.4, 1.6  # accepted share of held-out text, as multiples of the one asked for
# A held-out package or directory is at least this large and this much code, or bits per byte on it would say
# more about its tables and declarations than about C++.
_LEAST_BYTES, _LEAST_FILES, _LEAST_FUNCTIONS, _LEAST_CODE = 20_000, 4, 100, 0.3
_SHARE_OF_ONE = 0.75  # of the target, so that several packages make the held-out side where there are several


class Split(NamedTuple):
    """unit: what was held out. names: which. valid: paths of the held-out files. share: of the text in bytes."""

    unit: Literal["package", "directory", "file"]
    names: tuple[str, ...]
    valid: frozenset[str]
    share: float


class _Size(NamedTuple):
    """Of a package, directory or file. code: bytes inside function definitions."""

    files: int
    bytes: int
    functions: int
    code: int


def hold_out(kept: Sequence[KeptFile], parsed: Sequence[ParsedFile], options: BuildOptions) -> Split:
    """Packages where there are several of fitting size, else top-level directories, else files.

    Raises:
        UserError: a named package that is not there, or nothing left for one of the two sides.
    """
    if len(kept) < 2:
        raise UserError(
            f"corpus too small: {len(kept)} usable C++ file(s) cannot be split into training and held-out "
            f"text; give more source text"
        )
    if options.valid_packages:
        return _named(kept, options.valid_packages)
    units: tuple[tuple[Literal["package", "directory", "file"], Callable[[KeptFile], str]], ...] = (
        ("package", lambda f: f.source.package),
        ("directory", lambda f: "/".join(f.source.path.split("/")[:2])),
        ("file", lambda f: f.source.path),
    )
    for unit, name_of in units:
        sizes = _sizes(kept, parsed, name_of)
        names = _choose_files(sizes, options) if unit == "file" else _choose(sizes, options)
        if names:
            return _split(kept, unit, names, name_of)
    raise UserError("corpus too small: no part of it can be held out for evaluation; give more source text")


def _named(kept: Sequence[KeptFile], wanted: Sequence[str]) -> Split:
    packages = sorted({file.source.package for file in kept})
    for name in wanted:
        if name not in packages:
            raise UserError.unknown("package to hold out", name, packages)
    if set(wanted) == set(packages):
        raise UserError(f"all packages are held out ({', '.join(packages)}): nothing is left to train on")
    return _split(kept, "package", wanted, lambda f: f.source.package)


def _split(
    kept: Sequence[KeptFile],
    unit: Literal["package", "directory", "file"],
    names: Sequence[str],
    name_of: Callable[[KeptFile], str],
) -> Split:
    held = [file for file in kept if name_of(file) in set(names)]
    share = sum(len(f.text) for f in held) / sum(len(f.text) for f in kept)
    return Split(unit, tuple(sorted(names)), frozenset(f.source.path for f in held), share)


def _sizes(
    kept: Sequence[KeptFile], parsed: Sequence[ParsedFile], name_of: Callable[[KeptFile], str]
) -> dict[str, _Size]:
    sizes: dict[str, _Size] = defaultdict(lambda: _Size(0, 0, 0, 0))
    for file, known in zip(kept, parsed, strict=True):
        code = sum(function.end - function.start for function in known.functions)
        so_far = sizes[name_of(file)]
        sizes[name_of(file)] = _Size(
            so_far.files + 1,
            so_far.bytes + len(file.text),
            so_far.functions + len(known.functions),
            so_far.code + code,
        )
    return sizes


def _choose(sizes: dict[str, _Size], options: BuildOptions) -> list[str]:
    """Packages or directories: several small ones before one that fills the share; empty when none fit."""
    target = options.valid_share * sum(size.bytes for size in sizes.values())
    telling = {
        name: size.bytes
        for name, size in sizes.items()
        if size.bytes >= _LEAST_BYTES
        and size.files >= _LEAST_FILES
        and size.functions >= _LEAST_FUNCTIONS
        and size.code >= _LEAST_CODE * size.bytes
    }
    for largest in (_SHARE_OF_ONE * target, _MOST * target):
        fitting = {name: size for name, size in telling.items() if size <= largest}
        chosen = _fill(fitting, target, options.seed)
        if sum(telling[name] for name in chosen) >= _LEAST * target:
            return chosen
    return []


def _choose_files(sizes: dict[str, _Size], options: BuildOptions) -> list[str]:
    """Single files; the smallest one when even that is more than the share."""
    by_bytes = {name: size.bytes for name, size in sizes.items()}
    chosen = _fill(by_bytes, options.valid_share * sum(by_bytes.values()), options.seed)
    return chosen or [min(by_bytes, key=lambda name: (by_bytes[name], name))]


def _fill(sizes: dict[str, int], target: float, seed: int) -> list[str]:
    """Names in hash order while they fit, until `target` is reached."""
    chosen: list[str] = []
    taken = 0
    for name in sorted(sizes, key=lambda n: hashlib.sha256(f"{seed}:{n}".encode()).hexdigest()):
        if taken < target and taken + sizes[name] <= _MOST * target:
            chosen.append(name)
            taken += sizes[name]
    return chosen
