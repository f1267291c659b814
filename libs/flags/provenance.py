"""Where a run came from: code, packages, machine, command line, allow-listed variables. Never a credential.

Not for devices: there is no torch here, so callers pass what they know in `extra`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from libs.flags.environment import REDACTED, allowed_variables, git_environment, names_a_secret

ROOT = Path(__file__).resolve().parents[2]
_GIT_SECONDS = 30
_PIECE_BYTES = 1 << 20
_UNREADABLE = b"unreadable"
# Receipts that were just written are results: the next benchmark's code is not changed by them.
_RESULTS = "infra/receipts"


class GitState(NamedTuple):
    """commit, dirty: None when unknown, with the reason. dirty_hash: over the changes, None when clean."""

    commit: str | None
    dirty: bool | None
    dirty_hash: str | None
    reason: str | None


def snapshot(extra: Mapping[str, Any], *, root: Path = ROOT) -> dict[str, Any]:
    """The fields of `events.EnvSnapshot`. extra: JSON values that only the caller knows."""
    git = git_state(root)
    cores = os.cpu_count() or 0
    return {
        "git_commit": git.commit,
        "git_dirty": git.dirty,
        "git_dirty_hash": git.dirty_hash,
        "git_reason": git.reason,
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_count": cores,
        "cpu_affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "command": redact_command(sys.argv),
        "variables": allowed_variables(),
        "extra": dict(extra),
    }


def git_state(root: Path = ROOT) -> GitState:
    """Commit and dirtiness of the checkout whose top is `root`. No git and no such checkout are answers, not errors.

    New files among the receipts leave it clean; a changed receipt does not.
    """
    try:
        top = Path(os.fsdecode(_git(root, "rev-parse", "--show-toplevel").removesuffix(b"\n")))
        if top.resolve() != root.resolve():
            return GitState(None, None, None, f"no checkout of its own: it lies in that of {top}")
        commit = _git(root, "rev-parse", "--verify", "HEAD").decode().strip()
        difference = _git(root, "diff", "--no-ext-diff", "--binary", "HEAD")
        names = _files(root, "--others", "--", ".", f":(exclude){_RESULTS}")
        if not difference and not names:
            return GitState(commit, False, None, None)
        return GitState(commit, True, _dirty_hash(root, difference, names), None)
    except FileNotFoundError:
        return GitState(None, None, None, "git is not installed")
    except subprocess.TimeoutExpired:
        return GitState(None, None, None, f"git took more than {_GIT_SECONDS} s")
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        return GitState(None, None, None, f"git: {said[0] if said else error.returncode}")


def code_version(root: Path = ROOT) -> str:
    """sha256 over the Python files of apps and libs with their paths: equal exactly when the code is, git or no git."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("apps", "libs") for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _dirty_hash(root: Path, difference: bytes, names: Sequence[str]) -> str:
    digest = hashlib.sha256(difference)
    for part in _parts(root, names):
        digest.update(part)
    return digest.hexdigest()


def _parts(root: Path, names: Sequence[str]) -> Iterator[bytes]:
    """The files of these names: name, length and content of each, in pieces, since a file may be larger than memory.

    A link is what it points to, a repository in here all files that it does not ignore. A file can vanish between the
    listing and here.
    """
    for name in names:
        path = root / name
        try:
            if path.is_symlink():
                target = os.fsencode(os.readlink(path))
                yield _heading(name, len(target)) + target
            elif (path / ".git").exists():
                yield _heading(name, 0)
                yield from _parts(path, _files(path, "--cached", "--others"))
            else:
                with path.open("rb") as file:
                    yield _heading(name, os.fstat(file.fileno()).st_size)
                    while piece := file.read(_PIECE_BYTES):
                        yield piece
        except OSError:
            yield _heading(name, len(_UNREADABLE)) + _UNREADABLE


def _heading(name: str, length: int) -> bytes:
    return f"\0{name}\0{length}\0".encode("utf-8", "surrogateescape")


def _files(root: Path, *which: str) -> list[str]:
    """The paths below `root` that git lists and does not ignore, in order."""
    listed = _git(root, "ls-files", "-z", "--exclude-standard", *which)
    return sorted({name for name in listed.decode("utf-8", "surrogateescape").split("\0") if name})


def _git(root: Path, *arguments: str) -> bytes:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, timeout=_GIT_SECONDS, env=git_environment())
    return done.stdout


def package_versions() -> dict[str, str]:
    """Name -> version of every installed distribution."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def cpu_model() -> str:
    """The processor's name: /proc/cpuinfo where there is one, else what the platform says."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def redact_command(command: Sequence[str]) -> list[str]:
    """The command line without the values of options that name a secret (--x.token V, --x.token=V)."""
    shown: list[str] = []
    hide_next = False
    for argument in command:
        option, equals, _ = argument.partition("=")
        secret = option.startswith("-") and names_a_secret(option)
        # Two dashes are the next option; one may be how the secret begins.
        if hide_next and not argument.startswith("--"):
            shown.append(REDACTED)
            hide_next = False
        else:
            shown.append(f"{option}={REDACTED}" if secret and equals else argument)
            hide_next = secret and not equals
    return shown
