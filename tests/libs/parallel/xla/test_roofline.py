"""What is read and counted in the text of a compiled program: by hand, loops and slices included."""

from __future__ import annotations

import pytest

from libs.parallel.xla.hlo import Array, parse
from libs.parallel.xla.roofline import convolution_flops, count
from libs.parallel.xla.topology import V6E

# A loop of ten: a product of a slice of the first operand, added in place into the second; then collectives.
PROGRAM = """HloModule step, entry_computation_layout={()->f32[]}

%product (a: f32[10,8,16], w: f32[16,4], i: s32[]) -> f32[8,4] {
  %a = f32[10,8,16]{2,1,0:T(8,128)} parameter(0)
  %w = f32[16,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %c = s32[] constant(0)
  %s = f32[1,8,16]{2,1,0} dynamic-slice(%a, %i, %c, %c), dynamic_slice_sizes={1,8,16}
  %b = f32[8,16]{1,0} bitcast(%s)
  ROOT %d = f32[8,4]{1,0} convolution(%b, %w), dim_labels=bf_io->bf
}

%write (all: f32[10,8,4], one: f32[8,4], i: s32[]) -> f32[10,8,4] {
  %all = f32[10,8,4]{2,1,0} parameter(0)
  %one = f32[8,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %c = s32[] constant(0)
  %b = f32[1,8,4]{2,1,0} bitcast(%one)
  ROOT %u = f32[10,8,4]{2,1,0} dynamic-update-slice(%all, %b, %i, %c, %c)
}

%all-reduce-scatter (x: f32[16,4]) -> f32[4,4] {
  %x = f32[16,4]{1,0} parameter(0)
  %r = f32[16,4]{1,0} all-reduce(%x), replica_groups={}
  ROOT %s = f32[4,4]{1,0} slice(%r), slice={[0:4], [0:4]}
}

%body (p: (s32[], f32[10,8,16], f32[16,4], f32[10,8,4])) -> (s32[], f32[10,8,16], f32[16,4], f32[10,8,4]) {
  %p = (s32[], f32[10,8,16]{2,1,0}, f32[16,4]{1,0}, /*index=3*/f32[10,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %a = f32[10,8,16]{2,1,0} get-tuple-element(%p), index=1
  %w = f32[16,4]{1,0} get-tuple-element(%p), index=2
  %y = f32[10,8,4]{2,1,0} get-tuple-element(%p), index=3
  %near = f32[16,4]{1,0:T(8,128)S(1)} copy(%w)
  %g = f32[32,4]{1,0} all-gather(%y), dimensions={0}
  %d = f32[8,4]{1,0} fusion(%a, %near, %i), kind=kOutput, calls=%product
  %u = f32[10,8,4]{2,1,0} fusion(%y, %d, %i), kind=kLoop, calls=%write
  ROOT %t = (s32[], f32[10,8,16]{2,1,0}, f32[16,4]{1,0}, f32[10,8,4]{2,1,0}) tuple(%i, %a, %w, %u)
}

%condition (p: (s32[], f32[10,8,16], f32[16,4], f32[10,8,4])) -> pred[] {
  %bound = s32[] constant(10)
}

ENTRY %main (p: (s32[], f32[10,8,16], f32[16,4], f32[10,8,4])) -> f32[4,4] {
  %p = (s32[], f32[10,8,16]{2,1,0}, f32[16,4]{1,0}, f32[10,8,4]{2,1,0}) parameter(0)
  %loop = (s32[], f32[10,8,16]{2,1,0}, f32[16,4]{1,0}, f32[10,8,4]{2,1,0}) while(%p), condition=%condition, body=%body
  %w = f32[16,4]{1,0} get-tuple-element(%loop), index=2
  %start = (f32[16,4]{1,0}, f32[64,4]{1,0}) all-gather-start(f32[16,4]{1,0} %w), dimensions={0}
  %done = f32[64,4]{1,0} all-gather-done(%start)
  ROOT %r = f32[4,4]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_an_instruction_is_read_whole() -> None:
    program = parse(PROGRAM)
    assert program.entry == "main"
    loop = program.of("main")[1]
    assert (loop.operation, loop.operands, loop.named("body"), program.trips(loop)) == ("while", ("p",), "body", 10)
    assert loop.arrays[1] == Array("f32", (10, 8, 16), on_chip=False)
    assert program.of("main")[3].operands == ("w",)
    assert program.of("body")[5].arrays == (Array("f32", (16, 4), on_chip=True),)
    assert [(at.computation, at.times, at.in_loop) for at in program.executed()] == [
        ("main", 1, False),
        ("body", 10, True),
    ]
    assert Array("bf16", (3, 5), on_chip=False).nbytes == 30
    assert Array("pred", (), on_chip=False).nbytes == 1


def test_products_bytes_and_collectives_are_those_by_hand() -> None:
    found = count(parse(PROGRAM))
    assert found.flops == 10 * 2 * 8 * 4 * 16
    weight, a_slice, a_result, index = 16 * 4 * 4, 8 * 16 * 4, 8 * 4 * 4, 4
    in_body = weight  # the copy into the chip's own memory reads it; the product then reads none from HBM
    in_body += 32 * 4 * 4 + 10 * a_result  # gathered, and what of
    in_body += a_slice + index + a_result  # the product
    in_body += a_result + index + a_result  # written in place: no more of the whole than one part
    outside = (16 * 4 + 64 * 4) * 4 + weight + 4 * 4 * 4
    assert found.hbm_bytes == 10 * in_body + outside
    assert found.collectives == {"all-gather": 11, "reduce-scatter": 1}
    assert found.in_loops == {"all-gather": 10, "reduce-scatter": 0}
    assert found.exchanged == {"all-gather": 10 * 32 * 4 * 4 + 64 * 4 * 4, "reduce-scatter": weight}
    seconds = found.seconds(V6E)
    assert seconds == max(found.flops / V6E.peak_bf16, found.hbm_bytes / V6E.bandwidth)


@pytest.mark.parametrize(
    ("window", "labels", "left", "right", "made", "plain"),
    [
        ("", "bf_io->bf", (6, 5), (5, 7), (6, 7), 2 * 6 * 7 * 5),
        # A batch of 48 products, and heads side by side, as the TPU compiler writes them.
        (
            "window={size=48 stride=47 lhs_dilate=48}", "0bf_0io->0bf",
            (48, 5, 3), (48, 3, 7), (48, 5, 7), 48 * 2 * 5 * 7 * 3,
        ),
        (
            "window={size=4 pad=3_3 rhs_reversal=1}", "bf0_0oi->0fb",
            (6, 5, 1), (4, 7, 5), (4, 7, 6), 4 * 2 * 6 * 7 * 5,
        ),
        (
            "window={size=1x20 pad=0_0x19_19 rhs_reversal=0x1}", "0bf1_1oi0->0b1f",
            (4, 6, 5, 1), (20, 7, 5, 1), (4, 6, 20, 7), 4 * 20 * 2 * 6 * 7 * 5,
        ),
    ],
)  # fmt: skip
def test_a_product_in_the_compilers_words(
    window: str, labels: str, left: tuple[int, ...], right: tuple[int, ...], made: tuple[int, ...], plain: int
) -> None:
    """Each of these is a plain product of matrices, so many times: places of the window that miss count nothing."""
    assert convolution_flops(f"{window}, dim_labels={labels}, metadata", left, right, made) == plain


def test_a_convolution_counts_every_place_that_meets() -> None:
    """Three places of a line of five, padded by one on each side, against a kernel of three: 2 + 3 + 2 meet."""
    text = "window={size=3 stride=2 pad=1_1}, dim_labels=b0f_0io->b0f"
    assert convolution_flops(text, (1, 5, 4), (3, 4, 6), (1, 3, 6)) == 2 * 6 * 4 * (2 + 3 + 2)
