"""The index of a folder of runs: one SQLite row per run, made from the run's own files and remade at any time.

Not evidence, and never believed: a row counts only while the files it was made from are the ones on the disk, its own
digest holds and this code made it; anything else is read anew. `fathom flags verify` does not look at it.
"""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from libs.flags.audit_record import audit_path
from libs.flags.canonical import sha256_hex
from libs.flags.errors import UserError, reading
from libs.flags.runlog import log_path
from libs.flags.runs import list_runs, name_of
from libs.flags.summary import RunSummary, summarise

FILE_NAME = ".fathom-index.sqlite"
_MEMORY = ":memory:"
_LOCK_SECONDS = 60
_EDGE_BYTES = 4096
_MANY = 1000  # runs to read
_MOST_WORKERS = 8
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH)
_UNWRITABLE = (
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,  # a limit on the size of files, a disk that fails
    sqlite3.SQLITE_PROTOCOL,  # a file system whose locks do not work
    sqlite3.SQLITE_NOLFS,
)
_TABLES = """
CREATE TABLE IF NOT EXISTS made_by (code TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS runs (
  run TEXT PRIMARY KEY, files TEXT NOT NULL, summary TEXT NOT NULL, digest TEXT NOT NULL);
"""
# For people with `sqlite3 FILE`; the columns of a run are in its summary, as JSON.
_VIEWS = {
    "gates": """SELECT runs.run AS run, gate.key AS gate,
  json_extract(entry.value, '$.outcome') AS outcome, json_extract(entry.value, '$.value') AS value,
  json_extract(entry.value, '$.exposed') AS exposed, json_extract(entry.value, '$.attempts') AS attempts
  FROM runs, json_each(runs.summary, '$.gates') AS gate, json_each(gate.value) AS entry""",
    "refusals": """SELECT runs.run AS run, json_extract(row.value, '$.variable') AS variable,
  json_extract(row.value, '$.value') AS value, json_extract(row.value, '$.why') AS why
  FROM runs, json_each(runs.summary, '$.refusals') AS row""",
    "changes": """SELECT runs.run AS run, json_extract(row.value, '$.gate') AS gate,
  json_extract(row.value, '$.new') AS new, json_extract(row.value, '$.note') AS note
  FROM runs, json_each(runs.summary, '$.changes') AS row""",
}


class Refreshed(NamedTuple):
    """What a refresh did: rows read anew from the files, rows that still held, rows of runs that are gone."""

    read: int
    kept: int
    removed: int


class RunIndex:
    """An open index. notes: what a reader should know: it was damaged, or it cannot be written here."""

    def __init__(self, folder: Path, database: sqlite3.Connection, notes: list[str]) -> None:
        self.folder = folder
        self.notes = notes
        self._database = database
        self._summaries: dict[str, RunSummary] = {}
        self._files: dict[str, str] = {}

    @classmethod
    def open(cls, folder: Path, *, stored: bool = True, rebuild: bool = False) -> RunIndex:
        """The index of `folder`, up to date. stored: keep it in the folder; otherwise in memory, writing nothing.

        Raises:
            UserError: no such folder, or it is a run; or another process has been writing the index for a minute.
        """
        with reading():
            if not folder.is_dir():
                raise UserError(f"{folder} is not a directory of runs")
            if log_path(folder).is_file() or audit_path(folder).is_file():
                raise UserError(f"{folder} is a run: give the folder it lies in, or see `fathom runs show {folder}`")
        path = folder / FILE_NAME
        notes: list[str] = []
        if rebuild and stored:
            _drop(path, "made anew, as asked", notes)
        # Once more after a damaged file has been dropped; without a file where none can be written.
        for place in (str(path), str(path), _MEMORY) if stored else (_MEMORY,):
            try:
                return cls._at(place, folder, notes)
            except sqlite3.DatabaseError as error:
                if place == _MEMORY:
                    raise
                if not _drop_damaged(error, path, notes):
                    break
        return cls._at(_MEMORY, folder, notes)

    @classmethod
    def _at(cls, place: str, folder: Path, notes: list[str]) -> RunIndex:
        index = cls(folder, _connect(place), notes)
        try:
            index.refresh()
        except BaseException:
            index.close()
            raise
        return index

    def refresh(self) -> Refreshed:
        """Read every run whose files are not those of its row; forget runs that are gone."""
        held = self._held()
        stale: dict[Path, str] = {}
        kept = 0
        for run in list_runs(self.folder):
            files, name = files_of(run), name_of(run)
            if held.pop(name, None) == files and self._files.get(name) == files:
                kept += 1
            else:
                stale[run] = files  # taken before the run is read: what it writes meanwhile is seen next time
        with self._database as database:
            for (run, files), summary in zip(stale.items(), _summaries(list(stale)), strict=True):
                name, text = name_of(run), summary.model_dump_json()
                row = (name, files, text, _digest(name, files, text))
                database.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", row)
                self._summaries[name], self._files[name] = summary, files
            database.executemany("DELETE FROM runs WHERE run = ?", [(name,) for name in held])
        for name in held:
            self._summaries.pop(name, None)
            self._files.pop(name, None)
        return Refreshed(len(stale), kept, len(held))

    def _held(self) -> dict[str, str]:
        """Run -> the files its row was made from, for every row; those that hold are in `_summaries` then."""
        with self._database as database:
            if database.execute("SELECT code FROM made_by").fetchall() != [(_code(),)]:
                database.execute("DELETE FROM made_by")
                database.execute("DELETE FROM runs")
                for name, query in _VIEWS.items():
                    database.execute(f"DROP VIEW IF EXISTS {name}")
                    database.execute(f"CREATE VIEW {name} AS {query}")
                database.execute("INSERT INTO made_by VALUES (?)", (_code(),))
        held: dict[str, str] = dict(self._database.execute("SELECT run, files FROM runs"))
        if all(self._files.get(run) == files for run, files in held.items()):
            return held
        for run, files, text, digest in self._database.execute("SELECT run, files, summary, digest FROM runs"):
            if _digest(run, files, text) != digest:
                self.notes.append(f"the row of {run} in the index had been changed, or is another version's: read anew")
                continue
            try:
                self._summaries[run], self._files[run] = RunSummary.model_validate_json(text), files
            except ValidationError:
                self.notes.append(f"the row of {run} in the index is no summary: read anew")
        return held

    def runs(self) -> list[RunSummary]:
        """Every run as of the last refresh, by name."""
        return [self._summaries[name] for name in sorted(self._summaries)]

    def close(self) -> None:
        self._database.close()


