"""What suites share that let the model write C++ and compare it with what stood there.

Which items can be asked, the question, stop tokens, the reference's bits per byte, and the controls: each answer's
score against a random string, and against the reference of another item, which is what unrelated C++ scores.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from apps.eval.results import Excluded, Score
from apps.eval.suites.haystack import NO_IDS, Ids
from apps.eval.suites.questions import Question
from apps.eval.suites.scoring import Row, edit_similarity, exact_match, identifier_f1, identifier_match, tabulate
from libs.flags.errors import UserError
from libs.model.text.tokenizer import Tokenizer

MEANING = {
    "exact_match": "share of answers equal to the reference, blanks at both ends aside",
    "edit_similarity": "1 - Levenshtein distance / longer length, over bytes",
    "identifier_match": "share of answers with the reference's names in its order (keywords aside)",
    "identifier_f1": "harmonic mean of precision and recall over names",
    "reference_bpb": "bits per byte of the reference itself: what a model too small to answer can be compared by",
}
CHANCES: Mapping[str, float | None] = dict.fromkeys(MEANING)
_LETTERS = b"abcdefghijklmnopqrstuvwxyz_ ();"


class Item(Protocol):
    """item: its name. reason: why it is not asked, None when it is."""

    @property
    def item(self) -> str: ...
    @property
    def document(self) -> int: ...
    @property
    def reason(self) -> str | None: ...


_Item = TypeVar("_Item", bound=Item)


def sort_out(made: Sequence[_Item], nothing: str, remedy: str) -> tuple[list[_Item], list[Excluded]]:
    """The items to ask, and the others. nothing: what is said when none was made; remedy: what to do when none is left.

    Raises:
        UserError: nothing to ask.
    """
    excluded = [Excluded(item=i.item, document=i.document, tokens=0, reason=i.reason) for i in made if i.reason]
    usable = [item for item in made if item.reason is None]
    if not usable:
        why = excluded[0].reason if excluded else nothing
        raise UserError(f"nothing to ask: {why}; {remedy}")
    return usable, excluded


def answer_tokens(tokenizer: Tokenizer, reference: bytes) -> int:
    """Tokens that may be generated: half as many again as the reference has, and the line break."""
    return int(tokenizer.encode(reference).size) * 3 // 2 + 4


def question(tokenizer: Tokenizer, name: str, prompt: Ids, reference: bytes, stop_ids: tuple[int, ...]) -> Question:
    """What follows `prompt`? The reference is scored as a choice beside."""
    choices, new_tokens = (tokenizer.encode(reference),), answer_tokens(tokenizer, reference)
    return Question(name, NO_IDS, prompt, choices, new_tokens, stop_ids)


def line_stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every special token, and every token that begins with a line break."""
    ids = range(tokenizer.vocab_size)
    special = set(tokenizer.special_ids.values())
    return tuple(i for i in ids if i in special or tokenizer.piece(i)[:1] in (b"\n", b"\r"))


def special_stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every special token: none of them is text."""
    return tuple(sorted(tokenizer.special_ids.values()))


def judge(answer: bytes, reference: bytes) -> dict[str, float]:
    """The four comparisons of an answer with its reference."""
    return {
        "exact_match": exact_match(answer, reference),
        "edit_similarity": edit_similarity(answer, reference),
        "identifier_match": identifier_match(answer, reference),
        "identifier_f1": identifier_f1(answer, reference),
    }


def reference_bpb(logprobs: Sequence[float], reference: bytes) -> float:
    """Bits per byte of the reference from its tokens' log-probabilities in nats."""
    return -sum(logprobs) / (math.log(2) * len(reference))


def random_text(size: int, key: str) -> bytes:
    """`size` random letters, blanks and brackets."""
    return bytes(random.Random(key).choices(_LETTERS, k=size))


def controls(
    rows: Sequence[Row], pairs: Mapping[str, tuple[bytes, bytes]], *, seed: int
) -> tuple[list[Row], list[Score]]:
    """Each answer against a random string as long as its reference, and against the reference of another item.

    Args:
        pairs: (answer, reference) by the name of the row.
    """
    found: list[Row] = []
    references = [reference for _, reference in pairs.values()]
    for number, row in enumerate(rows):
        answer, reference = pairs[row.item]
        others = [other for other in references[number + 1 :] + references[:number] if other != reference]
        against = {"random_string": random_text(len(reference), f"{seed}:{row.item}")}
        against |= {"other_reference": others[0]} if others else {}
        for what, text in against.items():
            found.append(Row(f"{row.item}/{what}", row.unit, {"against": what}, judge(answer, text), {}))
    return found, tabulate(found, ("against",), CHANCES, seed=seed)
