"""Names the licence of one file: SPDX tag, else the wording of its header, else what its package declares.

For the record kept with every document. Not legal advice, and nothing is filtered by it.
"""

from __future__ import annotations

import re

UNKNOWN = "unknown"
_SPDX = re.compile(rb"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+\- ()]+)")
_HEAD_BYTES = 6_000
# Wording -> name; the first that occurs wins, so the specific ones come first.
_WORDING: tuple[tuple[str, str], ...] = (
    ("apache license v2.0 with llvm exceptions", "Apache-2.0 WITH LLVM-exception"),
    ("gnu lesser general public license", "LGPL"),
    ("gnu affero general public license", "AGPL"),
    ("gcc runtime library exception", "GPL-3.0 WITH GCC-exception-3.1"),
    ("gnu general public license", "GPL"),
    ("boost software license", "BSL-1.0"),
    ("mozilla public license", "MPL-2.0"),
    ("apache license, version 2.0", "Apache-2.0"),
    ("apache license version 2.0", "Apache-2.0"),
    ("the university of illinois/ncsa", "NCSA"),
    ("permission is hereby granted, free of charge", "MIT"),
    ("licensed under the mit license", "MIT"),
    ("mit license", "MIT"),
    ("neither the name of", "BSD-3-Clause"),
    ("neither the names of", "BSD-3-Clause"),
    ("3-clause bsd", "BSD-3-Clause"),
    ("redistribution and use in source and binary forms", "BSD-2-Clause"),
    ("bsd-style license", "BSD"),
    ("nvidia corporation and its licensors retain all intellectual property", "NVIDIA-proprietary"),
)
_NOISE = re.compile(r"[\s*/#;]+")


def from_wording(text: str) -> str | None:
    """The licence whose wording occurs in `text`, comment signs and line breaks aside."""
    flat = _NOISE.sub(" ", text).lower()
    return next((name for wording, name in _WORDING if wording in flat), None)


def licence_of(text: bytes, package: str | None) -> str:
    """SPDX-like name of the licence of a file with content `text` in a package that declares `package` (a name or a
    licence's text); "unknown" when nothing says."""
    head = text[:_HEAD_BYTES]
    tag = _SPDX.search(head)
    if tag is not None:
        return tag.group(1).decode().strip()
    named = from_wording(head.decode("utf-8", "replace"))
    if named is not None:
        return named
    if package is None:
        return UNKNOWN
    short = package if len(package) < 80 and "\n" not in package else None
    return from_wording(package) or short or UNKNOWN
