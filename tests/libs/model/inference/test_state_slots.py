"""Slots and their blobs, by bytes: what is captured comes back, what is refused changes nothing, neighbours stay."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from libs.flags.errors import UserError
from libs.model import preset
from libs.model.inference import (
    NO_SLOT,
    BlobRefused,
    CapacityError,
    KvLayout,
    PagedKV,
    StateLayout,
    StatePart,
    StateSlots,
    blob,
    kv_layout,
    model_fingerprint,
    plan_memory,
    state_layout,
    weights_digest,
)

PARTS = (StatePart("ssm", (2, 3, 4), torch.float32), StatePart("k", (2, 5), torch.bfloat16))
CONV = StatePart("conv", (3, 4), torch.float16)
MAMBA = StateLayout((0, 2), PARTS)
BOTH = StateLayout((0, 2), PARTS, (2, 5), CONV)
ONLY_CONV = StateLayout((), (), (1,), CONV)
LAYOUTS = pytest.mark.parametrize("layout", [MAMBA, BOTH, ONLY_CONV], ids=["mamba", "both", "conv"])


def build(layout: StateLayout = BOTH, *, max_batch: int = 3, max_draft: int = 0, model: str = "m") -> StateSlots:
    """Slots full of noise."""
    slots = StateSlots(layout, model=model, max_batch=max_batch, max_draft=max_draft)
    scribble(slots, 1)
    return slots


def scribble(slots: StateSlots, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*slots._states.values(), *slots._intermediate.values()):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))


def raw(slots: StateSlots) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in slots._states.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], rows: list[int] | None = None) -> bool:
    """By bits: NaN and -0 count."""
    picked = slice(None) if rows is None else rows
    return all(torch.equal(a[n][:, picked].view(torch.uint8), b[n][:, picked].view(torch.uint8)) for n in a)


def test_shapes_and_bytes_are_the_layouts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        slots = StateSlots(BOTH, model="m", max_batch=3, max_draft=2)
    assert [tuple(t.shape) for t in slots.get_recurrent_state(2)] == [(3, 2, 3, 4), (3, 2, 5)]
    assert [t.dtype for t in slots.get_recurrent_state(0)] == [torch.float32, torch.bfloat16]
    assert slots.get_recurrent_state(5) == ()
    conv = slots.get_conv_state(5)
    assert conv is not None
    assert tuple(conv.shape) == (3, 3, 4)
    assert slots.get_conv_state(0) is None
    assert slots.num_layers == 3
    assert slots.has_intermediate_states
    one = 2 * (24 * 4 + 10 * 2) + 2 * 12 * 2
    assert slots.nbytes == 9 * one == BOTH.nbytes(9)
    assert f"{9 * one} bytes" in caplog.text
    assert all(not tensor.any() for tensor in raw(slots).values())
    with pytest.raises(ValueError, match="block 1 has no recurrent state"):
        slots.get_recurrent_state(1)
    live = slots.get_recurrent_state(2)[0]
    live[1] = 7
    assert slots._states["ssm"][1, 1].eq(7).all()


def test_no_recurrent_layer_allocates_nothing_and_does_nothing() -> None:
    slots = StateSlots(StateLayout(), model="m", max_batch=2, max_draft=3)
    assert slots.nbytes == 0
    assert not slots.has_intermediate_states
    assert [slots.alloc() for _ in range(5)] == [NO_SLOT] * 5
    kept = slots.capture(NO_SLOT)
    for call in (
        lambda: slots.free(NO_SLOT), lambda: slots.free(NO_SLOT), lambda: slots.clear(7), slots.clear_states,
        lambda: slots.advance(0, 3), lambda: slots.get_conv_state(0), lambda: slots.scatter_mtp_states([99]),
        lambda: slots.write_rows(0, [1], ()),
    ):  # fmt: skip
        assert call() is None
    assert slots.get_recurrent_state(4) == ()
    assert slots.read_rows(4, [0, 1]) == ()
    assert slots.reshape_intermediate_states(9, 9) == {}
    assert slots.restore(NO_SLOT, kept) == 0
    assert slots.restore(NO_SLOT, slots.capture_conv_states(0)) == slots.position(5) == 0


BAD: dict[str, Callable[[], Any]] = {
    "no slots": lambda: StateSlots(BOTH, model="m", max_batch=0),
    "negative draft": lambda: StateSlots(BOTH, model="m", max_batch=1, max_draft=-1),
    "falling": lambda: StateLayout((2, 0), PARTS),
    "negative": lambda: StateLayout((-1, 0), PARTS),
    "no parts": lambda: StateLayout((0,), ()),
    "no layers": lambda: StateLayout((), PARTS),
    "twice": lambda: StateLayout((0,), (PARTS[0], PARTS[0])),
    "empty": lambda: StateLayout((0,), (StatePart("ssm", (2, 0), torch.float32),)),
    "conv without shape": lambda: StateLayout((), (), (0,), StatePart("conv", (3,), torch.float32)),
    "conv without layers": lambda: StateLayout((0,), PARTS, (), CONV),
    "block size": lambda: KvLayout((0,), 1, 8, torch.float32, 8),
    "heads": lambda: KvLayout((0,), 0, 8, torch.float32, 16),
    "one block": lambda: PagedKV(KvLayout((0,), 1, 8, torch.float32, 16), model="m", blocks=1),
    "hash bits": lambda: PagedKV(KvLayout((0,), 1, 8, torch.float32, 16), model="m", blocks=2, hash_bits=0),
    "no requests": lambda: plan_memory(
        BOTH, kv_layout(preset("cpu_tiny"), torch.float32, 16), requests=0, max_tokens=1
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_config_raises_before_anything_is_allocated(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("allocated")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(UserError):
        BAD[case]()


def test_copies_are_refused() -> None:
    kv = PagedKV(KvLayout((0,), 1, 8, torch.float32, 16), model="m", blocks=2)
    for manager in (build(), kv):
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                duplicate(manager)


@LAYOUTS
def test_a_reused_slot_is_as_new(layout: StateLayout) -> None:
    slots = build(layout)
    assert [slots.alloc() for _ in range(3)] == [0, 1, 2]
    scribble(slots, 2)
    before = raw(slots)
    slots.advance(1, 5)
    slots.free(1)
    assert slots.alloc() == 1
    assert slots.position(1) == 0
    assert all(not tensor[:, 1].any() for tensor in raw(slots).values())
    assert same(before, raw(slots), [0, 2])


def test_slots_run_out_and_come_back() -> None:
    slots = build(max_batch=2)
    slots.alloc(), slots.alloc()
    before = raw(slots)
    with pytest.raises(CapacityError, match="slots") as caught:
        slots.alloc()
    assert (caught.value.needed, caught.value.available, slots.available) == (1, 0, 0)
    assert same(before, raw(slots))
    slots.free(0)
    with pytest.raises(ValueError, match="slot 0 is not allocated"):
        slots.free(0)
    for call in (slots.clear, slots.capture, slots.position, lambda s: slots.advance(s, 1)):
        with pytest.raises(ValueError, match="not allocated"):
            call(0)
    with pytest.raises(ValueError, match="not allocated"):
        slots.restore(0, slots.capture(1))
    with pytest.raises(ValueError, match="not allocated"):
        slots.read_rows(0, [-1])


def test_clear_is_for_one_slot_and_clear_states_for_all() -> None:
    slots = build(max_draft=1)
    for slot in (slots.alloc(), slots.alloc()):
        slots.advance(slot, 3)
    scribble(slots, 3)
    before = raw(slots)
    slots.clear(0)
    assert (slots.position(0), slots.position(1)) == (0, 3)
    assert same(before, raw(slots), [1, 2])
    assert all(not tensor[:, 0].any() for tensor in raw(slots).values())
    slots.clear_states()
    assert slots.active == (0, 1)
    assert slots.position(1) == 0
    assert all(not tensor.any() for tensor in (*slots._states.values(), *slots._intermediate.values()))


@LAYOUTS
def test_capture_scribble_restore_is_byte_exact_and_touches_nothing_else(layout: StateLayout) -> None:
    slots = build(layout)
    for _ in range(3):
        slots.alloc()
    scribble(slots, 4)
    for tensor in slots._states.values():
        tensor[:, 1].flatten()[0] = torch.nan
        tensor[:, 1, ..., -1] = -0.0
    slots.advance(1, 41)
    before, kept = raw(slots), slots.capture(1)
    scribble(slots, 5)
    scribbled = raw(slots)
    assert not same(before, scribbled, [1])
    assert slots.restore(1, kept) == slots.position(1) == 41
    assert same(before, raw(slots), [1])
    assert same(scribbled, raw(slots), [0, 2])
    # Into another slot, of another manager over the same model.
    other = build(layout, max_batch=5)
    other.alloc(), other.alloc()
    assert other.restore(0, kept) == 41
    assert all(torch.equal(other._states[n][:, 0].view(torch.uint8), before[n][:, 1].view(torch.uint8)) for n in before)


def test_either_kind_is_restored_alone() -> None:
    slots = build(BOTH)
    slots.alloc()
    scribble(slots, 6)
    before = raw(slots)
    recurrent, conv = slots.capture_recurrent_states(0), slots.capture_conv_states(0)
    scribble(slots, 7)
    scribbled = raw(slots)
    slots.restore(0, conv)
    assert torch.equal(slots._states["conv"][:, 0], before["conv"][:, 0])
    assert torch.equal(slots._states["ssm"], scribbled["ssm"])
    slots.restore(0, recurrent)
    assert same(before, raw(slots), [0])
    # A model without convolutions has an empty blob of them.
    mamba = build(MAMBA)
    mamba.alloc()
    empty, kept = mamba.capture_conv_states(0), raw(mamba)
    mamba.restore(0, empty)
    assert same(kept, raw(mamba))


def test_a_blob_is_a_safetensors_file() -> None:
    slots = build(BOTH)
    slots.alloc()
    scribble(slots, 8)
    read = safetensors.torch.load(slots.capture(0))
    assert read.keys() == {"ssm", "k", "conv"}
    assert all(torch.equal(read[name], slots._states[name][:, 0]) for name in read)


def refused(slots: StateSlots, data: bytes, match: str) -> None:
    before = raw(slots)
    with pytest.raises(BlobRefused, match=match):
        slots.restore(0, data)
    assert same(before, raw(slots))
    assert slots.position(0) == 0


def other_dtype(layout: StateLayout) -> StateLayout:
    return StateLayout(
        layout.layers, (PARTS[0]._replace(dtype=torch.float64), PARTS[1]), layout.conv_layers, layout.conv
    )


def test_blobs_of_another_model_dtype_layout_or_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = build(BOTH)
    slots.alloc()
    others = {
        "another model": build(BOTH, model="n"),
        "another dtype": build(other_dtype(BOTH)),
        "another layout": build(StateLayout((0, 3), PARTS, (2, 5), CONV)),
        r"another (layout|dtype)": build(MAMBA),
        r"another layout.*": build(StateLayout((0, 2), (PARTS[0]._replace(shape=(2, 4, 3)), PARTS[1]), (2, 5), CONV)),
    }
    for match, other in others.items():
        other.alloc()
        refused(slots, other.capture(0), match)
    monkeypatch.setattr(blob, "VERSION", "2")
    newer = slots.capture(0)
    monkeypatch.undo()
    refused(slots, newer, "version '2', this program reads 'fathom-state' '1'")
    refused(slots, safetensors.torch.save({"ssm": slots._states["ssm"][:, 0].contiguous()}), "header names no format")


def test_truncated_and_flipped_blobs_are_refused() -> None:
    slots = build(BOTH)
    slots.alloc(), slots.alloc()
    slots.advance(1, 3)
    kept = slots.capture(1)
    for length in [*range(0, len(kept), 7), len(kept) - 1]:
        refused(slots, kept[:length], "blob")
    for place in range(len(kept)):
        flipped = bytearray(kept)
        flipped[place] ^= 1 << place % 8
        refused(slots, bytes(flipped), "blob")
    refused(slots, kept + b"\0", "blob")
    assert slots.restore(0, kept) == 3


def test_a_forged_table_is_refused() -> None:
    """A blob that is whole, and says that its tensors are others."""
    slots = build(MAMBA)
    slots.alloc()
    identity = slots._identity
    fewer = {"ssm": slots._states["ssm"][:, 0]}
    refused(slots, blob.pack(fewer, contents="all", identity=identity, tokens=0), "other tensors")
    cast = {name: tensor[:, 0].double() for name, tensor in slots._states.items()}
    refused(slots, blob.pack(cast, contents="all", identity=identity, tokens=0), "other tensors")
    refused(slots, blob.pack(fewer, contents="some", identity=identity, tokens=0), "other tensors")


def test_rows_are_written_only_in_the_layouts_dtype() -> None:
    slots = build(MAMBA)
    for _ in range(3):
        slots.alloc()
    before, parts = raw(slots), slots.read_rows(2, [2, 0])
    assert torch.equal(parts[0], before["ssm"][1, [2, 0]])
    with pytest.raises(ValueError, match="ssm must be"):
        slots.write_rows(2, [2, 0], [parts[0].bfloat16(), parts[1]])
    with pytest.raises(ValueError, match="k must be"):
        slots.write_rows(2, [2, 0], [parts[0], parts[1][:1]])
    with pytest.raises(ValueError, match="2 recurrent parts, got 1"):
        slots.write_rows(2, [2, 0], [parts[0]])
    with pytest.raises(ValueError, match="twice"):
        slots.write_rows(2, [2, 2], parts)
    assert same(before, raw(slots))
    slots.write_rows(2, [0, 2], parts)
    assert torch.equal(slots._states["ssm"][1, 0], before["ssm"][1, 2])
    assert torch.equal(slots._states["ssm"][0], before["ssm"][0])
    assert same(before, raw(slots), [1])


class Count(TorchDispatchMode):
    """How often each operation that writes was run."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.writes.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@LAYOUTS
