"""The pipeline end to end: what is written, that it is the same every time, and that errors leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apps.train.data import analyse as analyse_module
from apps.train.data import store as store_module
from apps.train.data.interrupt import held_back
from libs.model.text.document import Kind, ReadSection, Role, read_sections
from libs.model.text.manifest import Manifest
from libs.model.text.shards import DataDir
from libs.model.text.tokenizer import SPECIAL_TOKENS

Fathom = Callable[..., int]
Shown = pytest.CaptureFixture[str]


def sections(data: DataDir, split: str) -> list[tuple[Any, list[ReadSection]]]:
    ids = data.documents(split)
    return [(meta, read_sections(data.tokenizer, ids[i])) for i, meta in enumerate(data.metadata(split))]


def source_of(root: Path, path: str) -> bytes:
    return (root / path).read_bytes()


def test_every_file_is_a_document_once_byte_for_byte(repositories: Path, tmp_path: Path, build: Fathom) -> None:
    text = "// " + " ".join(SPECIAL_TOKENS) + "\r\n// π\nint odd(int a) { return a; }\n"
    (repositories / "ant" / "odd.h").write_text(text, newline="")
    for tokenizer in ("bytes", "bpe:400"):
        out = tmp_path / tokenizer
        assert build(repositories, out, "--tokenizer", tokenizer) == 0
        data = DataDir.open(out)
        written: dict[str, bytes] = {}
        for split in ("train", "valid"):
            for meta, parts in sections(data, split):
                if meta.kind is Kind.FILE:
                    (part,) = parts
                    assert part.path not in written
                    written[part.path] = part.code
        on_disk = {p.relative_to(repositories).as_posix(): p.read_bytes() for p in repositories.rglob("*.[hc]*")}
        assert written == on_disk


def test_context_documents_hold_source_text_and_real_calls(repositories: Path, tmp_path: Path, build: Fathom) -> None:
    assert build(repositories, tmp_path / "out", "--mix", "file=1,callgraph=8", "--document-tokens", 1024) == 0
    data = DataDir.open(tmp_path / "out")
    seen: set[Role] = set()
    targets: list[str] = []
    for meta, parts in sections(data, "train"):
        if meta.kind is not Kind.CALLGRAPH:
            continue
        order = [part.role for part in parts]
        assert order == sorted(order, key=[Role.CALLERS, Role.TARGET, Role.CALLEES].index)
        assert order.count(Role.TARGET) == 1
        seen |= set(order)
        for part in parts:
            for function in part.code.split(b"\n\n"):
                assert function in source_of(repositories, part.path)
        target = next(part for part in parts if part.role is Role.TARGET)
        targets.append(f"{target.path}:{meta.target}")
        name = meta.target.rpartition("::")[2].encode()
        assert name in target.code
        nearest = [part for part in parts if part.role is Role.CALLERS][-1:]
        assert all(name + b"(" in part.code for part in nearest)
        callees = [part for part in parts if part.role is Role.CALLEES]
        called = set(re.findall(rb"(\w+)\(", target.code))
        assert not callees or any(n in callees[0].code for n in called)
    assert seen == {Role.CALLERS, Role.TARGET, Role.CALLEES}
    assert len(targets) == len(set(targets)) > 10


def test_units_put_headers_before_what_includes_them(repositories: Path, tmp_path: Path, build: Fathom) -> None:
    assert build(repositories, tmp_path / "out", "--mix", "file=1,unit=8") == 0
    units = 0
    for meta, parts in sections(DataDir.open(tmp_path / "out"), "train"):
        if meta.kind is not Kind.UNIT:
            continue
        units += 1
        assert {part.role for part in parts} == {Role.UNIT}
        assert parts[-1].path == meta.target
        assert parts[-1].path.endswith(".cc")
        place = {part.path: i for i, part in enumerate(parts)}
        for part in parts:
            assert part.code == source_of(repositories, part.path)
            for written in re.findall(rb'#include "\.\./include/(\w+\.h)"', part.code):
                header = f"{part.path.split('/')[0]}/include/{written.decode()}"
                assert place.get(header, -1) < place[part.path]
    assert units > 5


def test_nothing_of_a_held_out_package_is_in_train(repositories: Path, tmp_path: Path, build: Fathom) -> None:
    assert build(repositories, tmp_path / "out", "--valid-packages", "cow,elk", "--tokenizer", "bpe:300") == 0
    data = DataDir.open(tmp_path / "out")
    for split, packages in (("train", {"ant", "bee", "dog", "fox"}), ("valid", {"cow", "elk"})):
        metadata = data.metadata(split)
        assert {path.split("/")[0] for meta in metadata for path in meta.paths} == packages
        assert {meta.package for meta in metadata} == packages
    assert data.manifest.holdout.unit == "package"
    assert data.manifest.packages["bee"].licences == {"MIT": data.manifest.packages["bee"].files}
    assert data.manifest.packages["ant"].licences == {"unknown": data.manifest.packages["ant"].files}


def test_metadata_and_statistics_are_those_of_the_documents(repositories: Path, tmp_path: Path, build: Fathom) -> None:
    assert build(repositories, tmp_path / "out", "--document-tokens", 1024, "--mix", "file=1,callgraph=1,unit=1") == 0
    data = DataDir.open(tmp_path / "out")
    for split in ("train", "valid"):
        stats, documents = data.manifest.splits[split], data.documents(split)
        metadata = data.metadata(split)
        assert stats.documents == len(documents) == len(metadata)
        assert stats.tokens == sum(ids.size for ids in documents) == sum(meta.tokens for meta in metadata)
        assert stats.bytes == sum(int(data.tokenizer.token_bytes[ids].sum()) for ids in documents)
        assert sum(kind.tokens for kind in stats.kinds.values()) == stats.tokens
        assert documents.lengths.max() <= 1024
        for ids, meta in zip(documents, metadata, strict=True):
            for span, part in zip(meta.sections, read_sections(data.tokenizer, ids), strict=True):
                assert data.tokenizer.decode(ids[span.start : span.end]) == part.code


def test_a_file_longer_than_a_document_is_cut_at_lines(tmp_path: Path, build: Fathom) -> None:
    body = "\n".join(f"int f{i}(int a) {{ return a * {i * 7919}; }}" for i in range(200))
    for name in ("long.h", "other.h"):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / name).write_text(body.replace("f", name[0]))
    assert build(tmp_path / "src", tmp_path / "out", "--document-tokens", 1024, "--mix", "file=1") == 0
    data = DataDir.open(tmp_path / "out")
    parts = [(meta, p[0]) for s in ("train", "valid") for meta, p in sections(data, s) if p[0].path == "src/long.h"]
    assert len(parts) > 3
    assert [meta.part for meta, _ in parts] == [(i, len(parts)) for i in range(len(parts))]
    assert b"".join(part.code for _, part in parts) == (tmp_path / "src" / "long.h").read_bytes()
    assert all(part.code.startswith(b"\n") for _, part in parts[1:])
    assert all(meta.tokens <= 1024 for meta, _ in parts)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_same_input_gives_the_same_bytes_wherever_it_lies(
    repositories: Path, tmp_path: Path, build: Fathom
) -> None:
    moved = tmp_path / "elsewhere" / "repositories"
    moved.parent.mkdir()
    assert build(repositories, tmp_path / "a", "--tokenizer", "bpe:400") == 0
    repositories.rename(moved)
    assert build(moved, tmp_path / "b", "--tokenizer", "bpe:400") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert build(moved, tmp_path / "c", "--tokenizer", "bpe:400", "--seed", 1) == 0
    assert contents(tmp_path / "a")["train.bin"] != contents(tmp_path / "c")["train.bin"]
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "a").values())


def test_worker_processes_change_nothing(
    repositories: Path, tmp_path: Path, build: Fathom, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build(repositories, tmp_path / "one") == 0
    monkeypatch.setattr(analyse_module, "_SERIAL_BYTES", 0)
    monkeypatch.setattr(analyse_module, "_CHUNK_BYTES", 3_000)
    assert build(repositories, tmp_path / "two", "--workers", 2) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_building_again_is_up_to_date_and_another_build_needs_force(
    repositories: Path, tmp_path: Path, build: Fathom, capsys: Shown
) -> None:
    out = tmp_path / "out"
    assert build(repositories, out) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert build(repositories, out) == 0
    assert "up to date" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert build(repositories, out, "--seed", 1) == 2
    assert "give --force to replace it" in capsys.readouterr().err
    (repositories / "ant" / "new.h").write_text("int brand_new(int value) {\n  return value * 3 + 1;\n}\n" * 2)
    assert build(repositories, out) == 2
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert build(repositories, out, "--force") == 0
    assert "ant/new.h" in {path for meta in DataDir.open(out).metadata("train") for path in meta.paths}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [False, True])
def test_a_failure_half_way_leaves_things_as_they_were(
    repositories: Path, tmp_path: Path, build: Fathom, capsys: Shown, monkeypatch: pytest.MonkeyPatch,
    failure: BaseException, there: bool,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    if there:
        assert build(repositories, out) == 0
    before = contents(out) if there else None
    real = store_module.store

    def failing(directory: Path, split: str, *rest: Any) -> Any:
        if split == "valid":
            raise failure
        return real(directory, split, *rest)

    monkeypatch.setattr(store_module, "store", failing)
    assert build(repositories, out, "--force", "--seed", 2) == (2 if isinstance(failure, OSError) else 130)
    assert ("No space left" in (said := capsys.readouterr().err)) or "interrupted" in said
    assert (contents(out) if there else None) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out"] if there else []) + ["repositories"]


def make_source(root: Path, case: str) -> None:
    good = b"int add(int left, int right) {\n  return left + right;\n}\n" * 2
    root.mkdir()
    if case == "no c++":
        (root / "a.py").write_text("x = 1")
        (root / "b.c").write_bytes(good)
    elif case == "not utf-8":
        (root / "a.h").write_bytes(good + b"// caf\xe9\n")
    elif case == "gigantic":
        (root / "a.h").write_bytes(good * 100_000)
    elif case == "one file":
        (root / "a.h").write_bytes(good)
    elif case == "small for the window":
        for i in range(3):
            (root / f"{i}.h").write_bytes(good.replace(b"add", b"add%d" % i) + b"int x%d;\n" % i)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "not a directory"),
        ("empty", "the directory is empty"),
        ("no c++", "no C++ files"),
        ("not utf-8", "not_utf8: 1"),
        ("gigantic", "too_large: 1"),
        ("one file", "corpus too small"),
        ("small for the window", "corpus too small: split"),
    ],
)
def test_unusable_sources(tmp_path: Path, fathom_data: Fathom, capsys: Shown, case: str, message: str) -> None:
    source = tmp_path / "src"
    if case != "missing":
        make_source(source, case)
    words = ["--tokenizer", "bytes", "--window", "4096", "--quiet"]
    assert fathom_data("build", "--source", source, "--out", tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"src"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokenizer", "bpe:many"], "bpe:SIZE"),
        (["--tokenizer", "bpe:²"], "bpe:SIZE"),
        (["--tokenizer", "bpe:" + "9" * 5000], "bpe:SIZE"),
        (["--tokenizer", "bpe:99999999999999999999"], "bpe:SIZE"),
        (["--tokenizer", "nowhere.json"], "cannot read a tokenizer"),
        (["--tokenizer", "bpe:100"], "more than 272"),
        (["--mix", "file=1,graph=2"], "unknown kind of document 'graph'"),
        (["--mix", "file=0"], "nothing would be written"),
        (["--max-bytes", "lots"], "max_bytes"),
        (["--valid-share", "0.9"], "valid_share"),
        (["--layout", "flat"], "layout"),
        (["--window", "1"], "at least 2"),
        (["--valid-packages", "ent"], "did you mean 'ant'"),
    ],
)
def test_bad_options(
    repositories: Path, tmp_path: Path, build: Fathom, capsys: Shown, words: list[str], message: str
) -> None:
    assert build(repositories, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_tokenizer_is_taken_over(repositories: Path, tmp_path: Path, build: Fathom) -> None:
    assert build(repositories, tmp_path / "a", "--tokenizer", "bpe:300") == 0
    assert build(repositories, tmp_path / "b", "--tokenizer", tmp_path / "a" / "tokenizer.json", "--seed", 1) == 0
    assert DataDir.open(tmp_path / "a").tokenizer.fingerprint == DataDir.open(tmp_path / "b").tokenizer.fingerprint


def test_a_single_repository_says_what_it_holds_out(
    tmp_path: Path, repositories: Path, build: Fathom, fathom_data: Fathom, capsys: Shown
) -> None:
    assert build(repositories / "fox", tmp_path / "out", "--valid-share", "0.2") == 0
    manifest = DataDir.open(tmp_path / "out").manifest
    assert manifest.holdout.unit == "file"
    assert {name.split(" ")[0] for name in manifest.packages} == {"fox"}
    assert fathom_data("inspect", tmp_path / "out") == 0
    assert "one repository: single files" in " ".join(capsys.readouterr().out.split())


def test_inspect_shows_what_is_there(
    repositories: Path, tmp_path: Path, build: Fathom, fathom_data: Fathom, capsys: Shown
) -> None:
    (repositories / "ant" / "bad.h").write_bytes(b"// caf\xe9 " + b"x" * 100)
    assert build(repositories, tmp_path / "out", "--mix", "file=1,callgraph=8", "--document-tokens", 4096) == 0
    capsys.readouterr()
    assert fathom_data("inspect", tmp_path / "out", "--json", "--example") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["dropped"]["not_utf8"] == {"files": 1, "bytes": 108, "examples": ["ant/bad.h"]}
    assert Manifest.model_validate({k: v for k, v in shown.items() if k not in ("lengths", "example")})
    lengths = DataDir.open(tmp_path / "out").documents("train").lengths
    assert shown["lengths"]["train"]["p50"] == int(np.percentile(lengths, 50, method="lower"))
    assert {part["role"] for part in shown["example"]["text"]} == {"callers", "target", "callees"}
    assert fathom_data("inspect", tmp_path / "out", "--example", 0) == 0
    text = capsys.readouterr().out
    for word in ("not_utf8", "held out", "callgraph", "train document 0", "MIT"):
        assert word in text
    assert fathom_data("inspect", tmp_path / "out", "--example", 10**6) == 2


def test_inspect_refuses_a_damaged_directory(
    repositories: Path, tmp_path: Path, build: Fathom, fathom_data: Fathom, capsys: Shown
) -> None:
    assert build(repositories, tmp_path / "out") == 0
    raw = bytearray((tmp_path / "out" / "train.bin").read_bytes())
    raw[100] ^= 1
    (tmp_path / "out" / "train.bin").write_bytes(raw)
    assert fathom_data("inspect", tmp_path / "out") == 2
    assert "train.bin does not have its recorded checksum" in capsys.readouterr().err
    assert fathom_data("inspect", tmp_path / "nothing") == 2


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler of its own."""
    line = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return line is not None and bool(int(line[1], 16) >> number - 1 & 1)


