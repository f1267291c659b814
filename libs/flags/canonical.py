"""One byte form per JSON value, so that equal records have equal hashes; one text form for times.

Not a general encoder: non-finite numbers and anything that JSON lacks are refused.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime

# One for all calls: making it takes as long as using it, and a chain has its records encoded one by one.
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical_json(value: object) -> bytes:
    """Sorted keys, no spaces, ASCII only.

    Raises:
        ValueError: a number that is not finite. TypeError: a value that JSON has no form for.
    """
    return _ENCODER.encode(value).encode("ascii")


def sha256_hex(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def hash_json(value: object) -> str:
    """SHA-256, in hex, of the canonical form."""
    return sha256_hex(canonical_json(value))


def utc_now() -> str:
    """The time as RFC 3339 in UTC with microseconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
