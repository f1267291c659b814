"""The modelled time of a compiled program: loops multiply, the longest branch counts, kernels are told apart."""

from __future__ import annotations

import pytest

from libs.parallel.xla.cycles import Costly, Loop, Modelled, modelled_cycles
from libs.parallel.xla.hlo import parse

PROGRAM = """HloModule step, entry_computation_layout={()->f32[]}

%inner_body (p: f32[]) -> f32[] {
  %a = f32[] add(p, p), backend_config={"estimated_cycles":"7"}
}

%inner_condition (p: f32[]) -> pred[] {
  %bound = u32[] constant(5)
}

%body (p: f32[]) -> f32[] {
  %b = (f32[2,3]{1,0}, f32[]) fusion(p), metadata={op_name="call.7/dot.4"}, backend_config={"estimated_cycles":"100"}
  %w = f32[] while(%b), condition=%inner_condition, body=%inner_body
  %r = f32[] all-reduce(%w), replica_groups={}
}

%condition (p: f32[]) -> pred[] {
  %bound = s64[] constant(9)
}

%short (p: f32[]) -> f32[] {
  %s = f32[] add(p, p), backend_config={"estimated_cycles":"1"}
}

%long (p: f32[]) -> f32[] {
  %l = f32[] add(p, p), backend_config={"estimated_cycles":"50"}
}

%endless (p: f32[]) -> pred[] {
  %nothing = pred[] constant(true)
}

ENTRY %main (p: f32[]) -> f32[] {
  %x = f32[] fusion(p), backend_config={"estimated_cycles":"1000"}
  %loop = f32[] while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %c = f32[] conditional(%x, p, p), branch_computations={%short, %long}
  %k = f32[] custom-call(%c), custom_call_target="tpu_custom_call"
  %g = f32[] all-gather-start(%k), dimensions={0}
  %t = f32[] call(%g), to_apply=%long
  %u = f32[] while(%t), condition=%endless, body=%short
}
"""


def read(text: str) -> Modelled:
    return modelled_cycles(parse(text))


def test_loops_branches_and_calls_are_counted() -> None:
    found = read(PROGRAM)
    inner, outer = 7, 100 + 5 * 7
    assert found.cycles == 1000 + 10 * outer + 50 + 50 + 1
    assert Loop("inner_body", 5, inner) in found.loops
    assert Loop("body", 10, outer) in found.loops
    assert found.unknown == ("short",)
    assert found.uncounted == 1
    assert found.unestimated == 0


def test_what_takes_most_is_named_with_all_that_is_like_it() -> None:
    found = read(PROGRAM).costly
    assert found[:2] == (Costly("fusion", "f32[]", 1, 1000), Costly("fusion dot", "f32[2,3] and 1 more", 10, 1000))
    # Inside two loops, in a branch and in a call: 10 * 5 times 7, 50 twice, 1 twice (the short branch, the loop).
    assert found[2] == Costly("add", "f32[]", 10 * 5 + 4, 10 * 5 * 7 + 2 * 50 + 2 * 1)
    assert sum(one.cycles for one in found) == read(PROGRAM).cycles + 1


# -1, the largest signed number, and a sum with -1 in it: all were seen.
@pytest.mark.parametrize("none", [2**64 - 1, 2**63 - 1, 2**64 - 9_832_263])
def test_an_operation_without_an_estimate_is_told_not_added(none: int) -> None:
    text = PROGRAM.replace('"estimated_cycles":"7"', f'"estimated_cycles":"{none}"')
    found = read(text)
    assert found.cycles == read(PROGRAM).cycles - 10 * 5 * 7
    assert found.unestimated == 10 * 5


def test_a_changed_trip_count_changes_the_time() -> None:
    assert read(PROGRAM.replace('"n":"10"', '"n":"11"')).cycles - read(PROGRAM).cycles == 135
