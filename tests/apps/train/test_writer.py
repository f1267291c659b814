"""Background saves of one process: the values of the step, one commit each, and failures that are never silent."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.train import save, snapshot
from apps.train.optim import optimizer_tensors
from apps.train.writer import CheckpointWriter
from libs.flags.errors import UserError
from libs.model.checkpoint import verify_checkpoint
from libs.model.text.tokenizer import Tokenizer
from libs.model.weights import load_model
from libs.parallel.mesh import single
from tests.support.saved_layouts import Listener, state_of, wait_until_idle, whole_run


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    model, optimizer = whole_run(1)
    return {"model": model, "optimizer": optimizer, "tokenizer": Tokenizer.bytes_tokenizer()}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The thread does not write before this is set."""
    go_on, write = threading.Event(), snapshot.save_model

    def wait(*arguments: Any, **options: Any) -> None:
        assert go_on.wait(60)
        write(*arguments, **options)

    monkeypatch.setattr(snapshot, "save_model", wait)
    yield go_on
    go_on.set()


def writer(run: Path, listener: Listener, asynchronous: bool = True) -> CheckpointWriter:
    return CheckpointWriter(run, groups=single(), listener=listener, asynchronous=asynchronous)


def test_files_are_those_of_a_save_in_the_step(tmp_path: Path, parts: dict[str, Any]) -> None:
    for name, asynchronous in (("now", False), ("later", True)):
        listener = Listener()
        with writer(tmp_path / name, listener, asynchronous) as under_test:
            under_test.begin(state=state_of(1), **parts)
            assert under_test.under_way == asynchronous
            under_test.finish()
        assert listener.heard == ["commit step-00000001"]
    now, later = (save.checkpoint_dir(tmp_path / name, 1) for name in ("now", "later"))
    assert {path.name for path in now.iterdir()} == {path.name for path in later.iterdir()}
    for path in now.iterdir():
        assert path.read_bytes() == (later / path.name).read_bytes(), path.name
    verify_checkpoint(later)


def test_later_steps_do_not_reach_the_files(tmp_path: Path, parts: dict[str, Any], gate: threading.Event) -> None:
    model, optimizer = whole_run(1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moments = {key: tensor.clone() for key, tensor in optimizer_tensors(model, optimizer).items()}
    with writer(tmp_path, Listener()) as under_test:
        under_test.begin(state=state_of(1), **{**parts, "model": model, "optimizer": optimizer})
        with torch.no_grad():
            for tensor in (*model.parameters(), *optimizer_tensors(model, optimizer).values()):
                tensor.fill_(7.0)
        under_test.poll()
        assert save.committed_steps(tmp_path) == []
        gate.set()
        wait_until_idle(under_test)
        assert save.committed_steps(tmp_path) == [1]
    path = save.choose_checkpoint(tmp_path, None)
    assert all(torch.equal(p, before[n]) for n, p in load_model(path).named_parameters())
    save.restore_optimizer(path, model, optimizer)
    assert all(torch.equal(t, moments[key]) for key, t in optimizer_tensors(model, optimizer).items())


def test_a_second_save_finishes_the_first(tmp_path: Path, parts: dict[str, Any]) -> None:
    listener = Listener()
    with writer(tmp_path, listener) as under_test:
        for step in (1, 2, 3):
            under_test.begin(state=state_of(step), **parts)
        assert save.committed_steps(tmp_path) == [1, 2]
    assert save.committed_steps(tmp_path) == [1, 2, 3]
    assert listener.heard == [f"commit step-0000000{step}" for step in (1, 2, 3)]


@pytest.mark.parametrize("way", ["poll", "finish", "begin", "leave"])
def test_a_failure_in_the_thread_is_raised_at_the_next_safe_point(
    tmp_path: Path, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    save.save_checkpoint(tmp_path, state=state_of(1), **parts)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot, "save_file", full)
    listener = Listener()
    under_test = writer(tmp_path, listener)
    with pytest.raises(UserError, match="the disk is full while saving"), under_test:  # noqa: PT012
        under_test.begin(state=state_of(2), **parts)
        if way == "poll":
            wait_until_idle(under_test)
        elif way == "finish":
            under_test.finish()
        elif way == "begin":
            under_test.begin(state=state_of(3), **parts)
    (heard,) = listener.heard
    assert heard.startswith("abort step-00000002: the disk is full")
    assert not under_test.under_way
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_an_exception_in_the_loop_aborts(tmp_path: Path, parts: dict[str, Any], gate: threading.Event) -> None:
    gate.set()
    save.save_checkpoint(tmp_path, state=state_of(1), **parts)
    gate.clear()
    listener = Listener()
    with pytest.raises(ZeroDivisionError), writer(tmp_path, listener) as under_test:  # noqa: PT012
        under_test.begin(state=state_of(2), **parts)
        gate.set()
        raise ZeroDivisionError("a bug")
    assert listener.heard == ["abort step-00000002: ZeroDivisionError during the save: a bug"]
    assert save.committed_steps(tmp_path) == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    with writer(tmp_path, listener) as again:
        again.begin(state=state_of(2), **parts)
    assert save.committed_steps(tmp_path) == [1, 2]


def test_idle_writers_do_nothing(tmp_path: Path) -> None:
    listener = Listener()
    with writer(tmp_path, listener) as under_test:
        under_test.poll()
        under_test.finish()
        under_test.abort("nothing")
    assert listener.heard == []
    assert list(tmp_path.iterdir()) == []