@pytest.mark.parametrize("lengths", [[2, 0, 3], [1, 1, 1], [0, 0, 0], [3, 3, 0]])
def test_scatter_equals_the_slow_way(layout: StateLayout, lengths: list[int]) -> None:
    slots = build(layout, max_batch=5, max_draft=4)
    for _ in range(5):
        slots.alloc()
    views = slots.reshape_intermediate_states(3, 3)
    for seed, view in enumerate(views.values()):
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(seed)))
    expected, into = raw(slots), [4, 0, 2]
    for name, view in views.items():
        for row, (length, slot) in enumerate(zip(lengths, into, strict=True)):
            if length:
                expected[name][:, slot] = view[:, row, length - 1]
    with Count() as count:
        slots.scatter_mtp_states(torch.tensor(lengths), into)
    assert same(expected, raw(slots))
    assert count.writes == (["index_copy_"] * len(layout.kinds) if any(lengths) else [])
    with pytest.raises(ValueError, match="reshape_intermediate_states comes first"):
        slots.scatter_mtp_states(lengths, into)


def test_scatter_refuses_and_then_nothing_has_changed() -> None:
    slots = build(BOTH, max_batch=3, max_draft=2)
    assert [slots.alloc(), slots.alloc()] == [0, 1]
    before = raw(slots)
    with pytest.raises(ValueError, match="comes first"):
        slots.scatter_mtp_states([1, 1])
    for batch, draft in ((4, 1), (1, 3), (0, 1), (1, 0)):
        with pytest.raises(ValueError, match="outside"):
            slots.reshape_intermediate_states(batch, draft)
    slots.reshape_intermediate_states(2, 2)
    bad: list[tuple[Any, Any, str]] = [
        ([1, 3], None, "must be in 0..2"),
        ([-1, 1], None, "must be in 0..2"),
        ([1], None, "2 rows were verified"),
        ([1, 1], [0], "2 rows were verified"),
        ([1, 1], [0, 2], "slot 2 is not allocated"),
        ([1, 1], [1, 1], "twice"),
        ([1.0, 1], None, "whole numbers"),
        (torch.tensor([1.0, 1.0]), None, "1-D integer"),
        (torch.tensor([[1, 1]]), None, "1-D integer"),
    ]
    for lengths, into, match in bad:
        with pytest.raises(ValueError, match=match):
            slots.scatter_mtp_states(lengths, into)
    assert same(before, raw(slots))
    slots.scatter_mtp_states([2, 1])
    assert same(before, raw(slots), [2])
    assert not same(before, raw(slots), [0])
    with pytest.raises(ValueError, match="max_draft is 0"):
        build(BOTH).reshape_intermediate_states(1, 1)


