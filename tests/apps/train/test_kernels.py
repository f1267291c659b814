"""Before step 1: the self-test in the log, a wrong kernel refused, gates and shapes that the kernels do not have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apps.train import facts, kernels, loop, ranks
from apps.train.kernels import KernelWatch, check_scan
from apps.train.lane import Lane
from libs.flags import installed
from libs.flags.facts import Facts
from libs.flags.logcheck import check_log
from libs.flags.resolve import resolve
from libs.flags.runlog import RunLog, read_events
from libs.kernels.backend import Choice
from libs.kernels.mimo import chunked
from libs.kernels.mimo.capabilities import Build
from libs.kernels.mimo.sm90.gates import GATES
from libs.kernels.mimo.sm90.tiles import require_shared
from libs.model.config import MixerConfig

Train = Callable[..., int]
Events = Callable[..., list[dict[str, Any]]]


def test_the_self_test_comes_before_anything_is_computed(
    train: Train, recipe: Path, tmp_path: Path, events: Events, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run) == 0
    (found,) = events(run, "kernel.selftest")
    assert found["passed"] is True
    assert found["kernel"] == "mamba3_mimo.chunked"
    details = found["details"]
    assert details["geometry"] == {"H": 4, "G": 1, "R": 2, "N": 16, "P": 16, "C": 8, "divisor": 4, "norm": False}
    assert (details["dtype"], details["gates"], details["wrong"]) == ("float32", {}, [])
    assert len(details["errors"]) == 15
    assert all(0 < error < 1e-5 for error in details["errors"].values())
    names = [event["event"] for event in events(run)]
    assert names.index("data.fingerprint") < names.index("kernel.selftest") < names.index("eval.result")
    assert "kernel.compiled" not in names
    assert "self-test of scan backend chunked in float32, 21 tokens" in capsys.readouterr().out
    assert check_log(run).violations == ()


def test_every_attempt_is_tested(train: Train, recipe: Path, tmp_path: Path, events: Events) -> None:
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run, "--train.stop_after", "2") == 75
    assert train("--resume", run) == 0
    assert [event["attempt"] for event in events(run, "kernel.selftest")] == [0, 1]


def test_a_wrong_kernel_refuses_the_run(
    train: Train,
    recipe: Path,
    tmp_path: Path,
    events: Events,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    original = chunked.scan_weights
    with monkeypatch.context() as patch:
        patch.setattr(chunked, "scan_weights", lambda *a: original(*a)._replace(gamma=original(*a).later))
        assert train("--recipe", recipe, "--run-dir", run) == 78
    said = capsys.readouterr().err
    for part in ("self-test failed", "scan backend chunked", "H=4, G=1, R=2, N=16, P=16, C=8", "gates none", "out "):
        assert part in said
    (found,) = events(run, "kernel.selftest")
    assert (found["passed"], found["level"]) == (False, "error")
    assert "out" in found["details"]["wrong"]
    assert found["details"]["errors"]["out"] > found["details"]["limits"]["forward"]
    stop = events(run)[-1]
    assert (stop["event"], stop["status"], stop["exit_code"]) == ("run.stop", "refused", 78)
    assert "self-test failed" in stop["reason"]
    assert not events(run, "train.step")
    assert not events(run, "eval.result")
    assert not (run / "checkpoints").exists()
    assert check_log(run).violations == ()
    # With the kernel mended the same run goes on.
    assert train("--resume", run) == 0
    assert check_log(run).violations == ()


def test_what_is_not_finite_can_be_logged(
    train: Train, recipe: Path, tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "scatter", lambda out, y, at: out.fill_(float("nan")))
    assert train("--recipe", recipe, "--run-dir", tmp_path / "run") == 78
    (found,) = events(tmp_path / "run", "kernel.selftest")
    assert found["details"]["errors"]["out"] == "inf"


def test_neither_a_plan_nor_a_dense_model_is_tested(
    train: Train, recipe: Path, tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the self-test ran")

    monkeypatch.setattr(kernels, "self_test", never)
    assert train("--recipe", recipe, "--dry-run") == 0
    text = recipe.read_text().replace('preset = "cpu_tiny"', 'preset = "cpu_tiny_dense"')
    recipe.write_text(text)
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run, "--train.steps", "6") == 0
    assert not events(run, "kernel.selftest")


def _build(name: str) -> Build:
    return Build(name, 1.5, {"spec": {"S": 64}, "mode": "ws", "device": "cuda:0"})


def test_compilations_are_told_and_those_after_warm_up_are_anomalies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = [_build("before")]
    monkeypatch.setattr(kernels, "compiled_kernels", lambda backend: tuple(built))
    with RunLog.open(tmp_path, run_id="r", attempt=0, rank=0) as log:
        watch = KernelWatch(log, "tilelang")
        for phase, step, names in (
            ("selftest", None, ["fwd", "bwd"]), ("evaluation", 0, ["fwd_long"]), ("step", 1, ["bwd_long"]),
            ("step", 2, []), ("evaluation", 4, []), ("step", 5, ["again", "and_again"]), ("evaluation", 8, ["late"]),
        ):  # fmt: skip
            built += [_build(name) for name in names]
            watch.report(phase, step)
        silent = KernelWatch(log, None)
        silent.report("step", 9)
    found = list(read_events(tmp_path))
    assert [(e["kernel"], e["step"]) for e in found if e["event"] == "kernel.compiled"] == [
        ("fwd", None), ("bwd", None), ("fwd_long", 0), ("bwd_long", 1), ("again", 5), ("and_again", 5), ("late", 8),
    ]  # fmt: skip
    assert found[0]["seconds"] == 1.5
    assert found[0]["cached"] is None
    assert found[0]["details"]["mode"] == "ws"
    anomalies = [e for e in found if e["event"] == "anomaly.generic"]
    assert [(e["step"], e["details"]["kernels"], e["details"]["phase"]) for e in anomalies] == [
        (5, ["again", "and_again"], "step"), (8, ["late"], "evaluation"),
    ]  # fmt: skip
    assert {(e["what"], e["level"]) for e in anomalies} == {(kernels.RECOMPILED, "warning")}
    assert anomalies[0]["details"]["seconds"] == 3


def test_the_loop_reports_what_is_compiled(
    train: Train, recipe: Path, tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel in the first step, and one too many in the third."""
    built: list[Build] = []
    steps = {"n": 0}
    monkeypatch.setattr(kernels, "compiled_kernels", lambda backend: tuple(built))
    one = loop.train_step

    def compiling(*args: Any, **options: Any) -> Any:
        steps["n"] += 1
        if steps["n"] in (1, 3):
            built.append(_build(f"step{steps['n']}"))
        return one(*args, **options)

    monkeypatch.setattr(loop, "train_step", compiling)
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run) == 0
    assert [(e["kernel"], e["step"]) for e in events(run, "kernel.compiled")] == [("step1", 1), ("step3", 3)]
    (anomaly,) = events(run, "anomaly.generic")
    assert (anomaly["what"], anomaly["step"]) == (kernels.RECOMPILED, 3)
    assert check_log(run).violations == ()


