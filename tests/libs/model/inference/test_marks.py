"""Prefixes kept by name: they outlive the cache, give way to requests, and come back from files only as they were."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libs.flags.errors import UserError
from libs.model.inference import CapacityError, Engine, PagedKV, Sampling
from tests.libs.model.inference.conftest import BuildEngine, ids

HOW = Sampling(max_new_tokens=3)
TEXT = ids(200, 1)


def test_a_mark_is_used_and_outlives_the_cache(engine: BuildEngine) -> None:
    wanted = engine().generate([TEXT], HOW)[0]
    marked = engine("snapshots", kv_blocks=26, snapshot_bytes=30_000)
    marked.checkpoint("head", TEXT[:150])
    for seed in range(2, 9):  # fills the pool and the states kept
        marked.generate([ids(180, seed)], HOW)
    found = marked.generate([TEXT], HOW)[0]
    assert (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs)
    assert found.report.skipped == 128
    marked.check()
    marked.close()
    assert marked.usage.active == marked.usage.cached == 0


def test_marks_give_way_to_what_could_not_run(engine: BuildEngine) -> None:
    marked = engine("snapshots", kv_blocks=14)
    marked.checkpoint("first", ids(130, 2))
    marked.checkpoint("second", ids(64, 3))
    marked.generate([ids(150, 4)], HOW)
    assert marked.counters["marks_dropped"] == 1
    assert list(marked._marks.tokens) == ["second"]
    marked.checkpoint("third", ids(200, 5))
    assert list(marked._marks.tokens) == ["third"]
    with pytest.raises(CapacityError, match="needed"):
        marked.checkpoint("too long", ids(300, 6))
    marked.check()
    assert list(marked._marks.tokens) == ["third"]
    assert marked.usage.active == 12


def test_what_cannot_be_marked(engine: BuildEngine) -> None:
    marked = engine("snapshots")
    marked.checkpoint("no boundary in it", TEXT[:63])
    assert not marked._marks.tokens
    marked.checkpoint("a", TEXT)
    for prompt, name, message in ((TEXT, "a", "already"), (TEXT, "a\n", "printable"), ([], "b", "empty")):
        with pytest.raises(UserError, match=message):
            marked.checkpoint(name, prompt)
    with pytest.raises(UserError, match="FATHOM_PREFIX_CACHE=snapshots"):
        engine("memory_only").checkpoint("a", TEXT)


@pytest.mark.parametrize("pattern", ["M-*M-*", "M-", "*-"])
def test_a_saved_mark_is_the_same_bits_in_another_engine(engine: BuildEngine, tmp_path: Path, pattern: str) -> None:
    wanted = engine(pattern=pattern).generate([TEXT], HOW)[0]
    saving = engine("snapshots", pattern=pattern)
    saving.checkpoint("a context", TEXT[:130])
    saving.checkpoint("another", ids(64, 5))
    saving.save_marks(tmp_path / "marks")
    loading = engine("snapshots", pattern=pattern, audit_share=1.0)
    assert loading.load_marks(tmp_path / "marks") == ("a context", "another")
    loading.check()
    found = loading.generate([TEXT], HOW)[0]
    assert (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs)
    assert found.report.skipped == 128
    assert loading.counters["audited"] == 1


def test_a_changed_or_foreign_mark_is_refused(engine: BuildEngine, tmp_path: Path) -> None:
    saving = engine("snapshots")
    saving.checkpoint("m", TEXT)
    saving.save_marks(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    good = path.read_bytes()
    for damaged in (good[:-1], good[:50], good[:-9] + bytes([good[-9] ^ 1]) + good[-8:], b""):
        path.write_bytes(damaged)
        fresh = engine("snapshots")
        with pytest.raises(UserError, match="'m' cannot be used"):
            fresh.load_marks(tmp_path)
        assert fresh.usage.active == 0
    path.write_bytes(good)
    with pytest.raises(UserError, match="of another model"):
        engine("snapshots", pattern="M-*M-").load_marks(tmp_path)
    with pytest.raises(UserError, match="of another kv"):
        engine("snapshots", block_size=32).load_marks(tmp_path)
    index = tmp_path / "marks.json"
    (entry,) = json.loads(index.read_text()).values()
    index.write_text(json.dumps({"m": {**entry, "tokens": 100}}))
    with pytest.raises(UserError, match="boundaries are multiples of 64"):
        engine("snapshots").load_marks(tmp_path)
    path.unlink()
    index.write_text(json.dumps({"m": entry}))
    with pytest.raises(UserError, match="cannot be used"):
        engine("snapshots").load_marks(tmp_path)
    with pytest.raises(UserError, match="names no marks"):
        engine("snapshots").load_marks(tmp_path / "nowhere")


def state_bytes(engine: Engine) -> int:
    """Of one kept state, by making one."""
    slot = engine._slots.alloc()
    engine._slots.advance(slot, 64)
    return len(engine._slots.capture(slot))


def test_a_mark_that_cannot_be_drops_no_other(engine: BuildEngine) -> None:
    marked = engine("snapshots", kv_blocks=16)
    marked.checkpoint("a", ids(64, 1))
    marked.checkpoint("b", ids(64, 2))
    with pytest.raises(CapacityError, match=r"of 16\).*needed 20, available 16"):
        marked.checkpoint("larger than the pool", ids(320, 3))
    running = marked.submit(ids(30, 4), Sampling(max_new_tokens=40))  # five blocks
    marked.step()
    with pytest.raises(CapacityError, match="running requests: needed 12, available 11"):
        marked.checkpoint("larger than the rest", ids(192, 3))
    # What it shares with them it does not need: eight more blocks behind the four of "a".
    with pytest.raises(CapacityError, match="needed 8, available 7"):
        marked.checkpoint("larger, with a shared head", [*ids(64, 1), *ids(128, 5)])
    assert list(marked._marks.tokens) == ["a", "b"]
    assert marked.counters.get("marks_dropped", 0) == 0
    marked.abort(running)
    marked.checkpoint("fits when the others go", ids(256, 6))
    assert list(marked._marks.tokens) == ["fits when the others go"]
    marked.check()


def test_a_state_larger_than_all_that_is_kept_drops_no_mark(engine: BuildEngine) -> None:
    size = state_bytes(engine("snapshots"))
    marked = engine("snapshots", snapshot_bytes=size)
    marked.checkpoint("a", ids(64, 1))
    assert len(marked._cache.state_at(marked._cache.pins["a"]) or b"") == size == marked._slots.capture_bytes(64)
    marked.checkpoint("in its place", ids(64, 2))
    assert list(marked._marks.tokens) == ["in its place"]
    small = engine("snapshots", snapshot_bytes=size - 1)
    with pytest.raises(CapacityError, match=f"snapshot_bytes.*needed {size}, available {size - 1}"):
        small.checkpoint("a", ids(64, 1))
    assert small.usage.active == small.usage.cached == 0


def saved(build: Callable[[], Engine], directory: Path) -> Path:
    saving = build()
    for seed, name in enumerate("abc"):
        saving.checkpoint(name, ids(64 * (seed + 1), seed))
    saving.save_marks(directory)
    return directory


def test_marks_are_loaded_all_or_none(engine: BuildEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = saved(lambda: engine("snapshots"), tmp_path / "marks")
    last = directory / f"mark-{json.loads((directory / 'marks.json').read_text())['c']['sha256']}.safetensors"
    good = last.read_bytes()
    loading = engine("snapshots")
    loading.checkpoint("mine", ids(64, 9))
    last.write_bytes(good[:-1])
    with pytest.raises(UserError, match="'c' cannot be used"):
        loading.load_marks(directory)
    last.write_bytes(good)
    write, calls = PagedKV.write, [0]

    def failing(self: PagedKV, *arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("device lost")
        write(self, *arguments)

    monkeypatch.setattr(PagedKV, "write", failing)
    with pytest.raises(RuntimeError, match="device lost"):
        loading.load_marks(directory)
    assert list(loading._marks.tokens) == list(loading._cache.pins) == ["mine"]
    loading.check()
    assert loading.load_marks(directory) == ("mine", "a", "b", "c")
    loading.check()
    small = engine("snapshots", kv_blocks=11)
    small.checkpoint("mine", ids(64, 9))
    with pytest.raises(CapacityError, match="needed 12, available 11"):
        small.load_marks(directory)
    assert list(small._marks.tokens) == ["mine"]


def test_a_save_that_is_cut_off_leaves_the_marks_that_were_there(
    engine: BuildEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(lambda: engine("snapshots"), tmp_path)
    names = sorted(path.name for path in directory.iterdir())
    other, replace = engine("snapshots"), os.replace
    other.checkpoint("a", ids(64, 7))
    for until in (0, 1):
        left = [until]

        def killed(source: Path, target: Path, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            other.save_marks(directory)
        loading = engine("snapshots")
        assert loading.load_marks(directory) == ("a", "b", "c")
        assert loading._marks.tokens["a"] == tuple(ids(64, 0))
    monkeypatch.setattr(os, "replace", replace)
    other.save_marks(directory)
    loading = engine("snapshots")
    assert loading.load_marks(directory) == ("a",)
    assert loading._marks.tokens["a"] == tuple(ids(64, 7))
    assert len(list(directory.glob("mark-*"))) == 1, "files of earlier marks go"
    assert len(names) == 4


def test_another_marks_file_is_not_taken_for_one(engine: BuildEngine, tmp_path: Path) -> None:
    saving = engine("snapshots")
    saving.checkpoint("a", ids(64, 1))
    saving.checkpoint("b", ids(64, 2))
    saving.save_marks(tmp_path)
    first, second = tmp_path.glob("mark-*")
    first.write_bytes(second.read_bytes())
    loading = engine("snapshots")
    with pytest.raises(UserError, match="not the file that was saved"):
        loading.load_marks(tmp_path)
    assert not loading._marks.tokens
    with pytest.raises(UserError, match="cannot write marks"):
        saving.save_marks(first)
