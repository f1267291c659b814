"""Byte-exact tokenizer for C++: byte-level BPE with a C++-aware pre-tokenizer, or plain bytes.

For turning any bytes into ids and back. Not for the layout of documents (see `document`): here the special
tokens are only names with ids, and text that spells one of them is ordinary text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError
from tokenizers import AddedToken, Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as _Backend

from libs.flags.errors import UserError

Ids = npt.NDArray[np.int32]

EOD = "<|eod|>"
PAD = "<|pad|>"
FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
PATH, CODE = "<|path|>", "<|code|>"
CALLERS, TARGET, CALLEES = "<|callers|>", "<|target|>", "<|callees|>"
FILE, UNIT = "<|file|>", "<|unit|>"
# Ids 0..15 in this order, in every vocabulary; the reserved ones keep later additions from moving the bytes.
SPECIAL_TOKENS: tuple[str, ...] = (
    EOD, PAD, FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, PATH, CODE, CALLERS, TARGET, CALLEES, FILE, UNIT,
    *(f"<|reserved_{i}|>" for i in range(4)),
)  # fmt: skip

# One alternative per kind of C++ text, first match wins. The limits keep rulers of stars out of the
# vocabulary.
CPP_PATTERN = "|".join(
    (
        r"(?:\r?\n){1,2}[ \t]{0,32}",  # line ends with the indentation that follows
        r" ?#[ \t]{0,8}[a-z_]{1,16}",  # directives
        r"0[xXbB](?=[0-9a-fA-F])",  # prefix of a literal
        r"\p{N}{1,3}",  # digits in threes, so that numbers stay countable
        r" ?[\p{L}_][\p{L}\p{N}_]*",  # identifiers and keywords
        r" ?(?:/{2,8}|/\*{1,8}|\*{1,8}/)",  # comment signs
        r" ?(?:::|->\*?|<=>|<<=|>>=|\.\.\.|&&|\|\||\+\+|--|<<|>>|##|[-+*/%&|^<>=!]=)",  # operators
        r" ?[(){}\[\];,]{1,8}",
        r" ?\\[abfnrtv0\\'\"]",  # escapes
        r"[*=\-#~]{1,16}",
        r" ?[^\s\p{L}\p{N}_]",
        r"[ \t]{1,16}(?=[ \t])",
        r"\s",
    )
)
_PROBE = bytes(range(256)) + b"int main() {\n    return a->b::c(0x1F);  // <|eod|>\r\n}\n" + "π\u2028".encode()
_BATCH_BYTES = 2_000_000


class _Bpe(BaseModel):
    type: Literal["BPE"]
    vocab: dict[str, int]
    merges: list[tuple[str, str]]


class _Definition(BaseModel):
    """What a definition must have at least; its other keys are the extension's business."""

    added_tokens: list[dict[str, Any]]
    pre_tokenizer: dict[str, Any]
    model: _Bpe


