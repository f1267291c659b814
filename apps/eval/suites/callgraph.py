"""Suite `callgraph`: is a name from another file used rightly, with no, same-file and full context?

The next line is generated greedily and compared with the one that stands there. The generator is callgraph_items.py.
"""

from __future__ import annotations

from functools import partial

from apps.eval.suites.callgraph_items import CONTEXTS, Item, items
from apps.eval.suites.generation import (
    CHANCES,
    MEANING,
    controls,
    judge,
    line_stops,
    question,
    reference_bpb,
    sort_out,
)
from apps.eval.suites.output import Judged, Made, question_output
from apps.eval.suites.questions import Reply, ask_all
from apps.eval.suites.scoring import Row, tabulate
from apps.eval.suites.suite import OnProgress, Suite, SuiteInput, SuiteOptions, SuiteOutput

ITEMS = 24
MOST_TOKENS = 16_384


def run(inputs: SuiteInput, options: SuiteOptions, on_progress: OnProgress) -> SuiteOutput:
    """Cut the targets, ask for the next line with each context, and judge.

    Raises:
        UserError: the split has no context graph with such a line.
    """
    most = min(options.max_tokens, options.contexts[-1] if options.contexts else MOST_TOKENS)
    made = list(items(inputs, most, options.items or ITEMS, options.seed))
    usable, excluded = sort_out(
        made,
        "no context graph of the split calls across files",
        "build the data with --mix callgraph=0.75,... or give longer --context",
    )
    stops = line_stops(inputs.tokenizer)
    asked = [
        question(inputs.tokenizer, f"{item.item}/{context}", item.prompts[context], item.line, stops)
        for item in usable
        for context in CONTEXTS
    ]
    replies = ask_all(inputs.engines, asked, seed=options.seed, on_progress=partial(on_progress, "next lines"))
    rows: list[Row] = []
    pairs: dict[str, tuple[bytes, bytes]] = {}
    for item in usable:
        for context in CONTEXTS:
            reply = replies.by_item[f"{item.item}/{context}"]
            spoken = inputs.tokenizer.decode_generated(reply.tokens).split(b"\n")[0].strip()
            rows.append(_judge(item, context, spoken, reply))
            pairs[rows[-1].item] = (spoken, item.line)
    control, controlled = controls(rows, pairs, seed=options.seed)
    totals = tabulate(rows, ("context",), CHANCES, seed=options.seed)
    made_of = Made(asked, replies.use, excluded, len(made) * len(CONTEXTS))
    return question_output("callgraph", inputs, MEANING, Judged(rows, control, totals, totals, controlled), made_of)


def _judge(item: Item, context: str, spoken: bytes, reply: Reply) -> Row:
    values = judge(spoken, item.line) | {"reference_bpb": reference_bpb(reply.logprobs[0], item.line)}
    return Row(
        item=f"{item.item}/{context}",
        unit=f"document {item.document}",
        axes={"context": context},
        values=values,
        record={
            "tokens": int(item.prompts[context].size), "name": item.name.decode(), "reference": item.line.decode(),
            "spoken": spoken.decode("utf-8", "backslashreplace"), "document": item.document,
        },
    )  # fmt: skip


CALLGRAPH = Suite(
    name="callgraph",
    version=1,
    summary="the next line calls what another file defines; with no, same-file and full context",
    run=run,
)
