"""Documents read back as they were written, and spans that point at the code."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from libs.model.text.document import MARKERS, ReadSection, Role, Section, assemble, overhead, read_sections
from libs.model.text.tokenizer import SPECIAL_TOKENS, Tokenizer

TOKENIZER = Tokenizer.bytes_tokenizer()
PARTS = st.lists(
    st.tuples(
        st.sampled_from(list(Role)),
        st.text(min_size=1, max_size=8),
        st.one_of(st.binary(max_size=20), st.sampled_from(SPECIAL_TOKENS).map(str.encode)),
    ),
    min_size=1,
    max_size=6,
)


def sections_of(parts: list[tuple[Role, str, bytes]]) -> list[Section]:
    return [Section(role, path, TOKENIZER.encode(path), TOKENIZER.encode(code)) for role, path, code in parts]


@settings(max_examples=100, deadline=None)
@given(parts=PARTS)
def test_what_is_assembled_is_read_back(parts: list[tuple[Role, str, bytes]]) -> None:
    sections = sections_of(parts)
    ids, spans = assemble(TOKENIZER, sections)
    assert ids[-1] == TOKENIZER.eod_id
    assert (ids == TOKENIZER.eod_id).sum() == 1
    assert read_sections(TOKENIZER, ids) == [ReadSection(*part) for part in parts]
    assert ids.size <= 1 + sum(overhead(s) + s.code_ids.size for s in sections)
    for span, (role, path, code) in zip(spans, parts, strict=True):
        assert (span.role, span.path) == (role, path)
        assert TOKENIZER.decode(ids[span.start : span.end]) == code


def test_a_role_is_marked_once_and_a_cut_document_is_still_readable() -> None:
    parts = [
        (Role.CALLERS, "a.h", b"a()"),
        (Role.CALLERS, "b.h", b"b()"),
        (Role.TARGET, "c.cc", b"c()"),
        (Role.CALLEES, "d.h", b"d()"),
    ]
    ids, spans = assemble(TOKENIZER, sections_of(parts))
    marker = TOKENIZER.special_ids[MARKERS[Role.CALLERS]]
    assert ids.tolist().count(marker) == 1
    cut = read_sections(TOKENIZER, ids[: spans[2].start + 1])
    assert cut[-1] == ReadSection(Role.TARGET, "c.cc", b"c")
