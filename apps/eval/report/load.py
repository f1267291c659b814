"""A run directory read into one view: attempts, steps, gates, checkpoints, results, and what could not be read.

Not for drawing (figures.py) nor for layout (template.html.j2). Steps that a resumed attempt redid count once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from apps.eval.report.evidence import Proof, proofs
from apps.eval.results import EvalReport, read_result
from apps.eval.suites import SUITES
from libs.flags.catalog import CATALOG
from libs.flags.errors import UserError
from libs.flags.logcheck import LogReport, check_log
from libs.flags.runlog import read_events
from libs.flags.runs import verify_run
from libs.model.checkpoint import MARKER

Event = dict[str, Any]
VALIDATION = "validation"


class Attempt(NamedTuple):
    """One attempt. kind: "train" has a recipe, "eval" has none. status: None while there is no run.stop."""

    number: int
    kind: Literal["train", "eval"]
    command: str
    started: str
    stopped: str | None
    status: str | None
    exit_code: int | None
    reason: str


class GateView(NamedTuple):
    """One gate of the training run. outcome: off, active, refused, or "not resolved" beside a refusal.

    stage: when the run began. evidence: of today's catalogue; empty for a gate that it no longer has.
    """

    gate: str
    value: str
    outcome: str
    stage: str
    exposed: bool
    reason: str
    evidence: list[Proof]


class CheckpointView(NamedTuple):
    """state: committed, removed since (pruned), or aborted with the reason."""

    step: int
    path: str
    state: str
    sha256: str | None
    seconds: float | None


class Verdict(NamedTuple):
    """One check of the records. good: None when there was nothing to check."""

    what: str
    good: bool | None
    text: str


class RunView(NamedTuple):
    """Everything the report shows. problems: what of the run could not be read or is not its own, and is left out."""

    run_dir: Path
    run_id: str
    recipe: str | None
    attempts: list[Attempt]
    steps: list[Event]
    validations: list[Event]
    gates: list[GateView]
    gates_hash: str | None
    refusals: list[Event]
    config: dict[str, Any]
    origins: dict[str, str]
    environment: Event | None
    data: Event | None
    backends: list[Event]
    checkpoints: list[CheckpointView]
    incidents: list[Event]
    verdicts: list[Verdict]
    results: list[EvalReport]
    problems: list[str]

    @property
    def training(self) -> Attempt:
        """The last attempt that trained, or meant to."""
        trained = [attempt for attempt in self.attempts if attempt.kind == "train"]
        return (trained or self.attempts)[-1]


def load_run(run_dir: Path) -> RunView:
    """Read a run.

    Raises:
        UserError: not a run directory, a line that is not JSON, or a log without a single event that is sound.
    """
    events = list(read_events(run_dir))
    if not events:
        raise UserError(f"the run log of {run_dir} holds no event yet: nothing to report")
    checked = check_log(run_dir, known=events)
    events, damaged = _sound(events, checked)
    if not events:
        raise UserError(f"no line of the run log of {run_dir} is sound: see `fathom log check {run_dir}`")
    attempts = _attempts(events)
    trained = {attempt.number for attempt in attempts if attempt.kind == "train"}
    own = [event for event in events if event["attempt"] in trained] or events
    last = own[-1]["attempt"]
    latest = [event for event in own if event["attempt"] == last]
    refusals = [event for event in latest if event["event"] == "gate.refused"]
    resolved = _last(latest, "gates.resolved")
    config = _last(own, "config.resolved") or {}
    validations, blank = _validations(own)
    checkpoints = _checkpoints(run_dir, own)
    results, problems = _results(run_dir, {view.sha256 for view in checkpoints})
    return RunView(
        run_dir=run_dir,
        run_id=str(events[0]["run_id"]),
        recipe=next((e["recipe"] for e in own if e["event"] == "run.start"), None),
        attempts=attempts,
        steps=_surviving(own, "train.step"),
        validations=validations,
        gates=_gates(latest, resolved, refusals),
        gates_hash=None if resolved is None else str(resolved["hash"]),
        refusals=refusals,
        config=config.get("config", {}),
        origins=config.get("origins", {}),
        environment=_last(own, "env.snapshot"),
        data=_last(own, "data.fingerprint"),
        backends=[event for event in latest if event["event"] == "backend.chosen"],
        checkpoints=checkpoints,
        incidents=[e for e in events if e["event"].startswith(("anomaly.", "signal.", "gate.changed"))],
        verdicts=_verdicts(run_dir, checked),
        results=results,
        problems=damaged + blank + problems,
    )


def _sound(events: list[Event], report: LogReport) -> tuple[list[Event], list[str]]:
    """The events that are what their model says, and what is to be told of the others: a page can rely on the rest."""
    broken = {finding.line: finding.message for finding in report.violations if finding.rule == "schema"}
    if not broken:
        return events, []
    first = min(broken)
    told = f"{len(broken)} damaged lines of the run log are left out, the first at line {first}: {broken[first]}"
    return [event for line, event in enumerate(events, start=1) if line not in broken], [told]


def _last(events: Iterable[Event], name: str) -> Event | None:
    found = [event for event in events if event["event"] == name]
    return found[-1] if found else None


def _attempts(events: list[Event]) -> list[Attempt]:
    found: list[Attempt] = []
    for number in sorted({event["attempt"] for event in events}):
        mine = [event for event in events if event["attempt"] == number]
        start, stop = _last(mine, "run.start"), _last(mine, "run.stop")
        found.append(
            Attempt(
                number=number,
                kind="eval" if start is not None and start["recipe"] is None else "train",
                command="" if start is None else " ".join(start["command"]),
                started=mine[0]["ts"],
                stopped=None if stop is None else stop["ts"],
                status=None if stop is None else stop["status"],
                exit_code=None if stop is None else stop["exit_code"],
                reason="no run.stop: still going, or ended by a crash" if stop is None else stop["reason"],
            )
        )
    return found


def _surviving(events: list[Event], name: str) -> list[Event]:
    """The events of that name by step, without what a later attempt took back by restoring a checkpoint."""
    kept: dict[int, Event] = {}
    for event in events:
        if event["event"] == "checkpoint.restore":
            kept = {step: other for step, other in kept.items() if step <= event["step"]}
        elif event["event"] == name and event["step"] is not None:
            kept[event["step"]] = event
    return [kept[step] for step in sorted(kept)]


def _validations(events: list[Event]) -> tuple[list[Event], list[str]]:
    """The validations that say their bits per byte, and what is to be told of the others."""
    found = [event for event in _surviving(events, "eval.result") if event["suite"] == VALIDATION]
    blank = [event["step"] for event in found if "bpb" not in event["metrics"]]
    told = f"{len(blank)} validations without bits per byte are left out, the first at step {min(blank, default=0)}"
    return [event for event in found if "bpb" in event["metrics"]], [told] if blank else []


def _gates(latest: list[Event], resolved: Event | None, refusals: list[Event]) -> list[GateView]:
    exposed = {event["gate"] for event in latest if event["event"] == "gate.exposed"}
    if resolved is not None and not refusals:
        return [
            GateView(
                row["gate"], _word(row["value"]), row["outcome"], row["stage"], row["gate"] in exposed, row["reason"],
                _evidence(row["gate"]),
            )
            for row in resolved["gates"]
        ]  # fmt: skip
    views = [
        GateView(
            event["gate"] or "(no such gate)", event["value"], "refused",
            str(CATALOG[event["gate"]].stage) if event["gate"] in CATALOG else "", False,
            "; ".join([f"{event['variable']}={event['value']}", *event["failures"], *event["remedies"]]),
            _evidence(event["gate"]),
        )
        for event in refusals
    ]  # fmt: skip
    named = {view.gate for view in views}
    why = "the run stopped before a set of gates existed" if refusals else "the run recorded no gates"
    views += [
        GateView(name, "", "not resolved", str(spec.stage), False, why, proofs(spec))
        for name, spec in CATALOG.items()
        if name not in named
    ]
    return views


def _evidence(gate: str | None) -> list[Proof]:
    return proofs(CATALOG[gate]) if gate is not None and gate in CATALOG else []


def _word(value: bool | str) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else value


def _checkpoints(run_dir: Path, events: list[Event]) -> list[CheckpointView]:
    views: list[CheckpointView] = []
    for event in events:
        if event["event"] not in ("checkpoint.commit", "checkpoint.abort"):
            continue
        name = Path(event["path"]).name
        if event["event"] == "checkpoint.abort":
            state = f"aborted: {event.get('reason') or 'no reason given'}"
        else:
            there = (run_dir / "checkpoints" / name / MARKER).is_file()
            state = "committed" if there else "removed since"
        views.append(CheckpointView(event["step"], name, state, event.get("sha256"), event.get("seconds")))
    return views


def _verdicts(run_dir: Path, report: LogReport) -> list[Verdict]:
    """The audit chain of each rank and the rules of the run log, as `fathom flags verify` and `log check` say."""
    verdicts: list[Verdict] = []
    try:
        for rank, result in verify_run(run_dir).items():
            good = result.status != "tampered"
            verdicts.append(Verdict(f"audit chain, rank {rank}", good, f"{result.status}: {result.describe()}"))
    except UserError as error:
        verdicts.append(Verdict("audit chain", False, str(error)))
    broken = [f"line {finding.line}: {finding.rule}: {finding.message}" for finding in report.violations]
    text = "; ".join(broken[:8]) if broken else f"{report.events} events in {report.attempts} attempts keep every rule"
    verdicts.append(Verdict("run log", not broken, text))
    verdicts += [Verdict("run log, note", None, note.message) for note in report.notes]
    return verdicts


def _results(run_dir: Path, checkpoints: Collection[str | None]) -> tuple[list[EvalReport], list[str]]:
    """The newest result of each suite (older ones lie beside it under their time), if it is one of this run's.

    checkpoints: the sha256 of those that the run recorded.
    """
    results: list[EvalReport] = []
    problems: list[str] = []
    for suite in SUITES:
        path = run_dir / "eval" / f"{suite}.json"
        if path.is_file():
            try:
                result = read_result(path)
            except UserError as error:
                problems.append(str(error))
                continue
            made_of = result.checkpoint
            if result.suite != suite:
                problems.append(f"{path} is left out: it is a result of the suite {result.suite}")
            elif made_of.sha256 not in checkpoints:
                what = f"{made_of.path} of {made_of.model}, sha256 {made_of.sha256[:16]}"
                problems.append(f"{path} is left out: it is of a checkpoint that this run did not record ({what})")
            else:
                results.append(result)
    return results, problems
