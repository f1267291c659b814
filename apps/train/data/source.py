"""Finds C++ files and says which repository ("package") each belongs to.

For `--source installed` and `--source DIR`. Not for reading them or judging their content (see `curate`).
"""

from __future__ import annotations

import csv
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from libs.flags.errors import UserError

EXTENSIONS = frozenset(
    [
        ".h",
        ".hh",
        ".hpp",
        ".hxx",
        ".h++",
        ".cuh",
        ".inl",
        ".ipp",
        ".tpp",
        ".ixx",
        ".cc",
        ".cpp",
        ".cxx",
        ".c++",
        ".cu",
    ]
)  # plain .c is another language
IMPLEMENTATION = frozenset([".cc", ".cpp", ".cxx", ".c++", ".cu"])
_VENDOR_DIRS = frozenset({"3rdparty", "third_party", "thirdparty", "third-party", "vendor", "external"})
# What stands at the top of a repository, or is the name of a folder inside one.
_ROOT_MARKS = [
    ".git",
    "cmakelists.txt",
    "makefile",
    "meson.build",
    "build",
    "build.bazel",
    "configure",
    "workspace",
    "module.bazel",
    "readme",
    "license",
    "licence",
    "copying",
]
_INNER_FOLDERS = frozenset(["src", "source", "include", "lib", "libs", "test", "tests", "examples", "tools"])

# Other projects' headers inside torch/include, with their licences: torch's own metadata does not name them.
_TORCH_VENDORED: dict[str, tuple[str, str]] = {
    "fmt": ("fmt", "MIT"),
    "pybind11": ("pybind11", "BSD-3-Clause"),
    "google": ("protobuf", "BSD-3-Clause"),
    "oneapi": ("onednn", "Apache-2.0"),
    "dnnl": ("onednn", "Apache-2.0"),
    "tensorpipe": ("tensorpipe", "BSD-3-Clause"),
    "kineto": ("kineto", "BSD-3-Clause"),
    "fbgemm": ("fbgemm", "BSD-3-Clause"),
    "fp16": ("fp16", "MIT"),
    "cpuinfo": ("cpuinfo", "BSD-2-Clause"),
    "sleef": ("sleef", "BSL-1.0"),
    "pthreadpool": ("pthreadpool", "BSD-2-Clause"),
    "psimd": ("psimd", "MIT"),
    "fxdiv": ("fxdiv", "MIT"),
    "nnpack": ("nnpack", "BSD-2-Clause"),
}
_VENDORED_LICENCES = {"cutlass": "BSD-3-Clause", "tvm": "Apache-2.0"}


class SourceFile(NamedTuple):
    """One candidate. path: "package/path inside it", unique, what the model sees. location:
    where to read it.
    """

    path: str
    package: str
    location: Path


class Corpus(NamedTuple):
    """Candidates sorted by path, and the licence each package declares as a whole (absent: none found)."""

    files: list[SourceFile]
    licences: dict[str, str]


def discover(directory: Path | None, layout: str) -> Corpus:
    """Candidates of `directory`, or of the installed packages when it is None.

    Raises:
        UserError: unreadable or empty directory, no C++ file in it, or two that would have one path.
    """
    corpus = _installed() if directory is None else _checkout(directory, layout)
    if not corpus.files:
        where = "the installed packages" if directory is None else f"{directory}"
        raise UserError(f"no C++ files in {where} (extensions looked for: {' '.join(sorted(EXTENSIONS))})")
    return corpus._replace(files=sorted(corpus.files))


def _installed() -> Corpus:
    files: dict[str, SourceFile] = {}
    licences: dict[str, str] = {}
    found = {str(d.metadata["Name"]).lower(): d for d in importlib.metadata.distributions()}
    for name, distribution in sorted(found.items()):
        root = str(distribution.locate_file(""))
        declared = _declared_licence(distribution)
        for entry in _recorded(distribution):
            package, inner, licence = _repository_of(name, PurePosixPath(entry))
            location = os.path.join(root, entry)
            if location not in files:
                files[location] = SourceFile(f"{package}/{inner}", package, Path(location))
            licence = declared if package == name else licence
            if licence is not None:
                licences.setdefault(package, licence)
    return Corpus(list(files.values()), licences)


