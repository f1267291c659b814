"""From judged rows to what a suite gives back: the same for every suite that asks questions.

Not for judging (scoring.py) nor for the result file (apps.eval.results).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from apps.eval.results import Excluded, PrefixUse, QuestionScores, Score
from apps.eval.suites.questions import Question, hash_questions
from apps.eval.suites.scoring import Row, flat_metrics
from apps.eval.suites.suite import SuiteInput, SuiteOutput


class Judged(NamedTuple):
    """rows, control: every judged item. cells, totals, controls: their tables (see `QuestionScores`)."""

    rows: Sequence[Row]
    control: Sequence[Row]
    cells: list[Score]
    totals: list[Score]
    controls: list[Score]


class Made(NamedTuple):
    """asked: every question. use: what the cache did. available: items that were made, excluded ones included."""

    asked: Sequence[Question]
    use: PrefixUse
    excluded: Sequence[Excluded]
    available: int


def question_output(
    kind: Literal["needle", "scope", "callgraph", "completion"],
    inputs: SuiteInput,
    meaning: Mapping[str, str],
    judged: Judged,
    made: Made,
) -> SuiteOutput:
    """The output of the suite `kind`; the run log gets the totals over at most one axis, and the controls."""
    details = QuestionScores(
        kind=kind,
        metrics=dict(meaning),
        cells=judged.cells,
        totals=judged.totals,
        control=judged.controls,
        prefix=made.use,
        trained_window=inputs.trained_window,
    )
    lines = [row.line(control=False) for row in judged.rows] + [row.line(control=True) for row in judged.control]
    return SuiteOutput(
        scored=len(judged.rows),
        available=made.available,
        excluded=tuple(made.excluded),
        prompt_sha256=hash_questions(made.asked),
        metrics=flat_metrics([score for score in judged.totals if len(score.axes) < 2], judged.controls),
        items=tuple(lines),
        details=details,
    )