class Tokenizer:
    """Encodes any bytes to ids and back, byte for byte.

    Attributes:
        vocab_size: number of ids, special tokens included.
        token_bytes: (vocab_size,) int32, bytes each id stands for; 0 for special tokens.
        fingerprint: sha256 of the canonical definition.
        special_ids: name -> id of every special token.
        eod_id, pad_id: ids of the end-of-document and padding tokens.
    """

    def __init__(self, backend: _Backend, origin: str) -> None:
        self._backend = backend
        # Text that spells a special token must stay text; the property is not stored in tokenizer.json.
        backend.encode_special_tokens = True
        self.special_ids, self._pieces = _vocabulary(backend, origin)
        self._special = {token_id: name for name, token_id in self.special_ids.items()}
        self.vocab_size = len(self._pieces)
        self.eod_id, self.pad_id = self.special_ids[EOD], self.special_ids[PAD]
        self.token_bytes = np.array([len(piece) for piece in self._pieces], dtype=np.int32)
        by_piece = {piece: i for i, piece in enumerate(self._pieces) if i not in self._special}
        self._byte_ids = np.array([by_piece[bytes([b])] for b in range(256)], dtype=np.int32)
        self._plain = self.vocab_size == 256 + len(self._special)
        definition = json.dumps(json.loads(backend.to_str()), sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(definition.encode()).hexdigest()
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(f"tokenizer {origin} does not give back the bytes it was given; use a byte-level one")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`. Raises UserError:
        unreadable, no byte-level BPE, or without our special tokens.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read a tokenizer from {path}: {error}") from error
        return cls.from_json(text, origin=str(path))

    @classmethod
    def from_json(cls, text: str, origin: str = "tokenizer.json") -> Tokenizer:
        """Build from the text of a `tokenizer.json`. The shape is checked here:
        the extension's own errors have no type.
        """
        try:
            _Definition.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise UserError(f"{origin} is not a byte-level BPE tokenizer: {where}: {first['msg']}") from error
        return cls(_Backend.from_str(text), origin)

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int) -> Tokenizer:
        """Train byte-level BPE on UTF-8 `texts`;
        the vocabulary may come out smaller when the text runs out of pairs.
        """
        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size <= least:
            raise UserError(f"vocabulary of {vocab_size}: a BPE needs more than {least} (bytes and special tokens)")
        backend = _empty_backend({}, [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=32,
            show_progress=False,
        )
        backend.train_from_iterator((text.decode("utf-8") for text in texts), trainer)
        return cls(backend, "trained here")

    @classmethod
    def bytes_tokenizer(cls) -> Tokenizer:
        """One id per byte: 16 special tokens, then the 256 bytes."""
        names = [*SPECIAL_TOKENS, *(_BYTE_TO_CHAR[b] for b in range(256))]
        backend = _empty_backend({name: i for i, name in enumerate(names)}, [])
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
        return cls(backend, "bytes")

    def to_json(self) -> str:
        """The definition, to be stored as `tokenizer.json`."""
        return str(self._backend.to_str(pretty=False))

    def save(self, path: str | Path) -> None:
        """Write the definition to `path`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def encode(self, text: str | bytes) -> Ids:
        """Ids (n,) of `text`. A str is taken as UTF-8 (surrogate escapes as the bytes they stand for)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[Ids]:
        """Ids of each text, on all cores. Ill-formed UTF-8 is encoded byte by byte, the rest as usual."""
        raws = [t.encode("utf-8", "surrogateescape") if isinstance(t, str) else t for t in texts]
        if self._plain:
            return [self._byte_ids[np.frombuffer(raw, dtype=np.uint8)] for raw in raws]
        segments = [list(_utf8_runs(raw)) for raw in raws]
        runs = [run for parts in segments for run in parts if isinstance(run, str)]
        encoded = iter(self._encode_runs(runs))
        return [
            _join([next(encoded) if isinstance(p, str) else self._byte_ids[list(p)] for p in parts])
            for parts in segments
        ]

    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> bytes:
        """The bytes that `ids` stand for; special tokens stand for none."""
        values = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        return b"".join(b"" if i in self._special else self._pieces[i] for i in values)

    def decode_generated(self, ids: Iterable[int]) -> bytes:
        """As `decode`; ids that only the model has stand for no bytes, since its vocabulary may be padded."""
        return self.decode(i for i in ids if i < self.vocab_size)

    def piece(self, token_id: int) -> bytes:
        """The bytes of one id, or the name of a special token (for showing)."""
        return self._pieces[token_id] if token_id not in self._special else self.name_of(token_id).encode()

    def name_of(self, special_id: int) -> str:
        """The name of a special id."""
        return self._special[special_id]

    def _encode_runs(self, runs: list[str]) -> list[Ids]:
        """Ids of well-formed runs, a few megabytes at a time: an Encoding weighs far more than its ids."""
        result: list[Ids] = []
        start = size = 0
        for end, run in enumerate(runs, start=1):
            size += len(run)
            if size >= _BATCH_BYTES or end == len(runs):
                batch = self._backend.encode_batch_fast(runs[start:end], add_special_tokens=False)
                result += [np.array(encoding.ids, dtype=np.int32) for encoding in batch]
                start, size = end, 0
        return result


def _join(parts: list[Ids]) -> Ids:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def _utf8_runs(raw: bytes) -> Iterator[str | bytes]:
    """Well-formed runs as str, ill-formed bytes between them as bytes; together they are `raw`."""
    while raw:
        try:
            yield raw.decode("utf-8")
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield raw[: error.start].decode("utf-8")
            yield raw[error.start : error.end]
            raw = raw[error.end :]


def _empty_backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> _Backend:
    backend = _Backend(models.BPE(vocab=vocab, merges=merges))
    split = pre_tokenizers.Split(Regex(CPP_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return backend


def _byte_to_char() -> dict[int, str]:
    """GPT-2's reversible byte alphabet:
    printable bytes stand for themselves, the others for U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


_BYTE_TO_CHAR = _byte_to_char()
_CHAR_TO_BYTE = {char: byte for byte, char in _BYTE_TO_CHAR.items()}


def _vocabulary(backend: _Backend, origin: str) -> tuple[dict[str, int], list[bytes]]:
    """Ids of the special tokens and the bytes of every id; refuses what cannot be byte exact."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing, unknown = set(SPECIAL_TOKENS) - added, added - set(SPECIAL_TOKENS)
    if missing or unknown:
        raise UserError(
            f"tokenizer {origin}: special tokens missing {sorted(missing)}, unknown {sorted(unknown)}; "
            f"the tokenizer must be one that `fathom data build` wrote"
        )
    vocab = backend.get_vocab(with_added_tokens=True)
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"tokenizer {origin}: ids are not 0..{len(vocab) - 1}")
    pieces = [b""] * len(vocab)
    for name, token_id in vocab.items():
        if name not in added:
            if any(char not in _CHAR_TO_BYTE for char in name):
                raise UserError(f"tokenizer {origin}: token {name!r} is not byte-level")
            pieces[token_id] = bytes(_CHAR_TO_BYTE[char] for char in name)
    absent = 256 - len({piece for piece in pieces if len(piece) == 1})
    if absent:
        raise UserError(f"tokenizer {origin}: {absent} of the 256 single bytes are not in the vocabulary")
    return {name: vocab[name] for name in SPECIAL_TOKENS}, pieces
