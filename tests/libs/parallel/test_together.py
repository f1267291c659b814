"""One process alone: errors keep their kind, threads their results. Several ranks: tests/apps/train/test_layouts.py."""

from __future__ import annotations

import threading

import pytest

from libs.flags.errors import UserError
from libs.parallel.mesh import Group
from libs.parallel.together import Background, everyones, first_does, run_together, together

ALONE = Group()


@pytest.mark.parametrize("error", [UserError("full"), OSError(28, "full"), AssertionError("ours")])
def test_an_error_keeps_its_kind(error: BaseException) -> None:
    def fail() -> None:
        raise error

    for run in (run_together, first_does):
        with pytest.raises(type(error)) as caught:
            run(ALONE, "working", fail)
        assert caught.value is error
    with pytest.raises(type(error)) as caught, together(ALONE, "working"):
        raise error
    assert caught.value is error
    with pytest.raises(type(error)) as caught:
        Background(ALONE, "working", fail).result()
    assert caught.value is error


def test_results() -> None:
    assert everyones(ALONE, 3) == [3]
    assert run_together(ALONE, "working", lambda: 4) == 4
    assert first_does(ALONE, "working", lambda: 5) == 5
    with together(ALONE, "working"):
        pass


def test_background_work_is_looked_at_without_waiting() -> None:
    go_on = threading.Event()
    work = Background(ALONE, "working", lambda: go_on.wait(60))
    assert not work.done()
    assert not work.wait_here(0.01)
    go_on.set()
    assert work.result()
    assert work.done()
    assert work.done_here()
