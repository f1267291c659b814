"""Tokens in, text out: nothing is given out before it is certain to stay.

A token may end inside a character, and inside what may become a stop string; both are held back. Not for scheduling or
HTTP: this is arithmetic on strings.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from libs.model.text.tokenizer import Tokenizer


class TokenText(NamedTuple):
    """A generated token. text: its bytes, `bytes:\\xe2` when they are no whole characters. logprob: natural logarithm.

    offset: the character of the completion in which the token begins.
    """

    text: str
    logprob: float
    offset: int


class Piece(NamedTuple):
    """Text that is now certain, and the tokens that begin in it."""

    text: str
    tokens: tuple[TokenText, ...]


class TextStream:
    """The text of one completion, as it grows. Bytes that are not UTF-8 become U+FFFD.

    The stop string that is complete first ends the text, whatever the cuts between tokens; of two that are complete at
    the same character, the longer one. Neither it nor any part of it is given out, nor the tokens that begin in it.

    Attributes:
        stopped: a stop string has been found; further tokens change nothing.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoded = self._released = 0
        self._held = ""
        self._tokens: deque[TokenText] = deque()
        self.stopped = False

    def push(self, token: int, logprob: float) -> Piece:
        """Take one token; gives out what is now certain, often nothing."""
        if self.stopped:
            return Piece("", ())
        raw = self._tokenizer.decode_generated([token])
        self._tokens.append(TokenText(self._shown(token, raw), logprob, self._decoded))
        return self._take(self._decoder.decode(raw))

    def finish(self) -> Piece:
        """No token will follow: gives out what was held back. Half a character becomes U+FFFD."""
        if self.stopped:
            return Piece("", ())
        last = self._take(self._decoder.decode(b"", final=True))
        if self.stopped:
            return last
        rest = self._release(len(self._held))
        return Piece(last.text + rest.text, last.tokens + rest.tokens)

    def _take(self, text: str) -> Piece:
        self._decoded += len(text)
        self._held += text
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found)[1])
        return self._release(len(self._held) - self._open_end())

    def _open_end(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        return max((_overlap(self._held, stop) for stop in self._stops), default=0)

    def _release(self, count: int) -> Piece:
        text, self._held = self._held[:count], self._held[count:]
        self._released += count
        tokens = []
        while self._tokens and self._tokens[0].offset < self._released:
            tokens.append(self._tokens.popleft())
        return Piece(text, tuple(tokens))

    def _shown(self, token: int, raw: bytes) -> str:
        if token >= self._tokenizer.vocab_size:
            return f"<|{token}|>"
        raw = raw or self._tokenizer.piece(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
