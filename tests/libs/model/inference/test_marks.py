"""Prefixes kept by name: they outlive the cache, give way to requests, and come back from files only as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from libs.flags.errors import UserError
from libs.model.inference import CapacityError, Sampling
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
    assert marked.usage.active == 12 * (list(marked._marks.tokens) == ["third"])


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
    (tmp_path / "marks.json").write_text(json.dumps({"m": {"file": path.name, "tokens": 100}}))
    with pytest.raises(UserError, match="boundaries are multiples of 64"):
        engine("snapshots").load_marks(tmp_path)
    path.unlink()
    (tmp_path / "marks.json").write_text(json.dumps({"m": {"file": path.name, "tokens": 192}}))
    with pytest.raises(UserError, match="cannot be used"):
        engine("snapshots").load_marks(tmp_path)
    with pytest.raises(UserError, match="names no marks"):
        engine("snapshots").load_marks(tmp_path / "nowhere")
