"""The hybrid layout is one string: this parser turns it into layer kinds, and shows where it is wrong.

`M` Mamba-3 mixer, `*` attention, `-` gated MLP, `E` mixture of experts; every character is one pre-norm
residual block. A `/` starts one multi-token-prediction depth: "M-M-*-/*-" has a trunk of six blocks and one
MTP depth of two. Not for widths (see `config`) nor for building modules (see `block`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from libs.flags.errors import UserError

MAX_MTP_DEPTH = 2
SEPARATOR = "/"


class LayerKind(StrEnum):
    """One residual block; the value is its character in the pattern."""

    MAMBA = "M"
    ATTENTION = "*"
    MLP = "-"
    MOE = "E"


class Pattern(NamedTuple):
    """A parsed pattern: the trunk, and one tuple of blocks per MTP depth (none, one or two)."""

    trunk: tuple[LayerKind, ...]
    mtp: tuple[tuple[LayerKind, ...], ...]

    @property
    def kinds(self) -> frozenset[LayerKind]:
        """Every kind that occurs, trunk and MTP together."""
        return frozenset(self.trunk).union(*self.mtp)

    def __str__(self) -> str:
        return SEPARATOR.join("".join(part) for part in (self.trunk, *self.mtp))


def _refuse(text: str, position: int, problem: str) -> UserError:
    kinds = ", ".join(f"{kind.value!r} {kind.name.lower()}" for kind in LayerKind)
    return UserError(
        f"layer pattern: {problem} at position {position}\n"
        f"  {text}\n"
        f"  {' ' * position}^\n"
        f"allowed: {kinds}, and {SEPARATOR!r} before each MTP depth (at most {MAX_MTP_DEPTH})"
    )


def parse_pattern(text: str) -> Pattern:
    """Parse e.g. "M-M-*-/*-".

    Raises:
        UserError: an unknown character, an empty trunk or MTP depth, or too many depths; the message points
            at it.
    """
    parts: list[list[LayerKind]] = [[]]
    known = {kind.value: kind for kind in LayerKind}
    for position, character in enumerate(text):
        if character == SEPARATOR:
            if not parts[-1]:
                raise _refuse(text, position, "nothing before this separator")
            if len(parts) > MAX_MTP_DEPTH:
                raise _refuse(text, position, f"more than {MAX_MTP_DEPTH} MTP depths")
            parts.append([])
        elif character in known:
            parts[-1].append(known[character])
        else:
            raise _refuse(text, position, f"unknown layer {character!r}")
    if not parts[-1]:
        what = "the pattern is empty" if not text else "nothing after the last separator"
        raise _refuse(text, len(text), what)
    return Pattern(tuple(parts[0]), tuple(tuple(part) for part in parts[1:]))


def not_built(text: str, kind: LayerKind) -> UserError:
    """The error for a kind that parses but cannot be built, pointing at its first occurrence."""
    return _refuse(text, text.index(kind.value), f"{kind.name.lower()} blocks ({kind.value!r}) are not built yet")