def _recorded(distribution: importlib.metadata.Distribution) -> Iterator[str]:
    """C++ files that the distribution's RECORD lists (`Distribution.files` takes twenty times as long)."""
    for row in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
        if os.path.splitext(row[0])[1].lower() in EXTENSIONS and ".." not in row[0].split("/"):
            yield row[0]


def _repository_of(distribution: str, path: PurePosixPath) -> tuple[str, str, str | None]:
    """(package, path inside it, its licence where we know it better than the distribution's metadata)."""
    parts = path.parts
    if parts[:2] == ("torch", "include") and len(parts) > 2:
        stem = PurePosixPath(parts[2]).stem if len(parts) == 3 else parts[2]
        known = _TORCH_VENDORED.get(stem.split("_")[0])
        if known is not None:
            return known[0], "/".join(parts[1:]), known[1]
    for i, part in enumerate(parts[:-2]):
        if part in _VENDOR_DIRS:
            package = parts[i + 1]
            return package, "/".join(parts[i + 2 :]), _VENDORED_LICENCES.get(package)
    return distribution, "/".join(parts[1:]) if len(parts) > 1 else parts[0], None


def _declared_licence(distribution: importlib.metadata.Distribution) -> str | None:
    """The distribution's licence; for its own files only, since vendored code has its own."""
    metadata = distribution.metadata
    for field in ("License-Expression", "License"):
        value = metadata[field] if field in metadata else None  # noqa: SIM401 (the protocol has no get)
        if value and len(value) < 80 and "\n" not in value:
            return str(value)
    classifiers = metadata.get_all("Classifier") or []
    named = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License :: ")]
    if named:
        return str(named[0])
    texts = (distribution.read_text(name) for name in ("licenses/LICENSE", "LICENSE"))
    return next((text[:8_000] for text in texts if text), None)


def _checkout(directory: Path, layout: str) -> Corpus:
    if not directory.is_dir():
        raise UserError(f"--source {directory}: not a directory (give a checkout, or `installed`)")
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"--source {directory}: cannot be read: {error.strerror}") from error
    if not entries:
        raise UserError(f"--source {directory}: the directory is empty")
    found = list(_walk(directory))
    own = directory.resolve().name
    folders = {path.parts[0] for path in found if len(path.parts) > 1}
    top = [entry.name.lower() for entry in entries] + [path.name for path in found if len(path.parts) == 1]
    many = layout == "repositories" or (layout == "auto" and _holds_repositories(top, folders))
    files: dict[str, SourceFile] = {}
    for path in found:
        inner = many and len(path.parts) > 1
        shown = path.as_posix() if inner else f"{own}/{path.as_posix()}"
        if shown in files:
            raise UserError(
                f"--source {directory}: {files[shown].location} and {directory / path} would both be called {shown}; "
                f"rename one, or give --layout repository"
            )
        files[shown] = SourceFile(shown, path.parts[0] if inner else own, directory / path)
    roots = {own: directory, **({name: directory / name for name in folders} if many else {})}
    licences = {name: text for name, root in roots.items() if (text := _licence_text(root)) is not None}
    return Corpus(list(files.values()), licences)


def _holds_repositories(top: list[str], folders: set[str]) -> bool:
    """Whether a directory is a collection of repositories, not one itself, by what stands at its top."""
    is_one = any(name in _ROOT_MARKS or name.split(".")[0] in _ROOT_MARKS for name in top)
    has_code = any(os.path.splitext(name)[1].lower() in EXTENSIONS for name in top)
    return len(folders) > 1 and not is_one and not has_code and not folders & _INNER_FOLDERS


def _walk(directory: Path) -> Iterator[PurePosixPath]:
    """C++ files below `directory`, relative to it;
    hidden directories and links to directories are not entered.
    """
    for root, folders, names in os.walk(directory, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name)
            if path.suffix.lower() in EXTENSIONS:
                yield PurePosixPath(path.relative_to(directory).as_posix())


def _unreadable(error: OSError) -> None:
    """A directory passed over in silence would be text missing without a word."""
    raise UserError(f"--source: cannot read directory {error.filename}: {error.strerror}") from error


def _licence_text(root: Path) -> str | None:
    """Text of the licence file at the root of a checkout; `curate` names the licence."""
    for path in sorted(root.iterdir()):
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
            return path.read_bytes()[:8_000].decode("utf-8", "replace")
    return None
