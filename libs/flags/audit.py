"""The audit chain: RUN/audit/rank00000.jsonl, an append-only hash chain of what became of each gate.

Not the run log, and no proof against its own writer: a whole chain can be written anew, so anchors (head hash
and length) go into checkpoints and the run log. See `verify` for reading one back.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from libs.flags.append_file import AppendFile
from libs.flags.audit_record import AUDIT_EVENTS, Anchor, AuditEvent, record_hash
from libs.flags.canonical import canonical_json, sha256_hex, utc_now
from libs.flags.errors import UserError
from libs.flags.registry import GateValue
from libs.flags.verify import verify_chain


class AuditLog:
    """The open chain of one rank. Every record is on the disk when `record` returns."""

    def __init__(self, file: AppendFile, anchor: Anchor, run_id: str, attempt: int, rank: int) -> None:
        self._file = file
        self._anchor = anchor
        self._lock = threading.Lock()
        self.run_id, self.attempt, self.rank = run_id, attempt, rank

    @classmethod
    def open(cls, path: Path, run_id: str, attempt: int, rank: int = 0) -> AuditLog:
        """Open for appending, after verifying what is there. A line torn by a crash is cut off and recorded.

        Raises:
            UserError: the place cannot be written, another process writes it, or the chain is tampered with.
        """
        file = AppendFile.open(path)
        try:
            found = verify_chain(path, run_id=run_id, rank=rank)
            if found.status == "tampered":
                raise UserError(f"{path}: {found.describe()}; a tampered audit chain is never continued")
            torn = file.cut_torn_tail()
            log = cls(file, found.anchor, run_id, attempt, rank)
            if torn:
                log.record("torn_tail_cut", reason=f"{len(torn)} bytes, sha256 {sha256_hex(torn)}", source="open")
        except BaseException:
            file.close()
            raise
        return log

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def closed(self) -> bool:
        return self._file.closed

    def record(
        self,
        event: AuditEvent,
        *,
        reason: str,
        source: str,
        gate: str | None = None,
        value: GateValue | None = None,
        default: GateValue | None = None,
        stage: str | None = None,
        spec_hash: str | None = None,
    ) -> dict[str, Any]:
        """Append one record and return it. Safe from several threads; not from a signal handler.

        Raises:
            UserError: the file system refuses it, or cannot say that it is on the disk.
        """
        assert event in AUDIT_EVENTS, event
        with self._lock:
            record: dict[str, Any] = {
                "seq": self._anchor.length,
                "ts": utc_now(),
                "run_id": self.run_id,
                "attempt": self.attempt,
                "rank": self.rank,
                "event": event,
                "gate": gate,
                "value": value,
                "default": default,
                "stage": stage,
                "reason": reason,
                "source": source,
                "spec_hash": spec_hash,
                "prev": self._anchor.head,
            }
            record["hash"] = record_hash(record)
            self._file.write_line(canonical_json(record))
            # The record is in the file, whether or not it reaches the disk: what follows must follow it.
            self._anchor = Anchor(record["hash"], self._anchor.length + 1)
            self._file.sync()
        return record

    def anchor(self) -> Anchor:
        """The chain's head now: store `str(anchor)` wherever this moment must stay provable."""
        return self._anchor

    def close(self) -> None:
        self._file.close()
