"""The runs of `fathom bench loss-side`: trained and evaluated by the programs themselves, each in a process of its own.

What has been done stays: a run that was interrupted goes on, a finished one is read. Not for what is concluded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apps.eval.results import EvalReport, LossByPosition, read_result
from libs.flags.canonical import hash_json
from libs.flags.environment import child_environment
from libs.flags.errors import ExitStatus, RunRefused, UserError
from libs.flags.logcheck import check_log
from libs.flags.provenance import code_version
from libs.flags.runlog import read_events
from libs.flags.runs import is_run
from libs.model import dense_twin, preset

SUITE, SPLIT = "loss_by_position", "valid"
PLAN_FILE = "plan.json"
_NEVER = "1000000000"


class LossSidePlan(NamedTuple):
    """Two models, `seeds` seeds each, `steps` steps of one window of `window` tokens. documents: that are scored.

    recipe: everything else; words: more options of `fathom train`, for both models.
    """

    recipe: str
    hybrid: str
    window: int
    steps: int
    seeds: tuple[int, ...]
    documents: int
    max_tokens: int
    threads: int
    words: tuple[str, ...]

    @property
    def models(self) -> dict[str, str]:
        """Name here -> preset."""
        return {"hybrid": self.hybrid, "twin": dense_twin(preset(self.hybrid)).name}

    def pairs(self) -> list[tuple[str, int]]:
        """Every run, both models of a seed one after the other."""
        return [(model, seed) for seed in self.seeds for model in self.models]


class Trained(NamedTuple):
    """One finished run and its score. tokens: trained on. step_s: mean seconds of a step, the first ones left out."""

    model: str
    seed: int
    run: str
    score: EvalReport
    violations: int
    tokens: int
    data: str
    step_s: float
    threads: int

    @property
    def details(self) -> LossByPosition:
        assert isinstance(self.score.details, LossByPosition), SUITE
        return self.score.details


def run_all(plan: LossSidePlan, folder: Path) -> list[Trained]:
    """Train and evaluate whatever is missing in `folder`; all of it, in the order of `plan.pairs`.

    Raises:
        UserError: the folder is of another plan or other code, or a program failed. RunRefused: it was refused.
    """
    _claim(plan, folder)
    trained = []
    for number, (model, seed) in enumerate(plan.pairs(), start=1):
        run_dir = folder / f"{model}-seed{seed}"
        print(f"bench loss-side: {number} of {len(plan.pairs())}: {run_dir.name}", file=sys.stderr, flush=True)
        if _status(run_dir) != "completed":
            _program("apps.train", _train_words(plan, model, seed, run_dir))
        trained.append(_read(model, seed, run_dir, _scored(plan, run_dir)))
    return trained


def _scored(plan: LossSidePlan, run_dir: Path) -> EvalReport:
    """The result of this run's last checkpoint with the plan's sizes; evaluated, where there is no such result.

    Raises:
        UserError: even a new result is of something else.
    """
    path = run_dir / "eval" / f"{SUITE}.json"
    if path.is_file():
        score = read_result(path)
        unlike = _unlike(plan, run_dir, score)
        if not unlike:
            return score
        said = f"bench loss-side: {path} is of something else ({'; '.join(unlike)}): evaluated again, that one is kept"
        print(said, file=sys.stderr, flush=True)
    _program("apps.eval", _eval_words(plan, run_dir))
    score = read_result(path)
    if unlike := _unlike(plan, run_dir, score):
        raise UserError(
            f"{run_dir} is no run of this plan: {'; '.join(unlike)}; move it away, and the same command trains it anew"
        )
    return score


def _unlike(plan: LossSidePlan, run_dir: Path, score: EvalReport) -> list[str]:
    """In what a result is not of the last checkpoint of a run of this plan, scored as planned."""
    commits = [event["sha256"] for event in read_events(run_dir) if event["event"] == "checkpoint.commit"]
    wanted = {
        "step": (score.checkpoint.step, plan.steps),
        "checkpoint": (score.checkpoint.sha256, commits[-1] if commits else None),
        "split": (score.config.get("split"), SPLIT),
        "max_documents": (score.config.get("max_documents"), plan.documents),
        "max_tokens": (score.config.get("max_tokens"), plan.max_tokens),
    }
    return [f"{what} {found}, not {want}" for what, (found, want) in wanted.items() if found != want]


def _claim(plan: LossSidePlan, folder: Path) -> None:
    """Runs of two plans, or of two versions of the code, are not to be compared."""
    said = {"plan": json.loads(json.dumps(plan._asdict())), "code": code_version()}
    path = folder / PLAN_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--work {folder} has files and no {PLAN_FILE}: give an empty directory, or a new name")
        path.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    if hash_json(there) != hash_json(said):
        differing = sorted(k for k in said["plan"] if there["plan"].get(k) != said["plan"][k])
        what = f"another plan ({', '.join(differing)} differ)" if differing else "another version of the code"
        raise UserError(f"--work {folder} holds runs of {what}: give another directory, or the options it began with")


def _status(run_dir: Path) -> str | None:
    """How the last attempt to train ended; None where there was none, or it has no end."""
    if not is_run(run_dir):
        return None
    training, ended = False, None
    for event in read_events(run_dir):
        if event["event"] == "run.start":
            training, ended = event.get("recipe") is not None, None if event.get("recipe") else ended
        elif event["event"] == "run.stop" and training:
            ended = str(event["status"])
    return ended


def _train_words(plan: LossSidePlan, model: str, seed: int, run_dir: Path) -> list[str]:
    if is_run(run_dir):
        return ["--resume", str(run_dir)]
    warm_up = max(1, plan.steps // 20)
    settings = {
        "model.preset": plan.models[model],
        "data.window": plan.window,
        "data.windows_per_batch": 1,
        "data.seed": seed,
        "schedule.warmup_steps": warm_up,
        "schedule.decay_steps": max(1, plan.steps // 4),
        "train.steps": plan.steps,
        "train.seed": seed,
        "train.threads": plan.threads,
        "train.eval_every": _NEVER,
        "checkpoint.every": max(1, plan.steps // 4),
        "checkpoint.keep_last": 1,
        "log.tensorboard": "false",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return ["--recipe", plan.recipe, *words, *plan.words, "--run-dir", str(run_dir)]


def _eval_words(plan: LossSidePlan, run_dir: Path) -> list[str]:
    sizes = ["--max-documents", str(plan.documents), "--max-tokens", str(plan.max_tokens), "--ablation-documents", "2"]
    return ["--checkpoint", str(run_dir), "--suite", SUITE, "--split", SPLIT, *sizes]


def _program(module: str, words: Sequence[str]) -> None:
    """Run it without gates of this process's environment: the plan is all that counts."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words], env=child_environment({}), capture_output=True, text=True
    )
    if done.returncode == ExitStatus.GATE_REFUSED:
        raise RunRefused(f"{module} {' '.join(words)} is refused:\n{done.stderr.strip()}")
    if done.returncode != ExitStatus.OK:
        said = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise UserError(
            f"{module} {' '.join(words)} ended with exit status {done.returncode}; what is done is kept, the same "
            f"command goes on from there:\n{said}"
        )


def _read(model: str, seed: int, run_dir: Path, score: EvalReport) -> Trained:
    events: list[dict[str, Any]] = list(read_events(run_dir))
    by_step = {event["step"]: event for event in events if event["event"] == "train.step"}
    steps = [by_step[number] for number in sorted(by_step)]
    timed = [step["time_s"] for step in steps[len(steps) // 10 :]]
    first = {name: next(e for e in events if e["event"] == name) for name in ("data.fingerprint", "env.snapshot")}
    return Trained(
        model=model,
        seed=seed,
        run=run_dir.name,
        score=score,
        violations=len(check_log(run_dir).violations),
        tokens=steps[-1]["tokens_total"],
        data=first["data.fingerprint"]["fingerprint"],
        step_s=sum(timed) / len(timed),
        threads=first["env.snapshot"]["extra"]["threads"],
    )