def test_cutting_again_is_dense_and_in_the_same_memory() -> None:
    slots = build(MAMBA, max_batch=4, max_draft=3)
    for batch, draft in ((4, 3), (1, 1), (2, 3), (4, 1)):
        for name, view in slots.reshape_intermediate_states(batch, draft).items():
            assert view.shape[:3] == (2, batch, draft)
            assert view[0].is_contiguous()
            assert view.data_ptr() == slots._intermediate[name].data_ptr()


@pytest.mark.parametrize("max_draft", [0, 3])
@pytest.mark.parametrize("name", ["cpu_tiny", "cpu_demo", "cpu_tiny_dense"])
def test_planned_bytes_are_those_of_the_real_tensors(name: str, max_draft: int) -> None:
    config = preset(name)
    states, kv = state_layout(config, torch.bfloat16), kv_layout(config, torch.bfloat16, 32)
    plan = plan_memory(states, kv, requests=3, max_tokens=100, max_draft=max_draft)
    slots = StateSlots(states, model="m", max_batch=plan.requests, max_draft=plan.max_draft)
    paged = PagedKV(kv, model="m", blocks=plan.blocks)
    real = {
        "kv_blocks": [paged._k, paged._v],
        "states": list(slots._states.values()),
        "intermediate_states": list(slots._intermediate.values()),
    }
    found = {part: sum(t.untyped_storage().nbytes() for t in tensors) for part, tensors in real.items()}
    assert plan.by_component == found
    assert plan.total == sum(found.values()) == slots.nbytes + paged.nbytes
    plan.require(plan.total)
    with pytest.raises(CapacityError) as caught:
        plan.require(plan.total - 1)
    assert (caught.value.needed, caught.value.available) == (plan.total, plan.total - 1)
    # The plan holds what it promises, and not one request more.
    for request in range(3):
        slots.alloc()
        paged.add(request, list(range(100)), upto=100 + max_draft)
    with pytest.raises(CapacityError) as short:
        paged.add(3, list(range(100)))
    assert (short.value.needed, short.value.available) == (4, 0)


