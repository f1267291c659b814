"""Odd but possible files through a whole build: kept byte for byte, or left out with the reason counted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from libs.model.text.document import Kind, read_sections
from libs.model.text.shards import DataDir

Fathom = Callable[..., int]


def code(name: str) -> bytes:
    return b"".join(b"int %s%d(int left) {\n  return left * %d;\n}\n" % (name.encode(), i, i * 31) for i in range(9))


KEPT = {
    "crlf.cc": code("crlf").replace(b"\n", b"\r\n"),
    "cr.cc": code("cr").replace(b"\n", b"\r"),
    "bom.cc": b"\xef\xbb\xbf" + code("bom"),
    "control.cc": code("control") + b"// \x01\x0b\x0c\x1a\x7f \xe2\x80\xa8 \xc2\x85\n",
    "operator.cc": code("op") + "int operator中(int a) { return operatoré(a); }\n".encode(),
    "名 前.cc": code("name"),
    "new\nline.cc": code("newline"),
    "<|file|>.cc": code("special"),
}
LEFT_OUT = {
    "nul.cc": (code("nul") + b"\0", "binary"),
    "utf16.cc": (code("wide").decode().encode("utf-16"), "binary"),
    "invalid.cc": (code("invalid") + b"// \xff\xfe\n", "not_utf8"),
    "wide.cc": (b"int x[] = {" + b"x," * 5_000_000 + b"};\n", "too_large"),
    "line.cc": (b"int x[] = {" + b"x," * 50_000 + b"};\n", "long_line"),
    "empty.cc": (b"", "tiny"),
}


def test_odd_files_are_kept_whole_or_counted(repositories: Path, tmp_path: Path, build: Fathom) -> None:
    for name, text in {**KEPT, **{name: text for name, (text, _) in LEFT_OUT.items()}}.items():
        (repositories / "ant" / name).write_bytes(text)
    (repositories / "ant" / os.fsdecode(b"\xff.cc")).write_bytes(code("badname"))
    (repositories / "ant" / "folder.cc").mkdir()
    (repositories / "ant" / "loop").symlink_to("..")
    (repositories / "ant" / "self.cc").symlink_to("self.cc")
    (repositories / "ant" / "dangling.cc").symlink_to("nowhere.cc")
    (repositories / "nothing").mkdir()
    os.mkfifo(repositories / "ant" / "pipe.cc")
    out = tmp_path / "out"
    assert build(repositories, out, "--valid-packages", "bee", "--mix", "file=1,callgraph=1,unit=1") == 0
    data = DataDir.open(out)
    ids = data.documents("train")
    written = {
        part.path: part.code
        for i, meta in enumerate(data.metadata("train"))
        if meta.kind is Kind.FILE
        for part in read_sections(data.tokenizer, ids[i])
    }
    assert {f"ant/{name}": text for name, text in KEPT.items()}.items() <= written.items()
    left_out: dict[str, list[str]] = {"path_not_utf8": ["ant/?.cc"], "not_a_file": ["ant/pipe.cc"]}
    left_out["symlink"] = ["ant/dangling.cc", "ant/self.cc"]
    for name, (_, reason) in LEFT_OUT.items():
        left_out.setdefault(reason, []).append(f"ant/{name}")
    assert {k: sorted(v.examples) for k, v in data.manifest.dropped.items()} == {
        k: sorted(v) for k, v in left_out.items()
    }


def test_a_source_with_a_name_that_is_not_utf8_gives_a_build_that_can_be_read(
    repositories: Path, tmp_path: Path, build: Fathom, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = repositories.rename(tmp_path / os.fsdecode(b"we\xffird"))
    for _ in range(2):
        assert build(odd, tmp_path / "out") == 0
    assert "up to date" in capsys.readouterr().out
    assert DataDir.open(tmp_path / "out").manifest.source == "we?ird"
