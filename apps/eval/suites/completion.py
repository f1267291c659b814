"""Suite `completion`: fill-in-the-middle in real files, line, block and syntax node, in both orders.

What the model writes is cut where its span ends and compared with what stood there; the file with it is parsed. Nothing
is compiled or run: that would need a sandbox. The generator is completion_items.py.
"""

from __future__ import annotations

from functools import partial

from apps.eval.suites.completion_items import ORDERS, Item, items, prompt
from apps.eval.suites.cpp import error_count
from apps.eval.suites.generation import (
    CHANCES,
    MEANING,
    controls,
    judge,
    line_stops,
    question,
    random_text,
    reference_bpb,
    sort_out,
    special_stops,
)
from apps.eval.suites.output import Judged, Made, question_output
from apps.eval.suites.questions import Reply, ask_all
from apps.eval.suites.scoring import Row, tabulate
from apps.eval.suites.suite import OnProgress, Suite, SuiteInput, SuiteOptions, SuiteOutput

FILES = 12
MOST_TOKENS = 8192
SYNTAX = {"syntax_valid": "share of files that have no more syntax errors with the answer than with the reference"}


def run(inputs: SuiteInput, options: SuiteOptions, on_progress: OnProgress) -> SuiteOutput:
    """Take spans out, ask for them in both orders, and judge.

    Raises:
        UserError: the split has no file with a function that fits.
    """
    most = min(options.max_tokens, options.contexts[-1] if options.contexts else MOST_TOKENS)
    made = list(items(inputs, most, options.items or FILES, options.seed))
    usable, excluded = sort_out(
        made, "no file of the split has a function", "give longer --context, or data with --mix file=1,..."
    )
    lines, others = line_stops(inputs.tokenizer), special_stops(inputs.tokenizer)
    asked = [
        question(
            inputs.tokenizer, f"{item.item}/{order}", prompt(inputs, item, order), item.middle,
            lines if item.span == "line" else others,
        )
        for item in usable
        for order in ORDERS
    ]  # fmt: skip
    replies = ask_all(inputs.engines, asked, seed=options.seed, on_progress=partial(on_progress, "spans"))
    rows: list[Row] = []
    pairs: dict[str, tuple[bytes, bytes]] = {}
    for number, item in enumerate(usable):
        for order in ORDERS:
            reply = replies.by_item[f"{item.item}/{order}"]
            spoken = cut(inputs.tokenizer.decode_generated(reply.tokens), item.span, len(item.middle))
            rows.append(_judge(item, order, spoken, reply))
            pairs[rows[-1].item] = (spoken, item.middle)
        on_progress("judging", number + 1, len(usable))
    chances = {**CHANCES, **dict.fromkeys(SYNTAX)}
    control, controlled = controls(rows, pairs, seed=options.seed)
    broken = [_control(item, options.seed) for item in usable]
    totals = [score for by in (("order",), ("span",)) for score in tabulate(rows, by, chances, seed=options.seed)]
    controlled += tabulate(broken, ("against",), chances, seed=options.seed)
    cells = tabulate(rows, ("span", "order"), chances, seed=options.seed)
    made_of = Made(asked, replies.use, excluded, len(made) * len(ORDERS))
    judged = Judged(rows, control + broken, cells, totals, controlled)
    return question_output("completion", inputs, MEANING | SYNTAX, judged, made_of)


def cut(spoken: bytes, span: str, reference_bytes: int) -> bytes:
    """The answer as far as its span goes: a line to its break, a block to the brace that closes it, a node to the
    reference's length, because a node has no end of its own."""
    if span == "line":
        return spoken.split(b"\n")[0]
    if span == "node":
        return spoken[:reference_bytes]
    depth = 0
    for place, byte in enumerate(spoken):
        depth += (byte == ord("{")) - (byte == ord("}"))
        if depth < 0:
            return spoken[:place]
    return spoken


def syntax_valid(item: Item, middle: bytes) -> float:
    """1 when the parser finds no more errors in the file with `middle` than with the reference."""
    reference = error_count(item.before + item.middle + item.after)
    return float(error_count(item.before + middle + item.after) <= reference)


def _judge(item: Item, order: str, spoken: bytes, reply: Reply) -> Row:
    values = judge(spoken, item.middle)
    values |= {
        "reference_bpb": reference_bpb(reply.logprobs[0], item.middle),
        "syntax_valid": syntax_valid(item, spoken),
    }
    return Row(
        item=f"{item.item}/{order}",
        unit=f"document {item.document}",
        axes={"span": item.span, "order": order},
        values=values,
        record={
            "document": item.document, "reference": item.middle.decode("utf-8", "backslashreplace"),
            "spoken": spoken.decode("utf-8", "backslashreplace"),
        },
    )  # fmt: skip


def _control(item: Item, seed: int) -> Row:
    """How often a random string passes for C++."""
    text = random_text(len(item.middle), f"{seed}:{item.item}:syntax")
    values = {"syntax_valid": syntax_valid(item, text)}
    return Row(f"{item.item}/random_string", f"document {item.document}", {"against": "random_string"}, values, {})


COMPLETION = Suite(
    name="completion",
    version=1,
    summary="fill-in-the-middle of a line, a block and a syntax node, prefix or suffix first",
    run=run,
)
