"""Suite `needle`: is a C++ declaration found in 1k to 64k tokens of real source text?

Two measures: the answer that greedy generation gives, and the place of the right value among four by log-likelihood, in
which a small model shows signal long before it answers. The generator is needle_items.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from apps.eval.results import Excluded
from apps.eval.suites.needle_items import CHOICES, Context, Needle, contexts
from apps.eval.suites.output import Judged, Made, question_output
from apps.eval.suites.questions import Question, Reply, ask_all
from apps.eval.suites.scoring import Row, chance_of_first, rank_of_first, tabulate
from apps.eval.suites.suite import OnProgress, Suite, SuiteInput, SuiteOptions, SuiteOutput
from libs.flags.errors import UserError
from libs.model.text.tokenizer import Tokenizer

LENGTHS = (1024, 4096, 16_384)
CHANCES = {"exact_match": 0.0, "choice": 1 / CHOICES, "rank": (1 + CHOICES) / 2}
MEANING = {
    "exact_match": "share of greedy answers that are the right value, all three for an array",
    "choice": f"share of questions whose right value has the highest log-likelihood of {CHOICES}",
    "rank": f"mean rank of the right value among {CHOICES} by log-likelihood, 1 is best",
}


def run(inputs: SuiteInput, options: SuiteOptions, on_progress: OnProgress) -> SuiteOutput:
    """Make the grid, ask, and judge.

    Raises:
        UserError: no item could be made, or a length is longer than `max_tokens`.
    """
    lengths = options.contexts or LENGTHS
    if lengths[-1] > options.max_tokens:
        raise UserError(f"--context {lengths[-1]} exceeds --max-tokens {options.max_tokens}")
    made: list[Context] = []
    for context in contexts(inputs, lengths, options.items, options.seed):
        made.append(context)
        on_progress("making contexts", len(made), len(made))
    usable, excluded = _sort(inputs.tokenizer, made)
    if not usable:
        raise UserError(f"nothing to ask: {excluded[0].reason}; give shorter --context, or data with more text")
    asked = [question for context in usable for question in _questions(inputs.tokenizer, context)]
    replies = ask_all(inputs.engines, asked, seed=options.seed, on_progress=partial(on_progress, "needles"))
    rows = [
        _judge(inputs.tokenizer, context, needle, replies.by_item[needle.item])
        for context in usable
        for needle in context.needles
    ]
    control = [
        _judge_control(context, replies.by_item[_control_name(context)]) for context in usable if context.control
    ]
    seed, chances = options.seed, CHANCES
    totals = [
        score
        for by in ((), ("length",), ("kind",), ("kind", "length"))
        for score in tabulate(rows, by, chances, seed=seed)
    ]
    controls = tabulate(control, (), chances, seed=seed)
    judged = Judged(rows, control, tabulate(rows, ("length", "depth"), chances, seed=seed), totals, controls)
    made_of = Made(asked, replies.use, excluded, len(rows) + len(excluded))
    return question_output("needle", inputs, MEANING, judged, made_of)


def _sort(tokenizer: Tokenizer, made: Sequence[Context]) -> tuple[list[Context], list[Excluded]]:
    """Contexts that can be asked about, and those that could not be made or came out longer than their length."""
    usable, excluded = [], []
    for context in made:
        longest = max((q.longest for q in _questions(tokenizer, context)), default=0)
        reason = context.reason
        if reason is None and longest > context.length:
            reason = f"{longest} tokens, more than the {context.length} of its cell"
        if reason is None:
            usable.append(context)
        else:
            excluded.append(Excluded(item=context.name, tokens=longest, reason=reason))
    return usable, excluded


def _questions(tokenizer: Tokenizer, context: Context) -> list[Question]:
    found = [
        Question(
            item=needle.item,
            shared=context.ids,
            prompt=tokenizer.encode(needle.fact.ask),
            choices=tuple(tokenizer.encode(choice) for choice in needle.choices),
            # One more than the answer takes: what follows it shows whether the number ends there.
            new_tokens=int(tokenizer.encode(needle.fact.answer).size) + 1,
        )
        for needle in context.needles
    ]
    if context.control is not None:
        ask, choices = context.control
        encoded = tuple(tokenizer.encode(choice) for choice in choices)
        found.append(Question(_control_name(context), context.ids, tokenizer.encode(ask), encoded))
    return found


def _control_name(context: Context) -> str:
    return f"{context.name}/control"


def answers(spoken: bytes, answer: bytes) -> bool:
    """Whether a generated text begins with the answer, and the number ends there."""
    rest = spoken.lstrip()
    return rest.startswith(answer) and not rest[len(answer) : len(answer) + 1].isdigit()


def _judge(tokenizer: Tokenizer, context: Context, needle: Needle, reply: Reply) -> Row:
    spoken = tokenizer.decode_generated(reply.tokens)
    values = {
        "exact_match": float(answers(spoken, needle.fact.answer)),
        "choice": chance_of_first(reply.sums),
        "rank": rank_of_first(reply.sums),
    }
    return Row(
        item=needle.item,
        unit=context.name,
        axes={"kind": needle.kind, "length": context.length, "depth": needle.depth},
        values=values,
        record={
            "tokens": int(context.ids.size), "placed": needle.placed, "declaration": _text(needle.fact.line),
            "ask": _text(needle.fact.ask.strip()), "answer": _text(needle.fact.answer), "spoken": _text(spoken),
            "choices": [_text(choice) for choice in needle.choices], "log_likelihoods": list(reply.sums),
            "documents": list(context.documents),
        },
    )  # fmt: skip


def _judge_control(context: Context, reply: Reply) -> Row:
    assert context.control is not None
    return Row(
        item=_control_name(context),
        unit=context.name,
        axes={"length": context.length},
        values={"choice": chance_of_first(reply.sums), "rank": rank_of_first(reply.sums)},
        record={"ask": _text(context.control[0].strip()), "log_likelihoods": list(reply.sums)},
    )


def _text(raw: bytes) -> str:
    """For the item file: bytes that are no UTF-8 are shown escaped."""
    return raw.decode("utf-8", "backslashreplace")


NEEDLE = Suite(
    name="needle",
    version=1,
    summary="a C++ declaration in real sources, length x depth, asked for by generation and by choice",
    run=run,
)
