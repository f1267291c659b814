"""Backend pallas where there is no TPU: its tile table, its gate, and what both refuse with the way out."""

from __future__ import annotations

import pytest
import torch

from libs.flags import Facts, installed, resolve
from libs.flags.errors import GateRefused
from libs.flags.installed import GatesNotInstalled, GateState
from libs.kernels.attention import api, attention, choose_backend
from libs.kernels.attention.pallas.gates import requested_backend
from libs.kernels.attention.pallas.tiles import BLOCKS, LONGEST, TABLE, VMEM_BYTES, choose_block, refusal, vmem_bytes
from libs.kernels.backend import Choice

GATE = {"FATHOM_PALLAS_ATTENTION": "on"}
TPU = Facts(device="tpu", packages={"jax": "0.7.1"}, attention_in_tile_table=True)


def test_the_largest_block_that_divides_the_sequence_is_taken() -> None:
    for row in TABLE:
        for S in (128, 384, 512, 1280, 16384, 32768, LONGEST):
            block = choose_block(S, row.head_dim, row.dtype)
            assert block == max(b for b in BLOCKS if S % b == 0 and b <= row.block)
            assert vmem_bytes(block, row.head_dim, row.dtype) <= VMEM_BYTES


@pytest.mark.parametrize(
    ("S", "D", "dtype", "nearest"),
    [
        (16000 + 50, 64, "bfloat16", "the nearest is S=16000"),
        (100, 64, "bfloat16", "the nearest is S=128"),
        (1, 64, "bfloat16", "the nearest is S=128"),
        (2 * LONGEST, 64, "bfloat16", f"the nearest is S={LONGEST}"),
        (512, 80, "bfloat16", "the nearest is head_dim=64 in bfloat16"),
        (512, 256, "float32", "the nearest is head_dim=128 in float32"),
        (512, 64, "float64", "the nearest is head_dim=64 in bfloat16"),
    ],
)
def test_a_shape_outside_is_refused_with_the_nearest_inside(S: int, D: int, dtype: str, nearest: str) -> None:
    said = refusal(S, D, dtype)
    assert said is not None
    assert said.endswith(nearest)
    with pytest.raises(ValueError, match=nearest):
        choose_block(S, D, dtype)


def test_it_is_refused_off_xla_and_never_chosen_unasked() -> None:
    for kind in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=f"cannot run on device '{kind}': it is kernels for a TPU"):
            choose_backend("pallas", torch.device(kind))
    assert choose_backend("auto", torch.device("xla")).value == "xla"
    assert choose_backend("pallas", torch.device("xla")).value == "pallas"


def test_it_is_causal_with_a_key_for_every_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "choose_backend", lambda *_: Choice("pallas", "for this test"))
    q, k = torch.zeros(1, 128, 4, 64), torch.zeros(1, 256, 2, 64)
    with pytest.raises(ValueError, match="causal=True, S=128, T=256; use xla"):
        attention(q, k, k, backend="pallas")
    with pytest.raises(ValueError, match="causal=False"):
        attention(q, k[:, :128], k[:, :128], causal=False, backend="pallas")


def test_the_gate_decides_which_backend_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "_PROCESS", GateState())
    with pytest.raises(GatesNotInstalled):
        requested_backend("auto")
    installed.install(resolve({}, TPU))
    assert [requested_backend(name) for name in ("auto", "xla")] == ["auto", "xla"]
    with pytest.raises(ValueError, match="behind a gate: set FATHOM_PALLAS_ATTENTION=on"):
        requested_backend("pallas")
    monkeypatch.setattr(installed, "_PROCESS", GateState())
    installed.install(resolve(GATE, TPU))
    assert [requested_backend(name) for name in ("auto", "pallas")] == ["pallas", "pallas"]
    with pytest.raises(ValueError, match="contradicts attention backend 'xla'"):
        requested_backend("xla")
    assert installed.exposed("pallas_attention")


def test_the_gate_is_refused_off_tpu_and_outside_the_table() -> None:
    with pytest.raises(GateRefused, match="needs device tpu, this run has xla"):
        resolve(GATE, TPU.model_copy(update={"device": "xla"}))
    outside = {"attention_in_tile_table": False, "attention_tile_refusal": refusal(1000, 64, "bfloat16")}
    with pytest.raises(GateRefused, match="the nearest is S=1024"):
        resolve(GATE, TPU.model_copy(update=outside))