def _summaries(runs: Sequence[Path]) -> Iterator[RunSummary]:
    """In order; by several processes when there are so many that starting them does not matter."""
    workers = min(os.cpu_count() or 1, _MOST_WORKERS)
    if len(runs) < _MANY or workers == 1:
        yield from map(summarise, runs)
        return
    # Not forked: a server that refreshes its index has threads.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(summarise, runs, chunksize=50)


def _connect(place: str) -> sqlite3.Connection:
    database = sqlite3.connect(place, timeout=_LOCK_SECONDS)
    try:
        database.executescript(_TABLES)
        broken = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if broken != "ok":
            error = sqlite3.DatabaseError(broken)
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database


def _drop_damaged(error: sqlite3.DatabaseError, path: Path, notes: list[str]) -> bool:
    """Drop a damaged index: true when it is worth another try, false when it cannot be written.

    Raises:
        UserError: another process holds it.
    """
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if code in _UNWRITABLE:
        notes.append(f"the index {path} cannot be written ({error}): every run is read each time")
        return False
    if code not in _DAMAGED:
        raise UserError(f"the index {path} cannot be used: {error}; wait for its writer, or delete it") from error
    return _drop(path, f"was damaged ({error}) and is made anew", notes)


def _drop(path: Path, why: str, notes: list[str]) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        notes.append(
            f"the index {path} {why}, but it cannot be removed ({error.strerror}): every run is read each time"
        )
        return False
    notes.append(f"the index {path} {why}")
    return True


def files_of(run: Path) -> str:
    """What tells whether anything a summary is made of has changed, as one hash.

    Of each file its size, its times (ctime too, which `touch` cannot set back) and its edges; of an audit chain,
    which is small and must not be believed by its date, all of its bytes.
    """
    return sha256_hex("\n".join(_marks(run)).encode("utf-8", "surrogateescape"))


def _marks(run: Path) -> Iterator[str]:
    yield from _each(run / "audit", partial(_file, whole=True))
    yield from _each(run / "logs", partial(_file, whole=False))
    yield from _each(run / "checkpoints", _checkpoint)


def _each(folder: Path, mark: Callable[[str], str]) -> Iterator[str]:
    """The mark of every entry, by name; of what cannot be looked at, why not: one file must not end the index."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.path) for entry in entries)
    except OSError as error:
        yield f"{folder.name} {error.strerror}"
        return
    for name, path in found:
        yield f"{folder.name}/{name} {mark(path)}"


def _file(path: str, *, whole: bool) -> str:
    try:
        found = os.stat(path)
        # Anything else is not read either; a pipe would be waited for.
        return f"{_times(found)} {_content(path, whole) if stat.S_ISREG(found.st_mode) else 'not a file'}"
    except OSError as error:
        return str(error.strerror)


def _checkpoint(path: str) -> str:
    marks = []
    for name in ("trainer.json", "COMMITTED"):
        try:
            marks.append(_times(os.stat(os.path.join(path, name))))
        except OSError as error:
            marks.append(str(error.strerror))
    return ", ".join(marks)


def _times(found: os.stat_result) -> str:
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def _content(path: str, whole: bool) -> str:
    with open(path, "rb") as file:
        content = file.read() if whole else file.read(_EDGE_BYTES)
        if not whole and file.seek(0, os.SEEK_END) > _EDGE_BYTES:
            file.seek(-_EDGE_BYTES, os.SEEK_END)
            content += file.read()
    return sha256_hex(content)


def _digest(run: str, files: str, summary: str) -> str:
    """Of the code too: another version may write between this one's look at `made_by` and its reading of the rows."""
    return sha256_hex(f"{_code()}\0{run}\0{files}\0{summary}".encode("utf-8", "surrogatepass"))


@lru_cache(maxsize=1)
def _code() -> str:
    """The code that makes summaries: rows of another version of it are not read."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return sha256_hex(b"\0".join(source.name.encode() + b"\0" + source.read_bytes() for source in sources))
