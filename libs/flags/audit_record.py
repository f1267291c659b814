"""One record of the audit chain, its hash, and the anchor that proves a chain's length.

Not for writing (see `audit`) and not for judging a file (see `verify`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from libs.flags.append_file import read_lines
from libs.flags.canonical import canonical_json, sha256_hex
from libs.flags.errors import UserError

GENESIS = "0" * 64
FIELDS = (
    "seq",
    "ts",
    "run_id",
    "attempt",
    "rank",
    "event",
    "gate",
    "value",
    "default",
    "stage",
    "reason",
    "source",
    "spec_hash",
    "prev",
    "hash",
)
# The three outcomes; the first branch on a gate; a change accepted on resume; a torn line that was cut off.
AuditEvent = Literal["off", "refused", "active", "exposed", "change_accepted", "torn_tail_cut"]
AUDIT_EVENTS: tuple[str, ...] = get_args(AuditEvent)


class Anchor(NamedTuple):
    """The head of a chain: hash of its last record (GENESIS when empty) and number of records."""

    head: str
    length: int

    def __str__(self) -> str:
        return f"{self.head}:{self.length}"

    @classmethod
    def parse(cls, text: str) -> Anchor:
        """Read "HASH:LEN".

        Raises:
            UserError: not of that form.
        """
        match = re.fullmatch(r"([0-9a-f]{64}):(\d{1,12})", text)
        if match is None:
            raise UserError(f"{text!r} is not an anchor: expected HASH:LEN, 64 hex digits and the number of records")
        return cls(match.group(1), int(match.group(2)))


def audit_path(run_dir: Path, rank: int = 0) -> Path:
    return run_dir / "audit" / f"rank{rank:05d}.jsonl"


def record_hash(record: dict[str, Any]) -> str:
    """SHA-256(prev || canonical JSON of the record without its hash)."""
    return sealed(record)[0]


def sealed(record: dict[str, Any]) -> tuple[str, bytes]:
    """The hash that the record must have, and the bytes of its line with the hash that it states.

    The line is the canonical JSON of the whole record, put together from that of the hashed part: "hash" stands before
    "prev", which no text inside a string can be taken for, because its quotes would be escaped.
    """
    body = canonical_json({name: value for name, value in record.items() if name != "hash"})
    stated = b'"hash":' + canonical_json(record.get("hash")) + b',"prev":'
    return sha256_hex(str(record["prev"]).encode("utf-8") + body), body.replace(b'"prev":', stated, 1)


def read_audit(path: Path) -> list[dict[str, Any]]:
    """The whole records of a chain, unverified (see `libs.flags.verify`).

    Raises:
        UserError: there is no such file, or a line is not a JSON object.
    """
    if not path.is_file():
        raise UserError(f"no audit file at {path}: not a run directory, or a run that stopped before its gates")
    records = []
    for line in read_lines(path):
        if line.torn:
            continue
        try:
            record = json.loads(line.content)
        except ValueError as error:
            raise UserError(f"{path} line {line.number} is not JSON: {error}; see `fathom flags verify`") from error
        if not isinstance(record, dict) or set(record) != set(FIELDS):
            raise UserError(f"{path} line {line.number} is not an audit record; see `fathom flags verify`")
        records.append(record)
    return records
