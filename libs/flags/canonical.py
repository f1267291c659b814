"""One byte form per JSON value, so that equal records have equal hashes; one text form for times.

Not a general encoder: non-finite numbers and anything that JSON lacks are refused. What it writes, every reader takes.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

# One for all calls: making it takes as long as using it, and a chain has its records encoded one by one.
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
# How every surrogate begins in such a text, those of a pair included.
_SURROGATE = "\\ud"


def printable(text: str) -> str:
    """`text` in UTF-8 whatever it is: a byte that is not, say b"\\xe9" in a file's name, shows as \\udce9."""
    return text.encode("utf-8", "backslashreplace").decode()


def recordable(value: Any) -> Any:
    """`value` (text, or JSON of it) as a record can hold it: a lone surrogate becomes the six characters "\\udcff".

    That is how Python holds a byte of the command line or of a variable that is not UTF-8, and strict JSON has no form
    for it: written as it is, the line could never be read again.
    """
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {recordable(name): recordable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [recordable(entry) for entry in value]
    return value


def encode(encoder: json.JSONEncoder, value: object) -> bytes:
    """The bytes of `value` by an encoder to ASCII, its texts made `recordable` where they are not: all records use it.

    Raises:
        ValueError: a number that is not finite. TypeError: a value that JSON has no form for.
    """
    text = encoder.encode(value)
    return (encoder.encode(recordable(value)) if _SURROGATE in text else text).encode("ascii")


def canonical_json(value: object) -> bytes:
    """Sorted keys, no spaces, ASCII only. Raises as `encode`."""
    return encode(_ENCODER, value)


def sha256_hex(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def hash_json(value: object) -> str:
    """SHA-256, in hex, of the canonical form."""
    return sha256_hex(canonical_json(value))


def utc_now() -> str:
    """The time as RFC 3339 in UTC with microseconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
