"""Generator of the suite `needle`: C++ declarations put into real sources, and a question about each.

Pure: the same split, lengths and seed give the same items. Not for asking or scoring (needle.py).

    single       one declaration in the context:           static constexpr int kRingBudget = 48213;
    multi_key    one at every depth, each with its name
    multi_value  an array of three values, all of them asked for
    alias_using  a struct holds the value; the name asked for reaches it over two `using` declarations
    alias_auto   the same over two `constexpr auto` variables
    alias_macro  the same over two macros
    distractor   a second name that differs in one character, with another value
    namespace    the same name in another namespace, with another value
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from apps.eval.suites.haystack import (
    NO_IDS,
    Haystack,
    Ids,
    Line,
    Place,
    Sources,
    nearest_place,
    places_from,
    put_in,
)
from apps.eval.suites.suite import SuiteInput

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CONTROL_DEPTHS = (0.25, 0.75)  # contexts of `single` that are asked for a name that is nowhere, too
CHOICES = 4
SHORT, LONG = 1024, 4096
DEPTH_SLACK = 0.125  # half a step of the grid
_SPARE = 4  # tokens per line for its break and indentation, and because names and values differ in length
_WORDS = (
    "Arena", "Batch", "Block", "Bound", "Budget", "Buffer", "Bucket", "Cache", "Chunk", "Clock", "Cursor",
    "Delta", "Depth", "Epoch", "Fence", "Field", "Flush", "Frame", "Grain", "Graph", "Guard", "Heap", "Index",
    "Join", "Kernel", "Lane", "Latch", "Limit", "Mask", "Merge", "Node", "Offset", "Page", "Panel", "Pivot",
    "Pool", "Probe", "Queue", "Quota", "Range", "Retry", "Ring", "Round", "Scale", "Shard", "Slice", "Slot",
    "Span", "Spill", "Stage", "Step", "Stride", "Table", "Tile", "Trace", "Wave",
)  # fmt: skip


class Fact(NamedTuple):
    """What one question is about.

    line: the declaration with the value. later: lines that lead from it to the name asked for, in order. decoys: lines
    that must not be taken for it. ask: the text up to the answer. wrong: answers that the decoys give.
    """

    line: bytes
    later: tuple[bytes, ...]
    decoys: tuple[bytes, ...]
    ask: bytes
    answer: bytes
    wrong: tuple[bytes, ...]


class Draw:
    """Names and values that repeat neither each other nor anything in `text`."""

    def __init__(self, text: bytes, key: str) -> None:
        self.random = random.Random(key)
        self._text, self._taken = text, set[bytes]()

    def _new(self, make: Callable[[], bytes]) -> bytes:
        while True:
            made = make()
            if made not in self._taken and made not in self._text:
                self._taken.add(made)
                return made

    def words(self) -> list[str]:
        """Three different words whose joined name is new."""
        return self._new(lambda: " ".join(self.random.sample(_WORDS, 3)).encode()).decode().split()

    def name(self) -> bytes:
        """As kRingBudgetSlot."""
        return b"k" + "".join(self.words()).encode()

    def beside(self, name: bytes) -> bytes:
        """A name that differs from `name` in one character."""

        def make() -> bytes:
            at = self.random.randrange(1, len(name))
            other = self.random.choice([c for c in b"abcdefghijklmnopqrstuvwxyz" if c != name[at]])
            return name[:at] + bytes([other]) + name[at + 1 :]

        return self._new(make)

    def value(self) -> bytes:
        """Five digits."""
        return self._new(lambda: str(self.random.randrange(10_000, 100_000)).encode())


def _equals(name: bytes) -> bytes:
    return b"\n\nstatic_assert(" + name + b" == "


def _constant(name: bytes, value: bytes) -> bytes:
    return b"static constexpr int " + name + b" = " + value + b";"


def _plain(draw: Draw) -> Fact:
    name, value = draw.name(), draw.value()
    return Fact(_constant(name, value), (), (), _equals(name), value, ())


def _multi_value(draw: Draw) -> Fact:
    name, values = draw.name(), b", ".join(draw.value() for _ in range(3))
    line = b"static constexpr int " + name + b"[] = {" + values + b"};"
    return Fact(line, (), (), b"\n\nstatic_assert(same(" + name + b", {", values, ())


def _alias_using(draw: Draw) -> Fact:
    first, second, third = ("".join(draw.words()).encode() for _ in range(3))
    value = draw.value()
    line = b"struct " + first + b" { static constexpr int value = " + value + b"; };"
    later = (b"using " + second + b" = " + first + b";", b"using " + third + b" = " + second + b";")
    return Fact(line, later, (), _equals(third + b"::value"), value, ())


def _alias_auto(draw: Draw) -> Fact:
    first, second, third = (draw.name() for _ in range(3))
    value = draw.value()
    later = tuple(b"static constexpr auto " + a + b" = " + b + b";" for a, b in ((second, first), (third, second)))
    return Fact(_constant(first, value), later, (), _equals(third), value, ())


def _alias_macro(draw: Draw) -> Fact:
    first, second, third = ("_".join(draw.words()).upper().encode() for _ in range(3))
    value = draw.value()
    later = (b"#define " + second + b" " + first, b"#define " + third + b" " + second)
    return Fact(b"#define " + first + b" " + value, later, (), _equals(third), value, ())


def _distractor(draw: Draw) -> Fact:
    name, value, wrong = draw.name(), draw.value(), draw.value()
    decoy = _constant(draw.beside(name), wrong)
    return Fact(_constant(name, value), (), (decoy,), _equals(name), value, (wrong,))


def _namespace(draw: Draw) -> Fact:
    inside, other = (draw.words()[0].lower().encode() + b"_" + draw.value() for _ in range(2))
    name, value, wrong = draw.name(), draw.value(), draw.value()
    line, decoy = (
        b"namespace " + space + b" { " + _constant(name, v) + b" }" for space, v in ((inside, value), (other, wrong))
    )
    return Fact(line, (), (decoy,), _equals(inside + b"::" + name), value, (wrong,))


KINDS: Mapping[str, Callable[[Draw], Fact]] = MappingProxyType(
    {
        "single": _plain,
        "multi_key": _plain,
        "multi_value": _multi_value,
        "alias_using": _alias_using,
        "alias_auto": _alias_auto,
        "alias_macro": _alias_macro,
        "distractor": _distractor,
        "namespace": _namespace,
    }
)


class Needle(NamedTuple):
    """One question. choices: right first. depth: asked for; placed: token of the declaration over all tokens."""

    item: str
    kind: str
    depth: float
    placed: float
    fact: Fact
    choices: tuple[bytes, ...]


class Context(NamedTuple):
    """A haystack with its needles. ids are empty and `reason` is set when it could not be made.

    control: a question about a name that is nowhere, and its choices, of which the first counts as right.
    """

    name: str
    kind: str
    length: int
    ids: Ids
    documents: tuple[int, ...]
    needles: tuple[Needle, ...]
    control: tuple[bytes, tuple[bytes, ...]] | None
    reason: str | None


def contexts(inputs: SuiteInput, lengths: Sequence[int], items: int | None, seed: int) -> Iterator[Context]:
    """Every context of the grid: lengths x repeats x kinds, and for `single` x depths.

    Args:
        items: repeats; None: two up to 1,024 tokens, else one.

    Elsewhere than in `single` all depths have their declarations, and two are asked for (one above 4,096 tokens): those
    that come next as kinds and repeats go on, so that all are asked for about equally often.
    """
    sources = Sources(inputs)
    for length in lengths:
        for repeat in range(items or (2 if length <= SHORT else 1)):
            for number, kind in enumerate(KINDS):
                if kind == "single":
                    for depth in DEPTHS:
                        name = f"{kind}/{length}/{repeat}/{depth}"
                        yield _context(inputs, sources, _Plan(name, kind, length, (depth,), (depth,)), seed)
                else:
                    steps = (0,) if length > LONG else (0, 2)
                    asked = tuple(DEPTHS[(number + repeat + step) % len(DEPTHS)] for step in steps)
                    plan = _Plan(f"{kind}/{length}/{repeat}", kind, length, DEPTHS, asked)
                    yield _context(inputs, sources, plan, seed)


class _Plan(NamedTuple):
    """depths: where declarations go. asked: those that are asked for."""

    name: str
    kind: str
    length: int
    depths: tuple[float, ...]
    asked: tuple[float, ...]


def _context(inputs: SuiteInput, sources: Sources, plan: _Plan, seed: int) -> Context:
    name, kind, length, depths, _ = plan
    key = f"{seed}:needle:{name}"
    first = random.Random(key).randrange(len(sources))
    planned = [KINDS[kind](Draw(b"", key)) for _ in depths]  # for its size alone: the text is not known yet
    room = length - max(_size(inputs, [fact]) for fact in planned) - _size(inputs, planned)
    found = (sources.haystack(room, first + step) for step in range(len(sources) if room > 0 else 0))
    haystack = next((h for h in found if h and all(_off(h, depth) <= DEPTH_SLACK for depth in depths)), None)
    if haystack is None:
        reason = f"no text of {length} tokens with places for depths {', '.join(map(str, depths))}"
        return Context(name, kind, length, NO_IDS, (), (), None, reason)
    draw = Draw(inputs.tokenizer.decode(haystack.ids), key)
    facts = [KINDS[kind](draw) for _ in depths]
    ids, starts = put_in(inputs, haystack, _lines(haystack, facts, depths, draw.random))
    needles = tuple(
        Needle(f"{name}@{depth}", kind, depth, start / ids.size, fact, _choices(fact, facts, draw))
        for fact, depth, start in zip(facts, depths, starts, strict=False)
        if depth in plan.asked
    )
    control = None
    if kind == "single" and depths[0] in CONTROL_DEPTHS:
        nowhere = b"k" + bytes(draw.random.choices(b"abcdefghijklmnopqrstuvwxyz", k=14))
        control = _equals(nowhere), tuple(draw.value() for _ in range(CHOICES))
    return Context(name, kind, length, ids, haystack.documents, needles, control, None)


def _off(haystack: Haystack, depth: float) -> float:
    return abs(nearest_place(haystack, depth).token / haystack.ids.size - depth)


def _size(inputs: SuiteInput, facts: Sequence[Fact]) -> int:
    """Tokens that the lines, a question and an answer take, about."""
    lines = [line for fact in facts for line in (fact.line, *fact.later, *fact.decoys)]
    spoken = facts[0].ask + facts[0].answer
    return sum(int(inputs.tokenizer.encode(line).size) + _SPARE for line in [*lines, spoken])


def _lines(haystack: Haystack, facts: Sequence[Fact], depths: Sequence[float], draw: random.Random) -> list[Line]:
    """The declarations first, in the order of `facts`; then what leads from them, behind them; decoys anywhere."""
    at = [nearest_place(haystack, depth) for depth in depths]
    lines = [Line(place, fact.line) for place, fact in zip(at, facts, strict=True)]
    for place, fact in zip(at, facts, strict=True):
        behind: list[Place] = sorted(draw.choices(places_from(haystack, place), k=len(fact.later)))
        lines += [Line(there, text) for there, text in zip(behind, fact.later, strict=True)]
        lines += [Line(draw.choice(haystack.places), text) for text in fact.decoys]
    return lines


def _choices(fact: Fact, facts: Sequence[Fact], draw: Draw) -> tuple[bytes, ...]:
    """The answer, what its decoys give, then other answers of the context, then values that are nowhere."""
    others = [other.answer for other in facts if other is not fact]
    wrong = [*fact.wrong, *draw.random.sample(others, min(len(others), CHOICES - 1))]
    while len(wrong) < CHOICES - 1:
        wrong.append(draw.value())
    return (fact.answer, *wrong[: CHOICES - 1])
