"""`fathom bench kernels`: the table, what turns it red, the grids, and one real kernel from end to end."""

from __future__ import annotations

import importlib.util
import json

import pytest
from rich.console import Console

from apps.eval.bench import kernels, kernels_command
from apps.eval.bench.__main__ import main
from apps.eval.bench.kernel_report import print_kernels
from apps.eval.bench.kernel_table import KernelTable
from apps.eval.bench.kernels import SETTINGS, grid_rows, kernel_table
from libs.flags.errors import UserError
from libs.kernels.mimo.sm90.dialect import CudaDialect
from libs.kernels.mimo.sm90.gates import KernelGates
from libs.kernels.mimo.sm90.inspect import Facts
from libs.kernels.mimo.sm90.kernel_set import COMBINING, MAKE, NAMES, KernelName, Problem, grid, mode_of, spec_of
from libs.kernels.mimo.sm90.tiles import TileShape

VERSIONS = {"tilelang": "0", "nvcc": "0"}


def clean(kernel: KernelName, gates: KernelGates, problem: Problem) -> Facts:
    """What a kernel that does everything as asked looks like."""
    mode = mode_of(kernel, gates)
    tma = mode != "plain"
    return Facts(
        grid(kernel, problem), 256 if mode == "ws" else 128, 100_000, 128, 200, 0, 2, tma_loads=4 * tma,
        tma_stores=tma, bulk_copies=3 * tma, async_copies=0, wgmma=0 if kernel in COMBINING else 4, mma=0,
        specialized=mode == "ws", tma_ranks=(2, 2) if tma else (), lint=(),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "tool_versions", lambda: VERSIONS)


def test_every_kernel_under_every_setting_that_changes_it() -> None:
    """The split passes know nothing of PsiV, the combining ones nothing of any gate."""
    found = kernel_table(look=clean)
    rows = {(row.kernel, row.gates, row.N) for row in found.kernels}
    assert len(rows) == len(found.kernels) == 2 * (3 * 5 + 2 * 3 + 2)
    assert ("fwd", "tma+ws, psiv reused", 128) in rows
    assert ("bwd_states", "tma+ws, psiv reused", 128) not in rows
    assert found.problems == []
    assert all(aim.met for aim in found.aims)
    assert KernelTable.model_validate_json(found.model_dump_json()) == found


def test_a_kernel_that_misses_what_is_asked_turns_the_table_red() -> None:
    """Spills, no TMA, rank-3 tiles, wrong code, one resident block: each is named."""
    changes: dict[tuple[str, str], dict[str, object]] = {
        ("fwd", "off"): {"spills": 8, "blocks": 1},
        ("bwd_fwd", "tma"): {"tma_loads": 0, "tma_stores": 0, "bulk_copies": 0, "tma_ranks": ()},
        ("bwd_bwd", "tma+ws"): {"tma_ranks": (2, 3), "wgmma": 0},
        ("states", "off"): {"lint": ("wrong code",)},
    }

    def look(kernel: KernelName, gates: KernelGates, problem: Problem) -> Facts:
        setting = next(name for name, value in SETTINGS.items() if value == gates)
        return clean(kernel, gates, problem)._replace(**changes.get((kernel, setting), {}))  # type: ignore[arg-type]

    found = kernel_table(settings=("off", "tma", "tma+ws"), states=(64,), look=look)
    assert [line.split(":")[0] for line in found.problems] == [
        "states (off, N=64)", "fwd (off, N=64)", "bwd_fwd (tma, N=64)", "bwd_fwd (tma, N=64)", "bwd_bwd (tma+ws, N=64)",
    ]  # fmt: skip
    assert "8 bytes of spills, 0 are allowed" in found.problems[1]
    assert [aim.met for aim in found.aims] == [False] * 5
    assert [aim.measured for aim in found.aims] == [1, 1, 1, 4, 1]


def test_grids_with_and_without_a_split_sequence() -> None:
    """B = 1 leaves 116 multiprocessors idle, split it fills all; unsplit there are no split passes."""
    rows = {(row.kernel, row.B, row.split): row for row in grid_rows(NAMES)}
    assert rows["fwd", 1, "off"].busy_multiprocessors == 16
    assert rows["fwd", 1, "auto"].busy_multiprocessors == 132
    assert rows["bwd_bwd", 1, "auto"].blocks == 16 * rows["bwd_bwd", 1, "auto"].splits
    assert rows["fwd", 8, "off"].busy_multiprocessors == 128
    assert rows["fwd", 8, "auto"].busy_multiprocessors == 132
    assert ("states", 1, "off") not in rows
    assert rows["combine", 1, "auto"].grid == (16, 1, 4)


def test_the_grid_is_that_of_the_kernel() -> None:
    """Worked out without a compiler, and as the traced kernel says."""
    problem = Problem(TileShape(64, 64, 4, 16), B=2, H=4, S=1024, splits=4)
    for kernel in NAMES:
        closed = spec_of(kernel, KernelGates(), problem)
        text = MAKE[kernel](CudaDialect("plain"), closed).script()
        for axis, extent in zip("xyz", grid(kernel, problem), strict=True):
            assert f'T.thread_binding({extent}, thread="blockIdx.{axis}")' in text


def test_the_options_name_what_there_is() -> None:
    assert kernels_command.KERNELS == NAMES
    assert tuple(SETTINGS) == kernels_command.GATES
    assert kernels_command.STATES == kernels.STATES


def test_the_command_prints_json_or_a_table_and_fails_on_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = kernels.kernel_table
    monkeypatch.setattr(kernels, "kernel_table", lambda *which: table(*which, look=clean))
    assert main(["kernels", "--json", "--kernel", "bwd_fwd", "--gates", "tma", "--state", "128"]) == 0
    only = json.loads(capsys.readouterr().out)
    assert [(row["kernel"], row["gates"], row["N"]) for row in only["kernels"]] == [("bwd_fwd", "tma", 128)]
    assert {row["kernel"] for row in only["grids"]} == {"bwd_fwd"}
    assert main(["kernels", "--state", "64"]) == 0
    shown = capsys.readouterr().out
    assert "busy multiprocessors of 132" in shown
    assert "aim: kernels with spills <= 0: 0  met" in shown
    spilling = lambda *which: table(*which, look=lambda *a: clean(*a)._replace(spills=4))  # noqa: E731
    monkeypatch.setattr(kernels, "kernel_table", spilling)
    assert main(["kernels", "--kernel", "fwd"]) == 1
    assert "problem: fwd (off, N=64): 4 bytes of spills" in capsys.readouterr().out


def test_without_the_compilers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="install the extra `dev`"):
        main(["kernels"])


def test_a_real_kernel_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The combining pass, the quickest to compile: no tiles, no matrix product."""
    monkeypatch.undo()  # this one asks the compilers
    found = kernel_table(("combine",), ("off",), (64,))
    (row,) = found.kernels
    assert (row.spill_bytes, row.shared_bytes, row.wgmma, row.tma_sites, row.problems) == (0, 0, 0, 0, [])
    assert row.blocks_per_multiprocessor >= 4
    assert found.versions["tilelang"]
    print_kernels(found, Console(file=None, quiet=True))
