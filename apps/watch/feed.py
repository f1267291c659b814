"""What the page shows: a row per run, kept up to date, and what has changed since a version of it.

Not for HTTP (server.py). The index lives in memory and in one thread; readers of the feed see finished rows only.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

from libs.flags.compare import show
from libs.flags.index import RunIndex
from libs.flags.summary import RunSummary

Row = dict[str, Any]


class News(NamedTuple):
    """What changed up to `version`. total: runs in the folder, of which the newest are shown."""

    version: int
    rows: list[Row]
    removed: list[str]
    total: int

    def plain(self) -> dict[str, Any]:
        return self._asdict()


class Feed:
    """limit: so many runs are shown, those that wrote last."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._index = RunIndex.open(folder, stored=False)
        self._limit = limit
        self._changed = threading.Condition()
        self._closed = False
        self._version = 0
        self._total = 0
        self._rows: dict[str, tuple[int, Row]] = {}
        self._removed: dict[str, int] = {}
        self._take(self._index.runs())

    def refresh(self) -> None:
        """Look at the runs again. Only from the thread that made the feed."""
        found = self._index.refresh()
        if found.read or found.removed:
            self._take(self._index.runs())

    def _take(self, runs: list[RunSummary]) -> None:
        newest = sorted(runs, key=lambda run: run.last or run.started or "", reverse=True)[: self._limit]
        rows = {run.run: row_of(run) for run in newest}
        with self._changed:
            self._version += 1
            self._total = len(runs)
            for name, row in rows.items():
                if name not in self._rows or self._rows[name][1] != row:
                    self._rows[name] = (self._version, row)
                self._removed.pop(name, None)
            for name in [name for name in self._rows if name not in rows]:
                del self._rows[name]
                self._removed[name] = self._version
            self._changed.notify_all()

    def since(self, version: int, timeout_s: float) -> News | None:
        """What is newer than `version` (0: everything), waiting for it; None when nothing came, or it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._version > version, timeout_s)
            if self._closed or self._version <= version:
                return None
            rows = [row for at, row in self._rows.values() if at > version]
            removed = [name for name, at in self._removed.items() if at > version]
            return News(self._version, rows, removed, self._total)

    @property
    def closed(self) -> bool:
        return self._closed

    def end(self) -> None:
        """End every wait, from any thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """As `end`; and the index too, so only from the thread that made the feed."""
        self.end()
        self._index.close()


def row_of(run: RunSummary) -> Row:
    """What the page shows of a run: text and numbers, nothing that needs this program to be understood."""
    outcomes: dict[str, list[str]] = {"active": [], "refused": []}
    for gate, entries in run.gates.items():
        for entry in entries:
            if entry.outcome in outcomes:
                used = ", exposed" if entry.exposed else ""
                outcomes[entry.outcome].append(f"{gate}={show(entry.value)}{used}")
    return {
        "run": run.run,
        "status": run.status,
        "reason": run.reason,
        "started": run.started,
        "last": run.last,
        "step": run.step,
        "loss": run.loss,
        "bpb": run.valid_bpb if run.valid_bpb is not None else run.bpb,
        "tokens_per_s": run.tokens_per_s,
        "active": outcomes["active"],
        "refused": outcomes["refused"] + list(run.unknown),
        "why": [f"{refusal.variable}={refusal.value}: {refusal.why}" for refusal in run.refusals],
        "changed": [f"{change.gate}={show(change.new)}, {change.note}" for change in run.changes],
        "anomalies": [f"step {a.step}: {a.what} {a.action}".strip() for a in run.anomalies],
        "n_anomalies": run.n_anomalies,
        "chain": run.chain,
        "problem": run.problem,
    }
