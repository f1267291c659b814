"""What stops an engine, and that a stopped one gives, computes and saves nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from libs.model.inference import AuditFailed, Engine, EngineStopped, LogitsNotFinite, Sampling
from libs.model.inference.runner import Runner
from libs.model.inference.state_slots import StateSlots
from tests.libs.model.inference.conftest import BuildEngine, ids

GREEDY = Sampling(max_new_tokens=5)
WARM = Sampling(max_new_tokens=3, temperature=0.9, top_k=20, top_p=0.95, seed=7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_the_engine(engine: BuildEngine, bad: float) -> None:
    """In a prompt's last output, in decode, and in scores: no token, no log-probability, and the request's number."""
    asks: list[Callable[[Engine], object]] = [
        lambda running: running.generate([ids(5, 1)], GREEDY),
        lambda running: running.generate([ids(5, 1)], WARM),
        lambda running: running.score([(ids(70, 1), [1, 2])]),
    ]
    for ask in asks:
        running = engine("snapshots")
        norm = running.model.final_norm.weight
        with torch.no_grad():
            kept = norm.clone()
            norm[0] = bad
        with pytest.raises(LogitsNotFinite, match=r"request 0: logits are not finite .*token 0"):
            ask(running)
        with torch.no_grad():
            norm.copy_(kept)
        with pytest.raises(EngineStopped, match="logits are not finite"):
            ask(running)
        running.close()
        ask(running)


def test_a_row_that_is_not_finite_is_found_in_decode(engine: BuildEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    running, whole = engine(), Runner.decode
    numbers = [running.submit(ids(5, seed), Sampling(max_new_tokens=6)) for seed in range(2)]

    def decode(self: Runner, steps: Any) -> Any:
        decoded = whole(self, steps)
        if steps[-1].start == 7:
            decoded.logits[-1, 3] = float("inf")
        return decoded

    monkeypatch.setattr(Runner, "decode", decode)
    given = []

    def drive() -> None:
        while running.busy:
            given.extend(running.step())

    with pytest.raises(LogitsNotFinite, match=rf"request {numbers[1]}: .*\(1 of 64\) at token 3"):
        drive()
    assert sum(event.request == numbers[1] for event in given) == 3


def test_a_stopped_engine_computes_and_saves_nothing(
    engine: BuildEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopped, text = engine("snapshots", audit_share=1.0), ids(130, 1)
    stopped.checkpoint("m", text)
    stopped.save_marks(tmp_path / "before")
    whole = StateSlots.restore

    def restore(self: StateSlots, slot: int, blob: bytes) -> int:
        found = whole(self, slot, blob)
        self._states["angle"][:, slot] += 1
        return found

    monkeypatch.setattr(StateSlots, "restore", restore)
    with pytest.raises(AuditFailed):
        stopped.generate([text], GREEDY)
    for refused in (
        stopped.step,
        lambda: stopped.submit(text, GREEDY),
        lambda: stopped.generate([], GREEDY),
        lambda: stopped.score([]),
        lambda: stopped.checkpoint("n", ids(130, 2)),
        lambda: stopped.save_marks(tmp_path / "after"),
        lambda: stopped.load_marks(tmp_path / "before"),
    ):
        with pytest.raises(EngineStopped, match=r"needs close\(\)"):
            refused()
    assert not (tmp_path / "after").exists()
    assert stopped.waiting == 0
    stopped.close()
    assert stopped.load_marks(tmp_path / "before") == ("m",)
