"""Whether an audit chain is what its writer wrote: intact, torn by a crash in mid-line, or tampered with.

Not for reading records (see `audit_record`). Without anchors a cut tail cannot be seen: they are counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic_core import from_json

from libs.flags.append_file import Line, read_lines
from libs.flags.audit_record import FIELDS, GENESIS, Anchor, sealed

Kind = Literal["edit", "delete", "insert", "reorder", "truncate", "missing"]
# Keys are sorted on disk, so every record begins like this, and so does what a crash leaves of one.
_BEGINNING = b'{"attempt":'
_TYPES: dict[str, tuple[type, ...]] = dict.fromkeys(FIELDS, (str, type(None)))
_TYPES |= dict.fromkeys(("seq", "attempt", "rank"), (int,)) | {"event": (str,)}
_TYPES |= dict.fromkeys(("value", "default"), (str, bool, type(None)))


class VerifyResult(NamedTuple):
    """anchor: head and length of the records that hold. first_bad: number of the first bad record, from 0 as
    `seq` (line first_bad + 1 of the file). torn_bytes: length of an unfinished last line.
    """

    status: Literal["intact", "torn", "tampered"]
    anchor: Anchor
    anchors_checked: int
    torn_bytes: int = 0
    kind: Kind | None = None
    first_bad: int | None = None
    problem: str = ""

    def describe(self) -> str:
        if self.status == "tampered":
            return f"tampered ({self.kind}) at record {self.first_bad}: {self.problem}"
        checked = f"{self.anchor.length} records, anchors that match: {self.anchors_checked}"
        if self.status == "torn":
            return f"{checked}; the last line is unfinished ({self.torn_bytes} bytes): a crash, not tampering"
        return checked if self.anchors_checked else f"{checked} (without an anchor a cut tail cannot be seen)"


class _Bad(Exception):
    def __init__(self, kind: Kind, first_bad: int, problem: str) -> None:
        super().__init__(problem)
        self.kind: Kind = kind
        self.first_bad = first_bad
        self.problem = problem


def verify_chain(
    path: Path, anchors: Iterable[Anchor] = (), *, run_id: str | None = None, rank: int | None = None
) -> VerifyResult:
    """Check every record's hash, the links, the order, the anchors, and that the run and rank are these.

    A missing file is intact only when no anchor speaks of it.
    """
    return verify_records(path, anchors, run_id=run_id, rank=rank)[0]


def verify_records(
    path: Path, anchors: Iterable[Anchor] = (), *, run_id: str | None = None, rank: int | None = None
) -> tuple[VerifyResult, list[dict[str, Any]]]:
    """As `verify_chain`, with the records that hold: all of them, or those before the first bad one."""
    known = sorted(set(anchors), key=lambda anchor: anchor.length)
    records: list[dict[str, Any]] = []
    if not path.is_file():
        if any(anchor.length for anchor in known):
            problem = f"{path} does not exist, but an anchor attests {known[-1].length} records"
            return VerifyResult("tampered", Anchor(GENESIS, 0), 0, 0, "missing", 0, problem), records
        return VerifyResult("intact", Anchor(GENESIS, 0), len(known)), records
    lines = list(read_lines(path))
    torn = lines.pop() if lines and lines[-1].torn else None
    heads: list[str] = [GENESIS]
    try:
        for record in _walk(lines, heads, known, run_id, rank):
            records.append(record)
        if torn is not None:
            _judge_torn(torn, heads[-1])
        _check_anchors(heads, known)
    except _Bad as bad:
        holds = min(bad.first_bad, len(heads) - 1)
        anchor = Anchor(heads[holds], holds)
        return VerifyResult("tampered", anchor, 0, 0, bad.kind, bad.first_bad, bad.problem), records[:holds]
    anchor = Anchor(heads[-1], len(heads) - 1)
    if torn is not None:
        return VerifyResult("torn", anchor, len(known), len(torn.content)), records
    return VerifyResult("intact", anchor, len(known)), records


def _walk(
    lines: Sequence[Line], heads: list[str], known: Sequence[Anchor], run_id: str | None, rank: int | None
) -> Iterator[dict[str, Any]]:
    """Follow the chain: yield each good record, its hash added to `heads`."""
    for index, line in enumerate(lines):
        record = _record(line.content, index)
        if record["prev"] != heads[-1] or record["seq"] != index:
            _explain(record, index, lines, heads, known)
        if (run_id is not None and record["run_id"] != run_id) or (rank is not None and record["rank"] != rank):
            whose = f"run {record['run_id']!r} rank {record['rank']}"
            raise _Bad("insert", index, f"it belongs to {whose}, not to run {run_id!r} rank {rank}")
        heads.append(record["hash"])
        yield record


def _record(content: bytes, index: int) -> dict[str, Any]:
    """The record of a line, if the line is byte for byte what its hash covers."""
    try:
        record = from_json(content)
    except (ValueError, RecursionError) as error:
        raise _Bad("edit", index, f"not JSON ({error})") from error
    if not isinstance(record, dict) or set(record) != set(FIELDS):
        raise _Bad("edit", index, "not the fields of an audit record")
    wrong = [name for name, kind in _TYPES.items() if not isinstance(record[name], kind)]
    if wrong:
        raise _Bad("edit", index, f"not a value that was ever written: {wrong[0]} {record[wrong[0]]!r:.80}")
    try:
        digest, line = sealed(record)
    except ValueError as error:
        raise _Bad("edit", index, f"not a value that was ever written ({error})") from error
    if digest != record["hash"]:
        raise _Bad("edit", index, "its content does not have the hash it states")
    # Equal content in other bytes: spaces, an escaped letter, a key given twice.
    if line != content:
        raise _Bad("edit", index, "its bytes are not those that were written")
    return record


def _explain(
    record: dict[str, Any], index: int, lines: Sequence[Line], heads: Sequence[str], known: Sequence[Anchor]
) -> None:
    """Raise what happened, given a sound record at `index` that does not follow the one before."""
    others = [_plain(line.content) for line in lines]
    if record["hash"] in heads:
        raise _Bad("insert", index, f"a copy of record {heads.index(record['hash']) - 1}")
    if index and record["seq"] == index - 1 and record["prev"] == heads[-2]:
        # Two records in one place: the genuine one is that which the rest follows, or an anchor attests.
        followed = any(other.get("prev") == record["hash"] for other in others[index + 1 :])
        if followed or Anchor(record["hash"], index) in known:
            raise _Bad("insert", index - 1, f"the rest follows another record {index - 1}, at line {index + 1}")
    later = [j for j, other in enumerate(others) if j > index and other.get("prev") == heads[-1]]
    if later:
        genuine = any(other.get("hash") == record["prev"] for other in others)
        if genuine and record["seq"] != index:
            raise _Bad("reorder", index, f"record {record['seq']} stands here, record {index} at line {later[0] + 1}")
        raise _Bad("insert", index, f"the record that follows record {index - 1} is at line {later[0] + 1}")
    if isinstance(record["seq"], int) and record["seq"] > index:
        last = record["seq"] - 1
        missing = f"record {index} is missing" if last == index else f"records {index} to {last} are missing"
        raise _Bad("delete", index, missing)
    if record["seq"] != index:
        raise _Bad("insert", index, f"it calls itself record {record['seq']}")
    if index == 0 or Anchor(heads[-1], index) in known:
        raise _Bad("edit", index, "rewritten: it does not follow the record before it, which an anchor attests")
    raise _Bad("edit", index - 1, f"rewritten: record {index} follows another record {index - 1}")


def _plain(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _judge_torn(torn: Line, head: str) -> None:
    """Raise unless the last line is what a crash leaves: the beginning of a record that follows."""
    begins = torn.content[: len(_BEGINNING)]
    if not _BEGINNING.startswith(begins):
        raise _Bad("insert", torn.number - 1, "the unfinished last line is not the beginning of a record")
    if _plain(torn.content) and _record(torn.content, torn.number - 1)["prev"] != head:
        raise _Bad(
            "edit",
            torn.number - 1,
            "the last line is a record that does not follow",
        )


def _check_anchors(heads: Sequence[str], known: Sequence[Anchor]) -> None:
    attested = 0
    for anchor in known:
        if anchor.length >= len(heads):
            have = len(heads) - 1
            raise _Bad("truncate", have, f"an anchor attests {anchor.length} records, {have} are left")
        if heads[anchor.length] != anchor.head:
            which = (
                f"record {attested}" if anchor.length - attested <= 1 else f"a record of {attested}-{anchor.length - 1}"
            )
            raise _Bad("edit", attested, f"{which} was rewritten with all that follow: the anchor has another hash")
        attested = anchor.length