def test_the_hopper_kernels_are_tested_at_both_lengths_with_the_gates_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Events
) -> None:
    """Their sources run on the CPU; the short sequence and the micro-batch have one length here, to compile once."""
    monkeypatch.setattr(installed, "_PROCESS", installed.GateState())
    mixer = MixerConfig(nheads=2, headdim=8, d_state=8, mimo_rank=2, chunk_size=4)
    model: Any = SimpleNamespace(
        choices={"mimo": Choice("tilelang", "as on an H200")}, config=SimpleNamespace(mixer=mixer), parallel=None
    )
    on_cpu = Lane(torch.device("cpu"), "a CPU", "fp32", {})
    with RunLog.open(tmp_path, run_id="r", attempt=0, rank=0) as log:
        installed.install(resolve({}, Facts()), None, log)
        watch = KernelWatch(log, "tilelang")
        results = check_scan(model, on_cpu, log, watch, tokens=11)
    assert [(result.against, result.tokens) for result in results] == [("reference", 11), ("chunked", 11)]
    tests = events(tmp_path, "kernel.selftest")
    off = {"tma": "off", "warp_specialization": "off", "split_scan": "off", "psiv": "off"}
    assert [(e["passed"], e["details"]["against"], e["details"]["gates"]) for e in tests] == [
        (True, "reference", off), (True, "chunked", off),
    ]  # fmt: skip
    assert [event["gate"] for event in events(tmp_path, "gate.exposed")] == list(GATES.values())
    assert {event["details"]["mode"][:9] for event in events(tmp_path, "kernel.compiled")} <= {"c:float32"}


