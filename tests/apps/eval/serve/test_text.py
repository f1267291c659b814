"""Text as it grows equals text at once; nothing that may have to be taken back is given out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.eval.serve.text import TextStream
from libs.model.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes_tokenizer()
# Its tokens are up to sixteen letters long.
LONG = Tokenizer.train([b"abbabaab" * 4 + b" " + b"aabbab" * 5 + b" abba"] * 9, 300)
CHARACTERS = st.sampled_from([*"ab\n", "ä", "€", "𝄞", "\u2028"])
RAW = st.lists(st.one_of(CHARACTERS.map(str.encode), st.binary(min_size=1, max_size=2)), max_size=24).map(b"".join)
STOPS = st.lists(st.text(CHARACTERS, min_size=1, max_size=4), max_size=3)


def plain(raw: bytes, stops: list[str]) -> str:
    """The rule, spelt out: at each character, has a stop string just become complete?"""
    text = raw.decode("utf-8", errors="replace")
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_the_cuts_between_tokens_make_no_difference(text: str, stops: list[str]) -> None:
    ids = LONG.encode(text).tolist()
    stream = TextStream(LONG, stops)
    so_far = "".join(stream.push(token, 0.0).text for token in ids)
    assert so_far + stream.finish().text == plain(text.encode(), stops)


@settings(max_examples=400, deadline=None)
@given(RAW, STOPS)
def test_streamed_text_is_the_whole_text_up_to_the_first_stop(raw: bytes, stops: list[str]) -> None:
    stream = TextStream(BYTES, stops)
    wanted = plain(raw, stops)
    so_far = ""
    for token in BYTES.encode(raw).tolist():
        so_far += stream.push(token, 0.0).text
        assert wanted.startswith(so_far), "given out and then not part of the text"
        so_far.encode("utf-8")
    so_far += stream.finish().text
    assert so_far == wanted
    assert stream.stopped == any(stop in raw.decode("utf-8", errors="replace") for stop in stops)
    if stream.stopped:
        assert stream.push(BYTES.encode(b"x").tolist()[0], 0.0) == ("", ())


@settings(max_examples=200, deadline=None)
@given(RAW, STOPS)
def test_tokens_are_those_that_begin_in_the_text(raw: bytes, stops: list[str]) -> None:
    stream = TextStream(BYTES, stops)
    ids = BYTES.encode(raw).tolist()
    text, tokens = "", []
    for place, token in enumerate(ids):
        piece = stream.push(token, float(place))
        text += piece.text
        tokens += piece.tokens
        assert all(given.offset < len(text) for given in tokens), "a token of text that is still held back"
    piece = stream.finish()
    text, tokens = text + piece.text, tokens + list(piece.tokens)
    assert [token.logprob for token in tokens] == [float(place) for place in range(len(tokens))]
    if "\ufffd" not in raw.decode("utf-8", errors="replace"):
        begins = [len(raw[:place].decode("utf-8", errors="ignore")) for place in range(len(ids))]
        assert [token.offset for token in tokens] == [begin for begin in begins if begin < len(text)]


def test_a_character_is_given_out_with_its_last_byte() -> None:
    stream = TextStream(BYTES)
    texts = [stream.push(token, 0.0).text for token in BYTES.encode("€").tolist()]
    assert texts == ["", "", "€"]
    half = TextStream(BYTES)
    for token in BYTES.encode("€".encode()[:2]).tolist():
        assert half.push(token, 0.0).text == ""
    assert half.finish().text == "\ufffd"


@pytest.mark.parametrize(
    ("stops", "text", "wanted"),
    [
        (["abcd", "bc"], "xabcd", "xa"),
        (["bc", "abc"], "xabcd", "x"),
        (["aab"], "aaab", "a"),
        (["abab"], "abaabab", "aba"),
        (["END"], "the EN and EN", "the EN and EN"),
    ],
)
def test_the_stop_that_is_complete_first_ends_the_text(stops: list[str], text: str, wanted: str) -> None:
    tokens = BYTES.encode(text).tolist()
    stream = TextStream(BYTES, stops)
    pieces = [stream.push(token, 0.0).text for token in tokens]
    assert "".join(pieces) + stream.finish().text == wanted
    assert stream.stopped == (wanted != text)


def test_tokens_without_text_and_tokens_of_half_a_character_can_be_shown() -> None:
    stream = TextStream(BYTES)
    shown = []
    for token in [BYTES.special_ids["<|code|>"], *BYTES.encode("ä").tolist(), BYTES.vocab_size + 3]:
        shown += stream.push(token, -1.0).tokens
    shown += stream.push(BYTES.encode("z").tolist()[0], -1.0).tokens
    assert [token.text for token in shown] == [
        "<|code|>",
        "bytes:\\xc3",
        "bytes:\\xa4",
        f"<|{BYTES.vocab_size + 3}|>",
        "z",
    ]
    assert [token.offset for token in shown] == [0, 0, 0, 1, 1]


def test_longer_tokens_are_cut_at_the_stop_inside_them() -> None:
    assert len(LONG.encode("abbabaab" * 4)) < 8
    tokenizer = Tokenizer.train([b"int main() { return 0; }\n" * 50], 300)
    ids = tokenizer.encode("int main() { return 0; }").tolist()
    assert len(ids) < 20
    stream = TextStream(tokenizer, ["turn"])
    text = "".join(stream.push(token, 0.0).text for token in ids) + stream.finish().text
    assert text == "int main() { re"
