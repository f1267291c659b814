"""Suite `scope`: does the model prefer the name that is in scope to one that is not, all else equal?

Two continuations of one context are compared by log-likelihood; nothing is generated. The generator is scope_items.py.
"""

from __future__ import annotations

from functools import partial

from apps.eval.results import Excluded
from apps.eval.suites.output import Judged, Made, question_output
from apps.eval.suites.questions import Question, Reply, ask_all
from apps.eval.suites.scope_items import Context, Item, made_contexts, real_contexts
from apps.eval.suites.scoring import Row, chance_of_first, tabulate
from apps.eval.suites.suite import OnProgress, Suite, SuiteInput, SuiteOptions, SuiteOutput
from libs.flags.errors import UserError
from libs.model.text.tokenizer import Tokenizer

LENGTHS = (1024, 4096, 16_384)
REAL = 24  # pairs of real files, times --items
CHANCES = {"right": 0.5}
MEANING = {
    "right": "share of pairs whose right name has the higher log-likelihood, summed over its tokens; a tie is one half"
}


def run(inputs: SuiteInput, options: SuiteOptions, on_progress: OnProgress) -> SuiteOutput:
    """Make the pairs, score both names of each, and compare.

    Raises:
        UserError: no pair could be made, or a length is longer than `max_tokens`.
    """
    lengths = options.contexts or LENGTHS
    if lengths[-1] > options.max_tokens:
        raise UserError(f"--context {lengths[-1]} exceeds --max-tokens {options.max_tokens}")
    made: list[Context] = []
    for found in (
        made_contexts(inputs, lengths, options.items, options.seed),
        real_contexts(inputs, lengths[-1], REAL * (options.items or 1), options.seed),
    ):
        for context in found:
            made.append(context)
            on_progress("making pairs", len(made), len(made))
    excluded = [
        Excluded(item=context.name, tokens=context.length, reason=context.reason)
        for context in made
        if context.reason is not None
    ]
    usable = [context for context in made if context.reason is None]
    asked = [_question(inputs.tokenizer, context, item) for context in usable for item in context.items]
    if not asked:
        raise UserError(f"nothing to ask: {excluded[0].reason if excluded else 'no file has a function'}")
    replies = ask_all(inputs.engines, asked, seed=options.seed, on_progress=partial(on_progress, "pairs"))
    judged = [_judge(context, item, replies.by_item[item.item]) for context in usable for item in context.items]
    rows = [row for row in judged if "kind" in row.axes]
    control = [row for row in judged if "kind" not in row.axes]
    seed = options.seed
    totals = [
        score
        for by in ((), ("kind",), ("length",), ("kind", "length"), ("kind", "distance"))
        for score in tabulate(rows, by, CHANCES, seed=seed)
    ]
    cells = tabulate(rows, ("kind", "length", "distance"), CHANCES, seed=seed)
    tables = Judged(rows, control, cells, totals, tabulate(control, (), CHANCES, seed=seed))
    made_of = Made(asked, replies.use, excluded, len(rows) + len(excluded))
    return question_output("scope", inputs, MEANING, tables, made_of)


def _question(tokenizer: Tokenizer, context: Context, item: Item) -> Question:
    choices = (tokenizer.encode(item.right), tokenizer.encode(item.wrong))
    return Question(item.item, context.ids, item.prompt, choices)


def _judge(context: Context, item: Item, reply: Reply) -> Row:
    axes: dict[str, str | int | float] = {} if item.kind == "control" else {"kind": item.kind}
    if item.distance is not None:
        axes["distance"] = item.distance
    if item.kind != "real":
        axes["length"] = context.length
    return Row(
        item=item.item,
        unit=context.name if item.kind != "real" else f"document {context.documents[0]}",
        axes=axes,
        values={"right": chance_of_first(reply.sums)},
        record={
            "tokens": int(context.ids.size + item.prompt.size), "placed": item.placed,
            "right": item.right.decode("utf-8", "backslashreplace"),
            "wrong": item.wrong.decode("utf-8", "backslashreplace"),
            "log_likelihoods": list(reply.sums), "documents": list(context.documents),
        },
    )  # fmt: skip


SCOPE = Suite(
    name="scope",
    version=1,
    summary="the name that is in scope against one that is not, by kind and distance to the declaration",
    run=run,
)