def test_a_stage_of_the_cache_that_the_cpu_has_not(
    train: Train, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FATHOM_PSIV_CACHE", "bwd_bwd_reuse")
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run) == 78
    said = "scan backend chunked has no stage bwd_bwd_reuse; the stages it has: none"
    assert said in capsys.readouterr().err
    names = [event["event"] for event in read_events(run)]
    assert names == ["run.start", "config.resolved", "gate.refused", "run.stop"]
    assert check_log(run).violations == ()


def test_tma_for_all_with_a_kernel_in_rank_3_tiles(
    train: Train, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As gathered on an H200 whose bwd_bwd has a rank-3 tile; how that is found out: test_capabilities."""
    gathered = Facts(
        device="cuda", compute_capability=(9, 0), packages={"tilelang": "0.1.15"}, mimo_backend="tilelang",
        two_d_kernels=("fwd", "bwd_fwd"),
    )  # fmt: skip
    monkeypatch.setattr(ranks, "gather_facts", lambda *_: gathered)
    monkeypatch.setenv("FATHOM_TMA", "all")
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run) == 78
    assert "needs rank-2 shared tiles, which these kernels of tilelang lack: bwd_bwd" in capsys.readouterr().err
    assert "train.step" not in [event["event"] for event in read_events(run)]


def test_a_shape_outside_the_tile_table(
    train: Train, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the Hopper kernels can run, a model that they are not built for does not start, and leaves nothing."""
    monkeypatch.setattr(facts, "choose_backend", lambda *_: Choice("tilelang", "as on an H200"))
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run, "--train.precision", "bf16") == 2
    said = capsys.readouterr().err
    assert "N=16, P=16, R=2, C=8; nearest: N=16, P=64, R=4, C=8" in said
    assert "mimo_backend=chunked" in said
    assert not run.exists()


def test_the_facts_of_the_hopper_backend(
    train: Train, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape of the table: its kernels are asked what they offer."""
    asked: list[Any] = []
    monkeypatch.setattr(facts, "choose_backend", lambda *_: Choice("tilelang", "as on an H200"))
    monkeypatch.setattr(facts, "capabilities", lambda *a: asked.append(a) or facts.NOTHING)
    monkeypatch.setenv("FATHOM_SPLIT_SCAN", "auto")
    words = ["--recipe", recipe, "--run-dir", tmp_path / "run", "--train.precision"]
    assert train(*words, "fp32") == 2
    assert train(*words, "bf16") == 78
    (_, (backend, geometry)) = asked
    assert backend == "tilelang"
    assert geometry == (4, 1, 2, 16, 16, 8, 4, False)


def test_too_much_shared_memory_stops_before_step_1(
    train: Train,
    recipe: Path,
    tmp_path: Path,
    events: Events,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first launch is in the self-test."""
    monkeypatch.setattr(kernels, "self_test", lambda *_, **__: require_shared("bwd_bwd", 240_000))
    run = tmp_path / "run"
    assert train("--recipe", recipe, "--run-dir", run) == 2
    assert "bwd_bwd needs 240000 bytes of shared memory a block, Hopper has 232448" in capsys.readouterr().err
    stop = events(run)[-1]
    assert (stop["status"], stop["exit_code"]) == ("failed", 2)
    assert not events(run, "train.step")
    assert json.loads((run / "config.json").read_text())["run_id"] == stop["run_id"]
