"""Files that should hold one record: each thing that can be wrong with one becomes the same kind of sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, model_validator

from apps.eval.reading import read_record
from libs.flags.errors import UserError


class Shares(BaseModel):
    parts: dict[str, float]

    @model_validator(mode="after")
    def _of_a(self) -> Shares:
        assert self.parts["b"] / self.parts["a"] < 2, "b is too large"
        return self


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read the share {}: No such file or directory; make one"),
        ("", "{} is no share: the file: Invalid JSON"),
        ("[" * 100_000, "{} is no share: the file: Invalid JSON"),
        ('{"parts": {"a": "x"}}', "{} is no share: parts.a: Input should be a valid number"),
        ('{"parts": {"a": 1, "b": 3}}', "{} is no share: the file: Assertion failed, b is too large"),
        ('{"parts": {"a": 1}}', "{} is no share: what it states cannot be worked out: KeyError('b'); make one"),
        ('{"parts": {"a": 0, "b": 1}}', "{} is no share: what it states cannot be worked out: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_is_said(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "shares.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as refused:
        read_record(path, Shares, "share", hint="make one")
    assert str(refused.value).startswith(said.format(path))
    assert str(refused.value).endswith("; make one")


def test_a_sound_record_is_read(tmp_path: Path) -> None:
    (tmp_path / "shares.json").write_text('{"parts": {"a": 1, "b": 1.5}}')
    assert read_record(tmp_path / "shares.json", Shares, "share").parts == {"a": 1, "b": 1.5}
