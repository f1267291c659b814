"""Every way to tamper with a chain is found, named and placed; a crash in mid-line is not taken for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libs.flags import verify
from libs.flags.audit import AuditLog
from libs.flags.audit_record import FIELDS, GENESIS, Anchor, record_hash, sealed
from libs.flags.canonical import canonical_json
from libs.flags.verify import VerifyResult, verify_chain

COUNT = 7
Lines = list[bytes]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lines, list[Anchor]]:
    """The lines of a chain of COUNT records and the anchor after each of them."""
    path = tmp_path_factory.mktemp("chain") / "a.jsonl"
    log = AuditLog.open(path, "run", 0, 0)
    anchors = [log.anchor()]
    for index in range(COUNT):
        log.record(
            "active" if index % 2 else "off",
            gate=f"g{index}",
            value=bool(index % 2),
            default=False,
            stage="experimental",
            reason="never requested",
            source="default",
            spec_hash="5" * 64,
        )
        anchors.append(log.anchor())
    log.close()
    return path.read_bytes().splitlines(), anchors


Pristine = tuple[Lines, list[Anchor]]


def _judge(folder: Path, lines: Lines, anchors: list[Anchor] | None = None, tail: bytes = b"") -> VerifyResult:
    path = folder / "chain.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines) + tail)
    return verify_chain(path, anchors or (), run_id="run", rank=0)


def _changed(line: bytes, *, rehash: bool, **fields: Any) -> bytes:
    record = json.loads(line) | fields
    if rehash:
        record["hash"] = record_hash(record)
    return canonical_json(record)


OTHER: dict[str, Any] = {
    "seq": 99,
    "ts": "2020-01-01T00:00:00.000000Z",
    "run_id": "other",
    "attempt": 5,
    "rank": 3,
    "event": "refused",
    "gate": "tma",
    "value": "fwd",
    "default": True,
    "stage": "locked",
    "reason": "because",
    "source": "me",
    "spec_hash": "6" * 64,
    "prev": "7" * 64,
    "hash": "8" * 64,
}


def test_intact(tmp_path: Path, pristine: Pristine) -> None:
    lines, anchors = pristine
    result = _judge(tmp_path, lines, anchors)
    assert (result.status, result.anchor, result.anchors_checked) == ("intact", anchors[-1], COUNT + 1)
    assert "cut tail cannot be seen" in _judge(tmp_path, lines).describe()


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("index", [0, 3, COUNT - 1])
def test_editing_any_field_is_found(tmp_path: Path, pristine: Pristine, field: str, index: int) -> None:
    """Without any anchor, and for each field: a chain check that left one out would fail here."""
    lines = list(pristine[0])
    lines[index] = _changed(lines[index], rehash=False, **{field: OTHER[field]})
    result = _judge(tmp_path, lines)
    assert (result.status, result.kind, result.first_bad) == ("tampered", "edit", index)
    assert f"record {index}" in result.describe()


@pytest.mark.parametrize("field", [field for field in FIELDS if field not in ("prev", "seq", "hash", "run_id", "rank")])
@pytest.mark.parametrize("index", [0, 3, COUNT - 2])
def test_editing_and_hashing_anew_is_found(tmp_path: Path, pristine: Pristine, field: str, index: int) -> None:
    """The record then fits its own hash, but the next one does not follow it."""
    lines = list(pristine[0])
    lines[index] = _changed(lines[index], rehash=True, **{field: OTHER[field]})
    result = _judge(tmp_path, lines)
    assert (result.status, result.kind, result.first_bad) == ("tampered", "edit", index)


def test_rewriting_the_last_record_needs_an_anchor(tmp_path: Path, pristine: Pristine) -> None:
    lines, anchors = list(pristine[0]), pristine[1]
    lines[-1] = _changed(lines[-1], rehash=True, value="fwd")
    assert _judge(tmp_path, lines).status == "intact"
    result = _judge(tmp_path, lines, anchors)
    assert (result.kind, result.first_bad) == ("edit", COUNT - 1)


@pytest.mark.parametrize("index", range(COUNT))
def test_rewriting_the_whole_tail_needs_an_anchor(tmp_path: Path, pristine: Pristine, index: int) -> None:
    lines, anchors = list(pristine[0]), pristine[1]
    prev = json.loads(lines[index])["prev"]
    for at in range(index, COUNT):
        lines[at] = _changed(lines[at], rehash=True, prev=prev, **({"value": "fwd"} if at == index else {}))
        prev = json.loads(lines[at])["hash"]
    assert _judge(tmp_path, lines).status == "intact"
    result = _judge(tmp_path, lines, anchors)
    assert (result.status, result.first_bad) == ("tampered", index)
    sparse = _judge(tmp_path, lines, [anchors[-1]])
    assert (sparse.status, sparse.first_bad) == ("tampered", 0)
    assert f"0-{COUNT - 1}" in sparse.problem


@pytest.mark.parametrize(("index", "count"), [(i, n) for n in (1, 2) for i in range(COUNT - n)])
def test_deleting(tmp_path: Path, pristine: Pristine, index: int, count: int) -> None:
    lines = list(pristine[0])
    del lines[index : index + count]
    result = _judge(tmp_path, lines)
    assert (result.status, result.kind, result.first_bad) == ("tampered", "delete", index)
    named = f"record {index} is missing" if count == 1 else f"records {index} to {index + 1} are missing"
    assert named in result.problem


@pytest.mark.parametrize("index", [0, 3, COUNT - 2])
def test_deleting_and_linking_anew(tmp_path: Path, pristine: Pristine, index: int) -> None:
    """Hashes and links then all fit; the numbers do not, and numbering anew as well is for the anchor."""
    lines, anchors = list(pristine[0]), pristine[1]
    prev = json.loads(lines[index])["prev"]
    del lines[index]
    numbered = list(lines)
    for at in range(index, len(lines)):
        lines[at] = _changed(lines[at], rehash=True, prev=prev)
        prev = json.loads(lines[at])["hash"]
    result = _judge(tmp_path, lines)
    assert (result.status, result.kind, result.first_bad) == ("tampered", "delete", index)
    prev = anchors[index].head
    for at in range(index, len(numbered)):
        numbered[at] = _changed(numbered[at], rehash=True, prev=prev, seq=at)
        prev = json.loads(numbered[at])["hash"]
    assert _judge(tmp_path, numbered, anchors).first_bad == index


def test_an_extra_or_missing_field_is_found(tmp_path: Path, pristine: Pristine) -> None:
    lines = list(pristine[0])
    lines[-1] = _changed(lines[-1], rehash=True, surprise=1)
    result = _judge(tmp_path, lines)
    assert (result.kind, result.first_bad) == ("edit", COUNT - 1)
    for field in FIELDS:
        record = json.loads(pristine[0][-1])
        del record[field]
        lines[-1] = canonical_json(record)
        result = _judge(tmp_path, lines)
        assert (result.kind, result.first_bad) == ("edit", COUNT - 1)


@pytest.mark.parametrize("kept", range(COUNT))
def test_truncating(tmp_path: Path, pristine: Pristine, kept: int) -> None:
    lines, anchors = pristine
    assert _judge(tmp_path, lines[:kept]).status == "intact"
    result = _judge(tmp_path, lines[:kept], [anchors[-1]])
    assert (result.status, result.kind, result.first_bad) == ("tampered", "truncate", kept)
    assert f"attests {COUNT} records, {kept} are left" in result.problem


@pytest.mark.parametrize("copied", [0, 3, COUNT - 1])
@pytest.mark.parametrize("at", range(1, COUNT + 1))
def test_inserting_a_copy(tmp_path: Path, pristine: Pristine, copied: int, at: int) -> None:
    lines = list(pristine[0])
    lines.insert(at, lines[copied])
    result = _judge(tmp_path, lines)
    assert result.status == "tampered"
    # A copy right before its original, or of a later record, is first met where the order breaks.
    assert result.kind in ("insert", "reorder")
    assert result.first_bad == (at if at != copied else at + 1)


@pytest.mark.parametrize("at", range(COUNT + 1))
@pytest.mark.parametrize("prev", ["linked", "unlinked"])
def test_inserting_a_forged_record(tmp_path: Path, pristine: Pristine, at: int, prev: str) -> None:
    lines, anchors = list(pristine[0]), pristine[1]
    link = anchors[at].head if prev == "linked" else "9" * 64
    lines.insert(at, _changed(lines[0], rehash=True, seq=at, prev=link, gate="forged"))
    if at == COUNT and prev == "linked":
        # An honest append and a forged one are the same bytes; only who may write the file tells them apart.
        assert _judge(tmp_path, lines, anchors).status == "intact"
        return
    result = _judge(tmp_path, lines, anchors)
    assert result.status == "tampered"
    assert result.first_bad in (at, at + 1)
    if prev == "unlinked":
        assert result.first_bad == at


@pytest.mark.parametrize(("a", "b"), [(0, 1), (1, 2), (2, 5), (0, COUNT - 1)])
def test_reordering(tmp_path: Path, pristine: Pristine, a: int, b: int) -> None:
    lines = list(pristine[0])
    lines[a], lines[b] = lines[b], lines[a]
    result = _judge(tmp_path, lines)
    assert (result.status, result.kind, result.first_bad) == ("tampered", "reorder", a)


@pytest.mark.parametrize(("field", "value"), [("run_id", "other"), ("rank", 1)])
def test_a_whole_chain_of_another_run(tmp_path: Path, pristine: Pristine, field: str, value: object) -> None:
    prev = GENESIS
    lines = []
    for line in pristine[0]:
        lines.append(_changed(line, rehash=True, prev=prev, **{field: value}))
        prev = json.loads(lines[-1])["hash"]
    result = _judge(tmp_path, lines)
    assert (result.status, result.first_bad) == ("tampered", 0)
    assert "belongs to run" in result.problem


@pytest.mark.parametrize(
    "spoil",
    [
        lambda line: line.replace(b'":', b'": ', 1),
        lambda line: line.replace(b'"gate":"g3"', b'"gate":"\\u0067\\u0033"'),
        lambda line: line[:-1] + b',"seq":3}',
        lambda line: line + b" ",
        lambda line: b"\xff" + line,
        lambda line: b"",
        lambda line: b"null",
        lambda line: b"[" * 100_000,
        lambda line: line.replace(b'"value":true', b'"value":NaN'),
        lambda line: line.replace(b'"prev":"', b'"prev":"\\ud800'),
        lambda line: line.replace(b'"prev":"', '"prev":"é'.encode()),
        lambda line: line.replace(b'"value":true', b'"value":' + b"9" * 5000),
    ],
)
def test_other_bytes_are_found(tmp_path: Path, pristine: Pristine, spoil: Callable[[bytes], bytes]) -> None:
    """Spaces, escapes, repeated keys, garbage: also what parses to the very same record."""
    lines = list(pristine[0])
    assert spoil(lines[3]) != lines[3]
    lines[3] = spoil(lines[3])
    result = _judge(tmp_path, lines)
    assert (result.status, result.kind, result.first_bad) == ("tampered", "edit", 3)


def test_a_line_is_the_canonical_form_of_its_record(pristine: Pristine) -> None:
    """Put together from the hashed part, and equal to the plain way, whatever stands in the strings."""
    for line in pristine[0]:
        record = json.loads(line)
        assert sealed(record) == (record["hash"], line)
        for hostile in ('"prev":', '","prev":"', "\\", "é\n"):
            for field in ("gate", "reason", "event"):
                changed = record | {field: hostile}
                assert sealed(changed)[1] == canonical_json(changed)


def test_a_key_moved_within_a_line_is_found(tmp_path: Path, pristine: Pristine) -> None:
    """Equal content, hash and all, with the hash in another place."""
    lines = list(pristine[0])
    stated = b'"hash":"' + json.loads(lines[3])["hash"].encode() + b'",'
    lines[3] = b"{" + stated + lines[3].replace(stated, b"")[1:]
    assert json.loads(lines[3]) == json.loads(pristine[0][3])
    result = _judge(tmp_path, lines)
    assert (result.status, result.kind, result.first_bad) == ("tampered", "edit", 3)


@pytest.mark.parametrize("kept", [1, 5, 11, 12, 50, 200, -1])
def test_a_crash_in_mid_line_is_not_tampering(tmp_path: Path, pristine: Pristine, kept: int) -> None:
    lines, anchors = pristine
    torn = lines[-1][:kept]
    result = _judge(tmp_path, lines[:-1], anchors[:-1], tail=torn)
    assert (result.status, result.torn_bytes, result.anchor) == ("torn", len(torn), anchors[-2])
    assert "a crash, not tampering" in result.describe()


def test_a_torn_record_that_an_anchor_attests_is_tampering(tmp_path: Path, pristine: Pristine) -> None:
    lines, anchors = pristine
    result = _judge(tmp_path, lines[:-1], [anchors[-1]], tail=lines[-1][:50])
    assert (result.status, result.kind, result.first_bad) == ("tampered", "truncate", COUNT - 1)


def test_a_crash_does_not_hide_tampering(tmp_path: Path, pristine: Pristine) -> None:
    lines = list(pristine[0])
    torn = lines.pop()[:50]
    lines[2] = _changed(lines[2], rehash=False, value="fwd")
    result = _judge(tmp_path, lines, tail=torn)
    assert (result.status, result.first_bad) == ("tampered", 2)


def test_a_tail_that_no_crash_leaves(tmp_path: Path, pristine: Pristine) -> None:
    lines, _ = pristine
    for tail in (b"x", b'{"b', b"\x00\x00\x00", b'{"attempt" :'):
        result = _judge(tmp_path, lines, tail=tail)
        assert (result.status, result.first_bad) == ("tampered", COUNT), tail
    # A whole record without its newline: a crash before the last byte, but only if it follows.
    assert _judge(tmp_path, lines[:-1], tail=lines[-1]).status == "torn"
    assert _judge(tmp_path, lines[:-1], tail=lines[2]).status == "tampered"
    assert _judge(tmp_path, lines[:-1], tail=_changed(lines[-1], rehash=False, value="fwd")).status == "tampered"


def test_a_missing_file(tmp_path: Path, pristine: Pristine) -> None:
    path = tmp_path / "none.jsonl"
    assert verify_chain(path).status == "intact"
    assert verify_chain(path, [Anchor(GENESIS, 0)]).status == "intact"
    result = verify_chain(path, [pristine[1][-1]])
    assert (result.status, result.kind) == ("tampered", "missing")
    path.write_bytes(b"")
    assert verify_chain(path, [pristine[1][-1]]).kind == "truncate"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_bytes_before_an_anchor_is_found(tmp_path: Path, pristine: Pristine, data: st.DataObject) -> None:
    """Replace, cut out or put in any bytes anywhere: never intact, and never at a record after the change."""
    lines, anchors = pristine
    whole = b"".join(line + b"\n" for line in lines)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 40)))
    put = data.draw(st.binary(max_size=20))
    spoiled = whole[:start] + put + whole[end:]
    if spoiled == whole:
        return
    path = tmp_path / "chain.jsonl"
    path.write_bytes(spoiled)
    result = verify_chain(path, [anchors[-1]], run_id="run", rank=0)
    if spoiled.startswith(whole):
        # Only something after the attested records: no lie about them. A torn tail or a bad one.
        assert result.status in ("torn", "tampered")
        return
    assert result.status == "tampered"
    assert result.first_bad is not None
    assert result.first_bad <= spoiled[: start + len(put)].count(b"\n") + 1


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.integers(0, COUNT - 1), max_size=COUNT + 3))
def test_any_choice_of_lines_but_the_right_one_is_found(tmp_path: Path, pristine: Pristine, order: list[int]) -> None:
    lines, anchors = pristine
    result = _judge(tmp_path, [lines[index] for index in order], [anchors[-1]])
    assert (result.status == "intact") == (order == list(range(COUNT)))


@pytest.mark.parametrize("skipped", ["hash", "bytes"])
def test_the_tests_above_would_see_a_skipped_check(
    tmp_path: Path, pristine: Pristine, skipped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutants of the verifier: without the hash, or without the byte form, an edit passes."""
    lines = list(pristine[0])
    if skipped == "hash":
        lines[3] = _changed(lines[3], rehash=False, value="fwd")
        monkeypatch.setattr(verify, "sealed", lambda record: (record["hash"], sealed(record)[1]))
    else:
        lines[3] = lines[3].replace(b'":', b'": ', 1)
        monkeypatch.setattr(verify, "sealed", lambda record: (sealed(record)[0], lines[record["seq"]]))
    assert _judge(tmp_path, lines).status == "intact"
    monkeypatch.undo()
    assert _judge(tmp_path, lines).status == "tampered"
