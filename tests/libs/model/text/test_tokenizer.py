"""Byte-exact round trips, special tokens kept apart from text that spells them, refusal of foreign tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.flags.errors import UserError
from libs.model.text.tokenizer import SPECIAL_TOKENS, Tokenizer

SOURCE = b"""
#include <vector>
namespace a::b {
template <typename T> static inline int64_t count(const std::vector<T>& values, int first = 0x1F) {
    int64_t total = 0;
\tfor (auto it = values.begin(); it != values.end(); ++it) {
        if (it->size() >= 1234567 && first <= 3) { total += it->size(); }  // a comment
    }
    return total;
}
}  // namespace a::b
"""
TEXTS = [SOURCE.replace(b"count", b"count_%d" % i).replace(b"total", b"sum%d" % (i % 7)) for i in range(40)]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train(TEXTS, 500)


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return Tokenizer.bytes_tokenizer()


ANY_BYTES = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.lists(
        st.sampled_from([*SPECIAL_TOKENS, "\r\n", "\n\t  ", "    ", "::", "->", '"\\n"', "0x1f", "π", "\ufeff"]),
        max_size=20,
    ).map(lambda parts: "".join(parts).encode()),
)


@settings(max_examples=200, deadline=None)
@given(raw=ANY_BYTES)
def test_any_bytes_come_back(bpe: Tokenizer, plain: Tokenizer, raw: bytes) -> None:
    for tokenizer in (bpe, plain):
        ids = tokenizer.encode(raw)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == raw
        assert int(tokenizer.token_bytes[ids].sum()) == len(raw)
        assert not set(ids.tolist()) & set(tokenizer.special_ids.values())


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(ANY_BYTES, max_size=6))
def test_a_batch_is_its_texts_one_by_one(bpe: Tokenizer, texts: list[bytes]) -> None:
    for ids, text in zip(bpe.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, bpe.encode(text))


def test_real_source_is_shorter_than_its_bytes_and_exact(bpe: Tokenizer) -> None:
    ids = bpe.encode(SOURCE)
    assert bpe.decode(ids) == SOURCE
    assert ids.size < len(SOURCE) / 2


def test_text_that_spells_a_special_token_stays_text_after_loading(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    for name in SPECIAL_TOKENS:
        ids = loaded.encode(f"x {name} y")
        assert loaded.special_ids[name] not in ids.tolist()
        assert loaded.decode(ids) == f"x {name} y".encode()


def test_special_ids_stand_for_no_bytes_and_are_the_same_everywhere(bpe: Tokenizer, plain: Tokenizer) -> None:
    assert bpe.special_ids == plain.special_ids == {name: i for i, name in enumerate(SPECIAL_TOKENS)}
    assert bpe.decode([bpe.eod_id, *bpe.encode(b"ab").tolist(), bpe.pad_id]) == b"ab"
    assert not bpe.token_bytes[: len(SPECIAL_TOKENS)].any()
    assert (bpe.token_bytes[len(SPECIAL_TOKENS) :] > 0).all()
    assert plain.vocab_size == 256 + len(SPECIAL_TOKENS)


def test_generated_ids_beyond_the_vocabulary_stand_for_no_bytes(bpe: Tokenizer) -> None:
    ids = bpe.encode(b"int x;").tolist()
    padded = [ids[0], bpe.vocab_size, *ids[1:], bpe.vocab_size + 40]
    assert bpe.decode_generated(padded) == b"int x;"
    with pytest.raises(IndexError):
        bpe.decode(padded)


def test_surrogate_escapes_are_the_bytes_they_stand_for(bpe: Tokenizer) -> None:
    raw = b"caf\xe9.h"
    np.testing.assert_array_equal(bpe.encode(raw.decode("utf-8", "surrogateescape")), bpe.encode(raw))


def test_the_pre_tokenizer_keeps_cpp_together_and_lines_apart(bpe: Tokenizer) -> None:
    pieces = [bpe.piece(i) for i in bpe.encode(SOURCE).tolist()]
    assert b"::" in pieces
    assert b"->" in pieces
    assert any(piece.startswith(b"\n        ") and not piece.strip() for piece in pieces)
    for i in range(bpe.vocab_size):
        if i not in bpe.special_ids.values():
            piece = bpe.piece(i)
            letters = any(chr(b).isalpha() for b in piece)
            assert not (b"\n" in piece and letters), f"{piece!r} joins two lines"
            assert len(piece) <= 40


def test_training_twice_and_loading_give_the_same_fingerprint(bpe: Tokenizer) -> None:
    again = Tokenizer.train(TEXTS, 500)
    assert again.fingerprint == bpe.fingerprint == Tokenizer.from_json(bpe.to_json()).fingerprint
    assert Tokenizer.train(TEXTS, 300).fingerprint != bpe.fingerprint


def _mutated(tokenizer: Tokenizer, change: str) -> str:
    definition = json.loads(tokenizer.to_json())
    if change == "special missing":
        definition["added_tokens"] = definition["added_tokens"][1:]
    elif change == "special unknown":
        added = dict(definition["added_tokens"][0], id=tokenizer.vocab_size, content="<|other|>")
        definition["added_tokens"].append(added)
    elif change == "byte missing":
        vocab = definition["model"]["vocab"]
        vocab["zzzz"] = vocab.pop("~")
    elif change == "not byte-level":
        definition["pre_tokenizer"] = {"type": "Whitespace"}
    return json.dumps(definition)


@pytest.mark.parametrize("change", ["special missing", "special unknown", "byte missing", "not byte-level"])
def test_a_tokenizer_that_cannot_be_byte_exact_is_refused(bpe: Tokenizer, change: str) -> None:
    with pytest.raises(UserError):
        Tokenizer.from_json(_mutated(bpe, change))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "WordPiece"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer"):
        Tokenizer.load(tmp_path / "t.json")


def test_a_missing_file_and_a_tiny_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="more than 272"):
        Tokenizer.train(TEXTS, 272)