@pytest.mark.parametrize(
    ("mamba", "attention", "mebibytes"), [(0, 24, 6144), (18, 6, 1555), (21, 3, 790), (22, 2, 535)]
)  # fmt: skip
def test_published_bytes_of_a_64k_prompt(mamba: int, attention: int, mebibytes: int) -> None:
    """24 layers, 8 KV heads of 128, bf16. Ours keep k and x in fp32: at most 1 MiB more."""
    base = preset("cpu_tiny").model_dump()
    config = preset("cpu_tiny").parse(
        {
            **base, "hidden_size": 1024, "pattern": "M" * mamba + "*" * attention,
            "mixer": {"nheads": 32, "headdim": 64, "d_state": 128, "mimo_rank": 4},
            "attention": {"nheads": 8, "kv_heads": 8, "head_dim": 128},
        }
    )  # fmt: skip
    total = kv_layout(config, torch.bfloat16, 256).nbytes(65_536 // 256) + state_layout(config, torch.bfloat16).nbytes(
        1
    )
    assert -0.5 <= total / 2**20 - mebibytes <= 1.3


def test_a_fingerprint_names_model_and_weights(build: Callable[..., torch.nn.Module]) -> None:
    model, other = build("M"), build("M")
    digest = weights_digest(model)
    assert digest == weights_digest(other)
    config: Any = model.config
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-6
    assert digest != weights_digest(other)
    names = {model_fingerprint(config, digest), model_fingerprint(config, weights_digest(other))}
    names.add(model_fingerprint(config.parse({**config.model_dump(), "norm_eps": 1e-6}), digest))
    assert len(names) == 3
