"""Ten thousand runs: indexed from nothing, asked again, and asked after changes. Prints its times; asserts answers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from libs.flags.audit_record import GENESIS, audit_path, record_hash
from libs.flags.canonical import canonical_json
from libs.flags.errors import run_entry
from libs.flags.fleet import Query
from libs.flags.fleet_cli import main_runs
from libs.flags.index import RunIndex
from libs.flags.runlog import log_path

RUNS = 10_000
STEPS = 20


def _copy(template: Path, target: Path, active: bool) -> None:
    """The template as another run, its chain linked anew; with psiv_cache active where asked for."""
    prev, old_heads, lines = GENESIS, [GENESIS], []
    for line in audit_path(template).read_bytes().splitlines():
        record = json.loads(line) | {"run_id": target.name}
        old_heads.append(record["hash"])
        if active and record["gate"] == "psiv_cache":
            record |= {"event": "active", "value": "gmem_pool"}
        record["prev"] = prev
        prev = record["hash"] = record_hash(record)
        lines.append(canonical_json(record) + b"\n")
    log = log_path(template).read_bytes().replace(b'"run_id":"template"', f'"run_id":"{target.name}"'.encode())
    log = log.replace(old_heads[-1].encode(), prev.encode())
    if active:
        off = (
            b'"gate":"psiv_cache","variable":"FATHOM_PSIV_CACHE","value":"off","default":"off","stage":"experimental",'
        )
        assert off + b'"outcome":"off"' in log
        log = log.replace(off + b'"outcome":"off"', off.replace(b'"off"', b'"gmem_pool"', 1) + b'"outcome":"active"')
    for path, content in ((audit_path(target), b"".join(lines)), (log_path(target), log)):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_runs(write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template, folder = write_run(tmp_path / "template", steps=STEPS), tmp_path / "runs"
    for number in range(RUNS):
        _copy(template, folder / f"run-{number:05d}", active=number % 100 == 7)
    for number in (3, 5000, 9999):
        path = audit_path(folder / f"run-{number:05d}")
        path.write_bytes(path.read_bytes().replace(b'"reason":"n', b'"reason":"N', 1))
    times: list[str] = []

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        """By the clock, and in CPU seconds of all processes: this machine may have other work."""
        clock, before = time.perf_counter(), os.times()
        yield
        after = os.times()
        cpu = sum(after[:4]) - sum(before[:4])
        times.append(f"{what}: {time.perf_counter() - clock:.2f} s, {cpu:.2f} s of CPU")

    with timed("indexed from the files"):
        RunIndex.open(folder).close()
    with timed("opened again, nothing changed"):
        index = RunIndex.open(folder)
    active = [run for run in index.runs() if Query("psiv_cache").matches(run)]
    assert len(active) == RUNS // 100
    assert {run.gates["psiv_cache"][0].value for run in active} == {"gmem_pool"}
    untrusted = [run.run for run in index.runs() if Query(untrusted=True).matches(run)]
    assert untrusted == ["run-00003", "run-05000", "run-09999"]
    index.close()
    with timed("runs list --gate psiv_cache"):
        assert run_entry(main_runs, ["list", str(folder), "--gate", "psiv_cache", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == RUNS // 100
    with capsys.disabled():
        print(f"\n{RUNS} runs:", "; ".join(times))