def has_workers(pid: int) -> bool:
    """Two, beside multiprocessing's own helper. They may be anywhere in their start."""
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) > 2


@pytest.mark.parametrize("moment", ["handler", "workers", "writing"])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, moment: str) -> None:
    source = tmp_path / "src"
    source.mkdir()
    draw = random.Random(0)
    for i in range(150 if moment == "workers" else 10):
        lines = "\n".join(f"int f{draw.randrange(10**9)}(int a) {{ return a; }}" for _ in range(600))
        (source / f"{i}.cc").write_text(lines)
    words = ["build", "--source", str(source), "--out", str(tmp_path / "out"), "--window", "64"]
    process = subprocess.Popen(
        [sys.executable, "-m", "apps.train.data", *words, "--tokenizer", "bytes"],
        cwd=Path(analyse_module.__file__).parents[3],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    number = signal.SIGTERM if moment == "handler" else signal.SIGINT
    come: dict[str, Callable[[], bool]] = {
        "handler": lambda: catches(process.pid, number),
        "workers": lambda: has_workers(process.pid),
        "writing": lambda: any(tmp_path.glob(".out.partial-*")),
    }
    while not come[moment]():
        assert process.poll() is None, "it ended before the signal"
        time.sleep(0.01)
    os.killpg(process.pid, number) if number is signal.SIGINT else process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error.decode()
    assert b"interrupted" in error
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_an_interrupt_that_an_import_would_swallow_is_raised_after_it() -> None:
    before = signal.getsignal(signal.SIGINT)
    for number in (signal.SIGINT, signal.SIGTERM):
        steps = []
        with pytest.raises(KeyboardInterrupt), held_back():  # noqa: PT012
            with suppress(BaseException):
                signal.raise_signal(number)
                steps.append("imported")
            steps.append("went on")
        assert steps == ["imported", "went on"]
        assert signal.getsignal(signal.SIGINT) is before
