"""The twelve gates of the design, against its table."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from libs.flags.catalog import CATALOG
from libs.flags.errors import GateRefused
from libs.flags.facts import Facts
from libs.flags.installed import scaffold_status
from libs.flags.registry import GateSpec, Kind, Stage
from libs.flags.resolve import resolve

ROOT = Path(__file__).resolve().parents[3]
PSIV = ("python_precompute", "gmem_pool", "bwd_fwd_reuse", "bwd_bwd_reuse")
# The design's table: gate -> (kind, values).
DESIGN = {
    "tma": (Kind.ENUM, ("off", "fwd", "all")),
    "warp_specialization": (Kind.ENUM, ("off", "fwd", "all")),
    "psiv_cache": (Kind.STAGES, ("off", *PSIV)),
    "split_scan": (Kind.ENUM, ("off", "auto", "on")),
    "register_split": (Kind.ENUM, ("off",)),
    "cute_dsl": (Kind.ENUM, ("off",)),
    "fp8_param_gather": (Kind.ENUM, ("off", "on", "on_untried_te")),
    "fused_linear_ce": (Kind.ENUM, ("off", "liger")),
    "xla_scan_layers": (Kind.ENUM, ("off", "on", "runs")),
    "pallas_attention": (Kind.BOOL, ("off", "on")),
    "prefix_cache": (Kind.ENUM, ("off", "memory_only", "snapshots")),
    "mtp_speculation": (Kind.BOOL, ("off", "on")),
}
RICH = Facts(
    device="cuda",
    device_name="H200",
    compute_capability=(9, 0),
    multiprocessors=132,
    batch_heads=16,
    free_memory_bytes=10**12,
    packages={
        "tilelang": "0.1.15",
        "transformer-engine": "2.10.0",
        "liger-kernel": "0.8.5",
        "jax": "1",
        "torch-xla": "2",
    },
    mimo_backend="tilelang",
    psiv_stages=PSIV,
    psiv_bytes_per_layer=64 << 20,
    n_mamba_layers=24,
    two_d_kernels=("fwd", "bwd_fwd", "bwd_bwd"),
    split_scan_kernels=True,
    bf16=True,
    distributed_optimizer=True,
    fp8_recipe="blockwise",
    te_linears=200,
    liger_selftest=True,
    tensor_parallel=1,
    homogeneous_stack=True,
    homogeneous_runs=1,
    activation_checkpointing="block",
    attention_in_tile_table=True,
    mtp_depth=1,
    state_slots=True,
    draft_length=2,
    kv_block_size=16,
)


def _facts(gate: str, change: dict[str, object]) -> Facts:
    """RICH with `change`, on the device that `gate` is for."""
    device = "tpu" if gate in ("xla_scan_layers", "pallas_attention") else "cuda"
    return RICH.model_copy(update={"device": device} | change)


def _failures(gate: str, value: str, facts: Facts) -> list[str]:
    """What keeps `gate` from `value`, were it implemented."""
    spec = CATALOG[gate]
    return [
        failure
        for p in spec.preconditions
        if not p.values or value in p.values
        if (failure := p.check(spec.encode(value), facts)) is not None
    ]


def test_the_gates_are_those_of_the_design() -> None:
    assert {name: (spec.kind, spec.values) for name, spec in CATALOG.items()} == DESIGN
    assert all(spec.variable == f"FATHOM_{name.upper()}" for name, spec in CATALOG.items())


def test_nothing_is_on_by_default() -> None:
    assert all(spec.default == "off" for spec in CATALOG.values())


def test_scaffold_status_shows_the_psiv_stages_separately() -> None:
    status = scaffold_status()
    assert status["psiv_cache"].values == dict.fromkeys(PSIV, Stage.EXPERIMENTAL)
    assert status["register_split"].stage is Stage.RETIRED
    assert set(status) == set(DESIGN)


def test_the_scan_kernels_are_built_and_none_is_measured() -> None:
    """`measured` follows from the stage, and a stage that says so needs a receipt."""
    status = scaffold_status()
    for gate in ("tma", "warp_specialization", "psiv_cache", "split_scan", "fp8_param_gather"):
        assert status[gate].stage is Stage.EXPERIMENTAL
        assert status[gate].built == CATALOG[gate].values[1:]
        assert (status[gate].measured, status[gate].evidence) == ((), ())
    receipt = "infra/receipts/r/receipt.json"
    stages = {"on": Stage.EXPERIMENTAL, "auto": Stage.MEASURED}
    risen = GateSpec.model_validate(
        dict(CATALOG["split_scan"]) | {"stage": Stage.MEASURED, "value_stages": stages, "evidence": (receipt,)}
    )
    found = scaffold_status({"split_scan": risen})["split_scan"]
    assert (found.built, found.measured, found.evidence) == (("auto", "on"), ("auto",), (receipt,))


@pytest.mark.parametrize("gate", ["tma", "warp_specialization", "psiv_cache", "split_scan"])
def test_a_graduated_gate_can_be_had(gate: str) -> None:
    """All its values, where everything they need is there; and none on a CPU."""
    spec = CATALOG[gate]
    for word in spec.values[1:]:
        environ = {spec.variable: word} | ({"FATHOM_TMA": word} if gate == "warp_specialization" else {})
        gates = resolve(environ, RICH)
        assert gates.is_enabled(gate)
        assert gates.value(gate) == word
        with pytest.raises(GateRefused) as caught:
            resolve(environ, Facts(mimo_backend="chunked", free_memory_bytes=10**12))
        assert "scaffold" not in str(caught.value)
        assert "backend chunked has no" in str(caught.value) or "unknown here" in str(caught.value)


@pytest.mark.parametrize("spec", CATALOG.values(), ids=lambda spec: spec.name)
def test_every_request_for_a_missing_feature_is_refused(spec: GateSpec) -> None:
    for word in spec.values[1:]:
        if spec.stage_of(word) is Stage.SCAFFOLD:
            with pytest.raises(GateRefused, match="scaffold") as caught:
                resolve({spec.variable: word}, RICH)
            assert [refusal.gate for refusal in caught.value.refusals] == [spec.name]


@pytest.mark.parametrize("gate", ["register_split", "cute_dsl"])
@pytest.mark.parametrize("text", ["on", "1", "yes", "fwd", ""])
def test_retired_gates_point_to_their_record(gate: str, text: str) -> None:
    with pytest.raises(GateRefused, match=r"infra/decisions/000[23]-") as caught:
        resolve({CATALOG[gate].variable: text}, RICH)
    assert "retired" in str(caught.value)
    assert not resolve({CATALOG[gate].variable: "off"}, RICH).is_enabled(gate)


def test_decision_records_and_receipts_are_named_by_path() -> None:
    for spec in CATALOG.values():
        if spec.decision is not None:
            assert re.fullmatch(r"infra/decisions/\d{4}-[a-z0-9-]+\.md", spec.decision)
        for receipt in spec.evidence:
            assert isinstance(json.loads((ROOT / receipt).read_text(encoding="utf-8")), dict)


def test_no_gate_has_expired() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    now = tuple(map(int, version.split(".")))
    for spec in CATALOG.values():
        assert spec.expiry is None or tuple(map(int, spec.expiry.split("."))) > now, (
            f"{spec.name}: raise it or remove it"
        )


# Every precondition, met by RICH and failed by one change: (gate, value, change, what the refusal says).
CASES: list[tuple[str, str, dict[str, object], str]] = [
    ("tma", "fwd", {"device": "cpu"}, "needs device cuda"),
    ("tma", "fwd", {"compute_capability": (8, 9)}, "found sm_89"),
    ("tma", "fwd", {"compute_capability": None}, "no CUDA device"),
    ("tma", "fwd", {"packages": {}}, "tilelang >=0.1.15, which is not installed"),
    ("tma", "fwd", {"packages": {"tilelang": "0.1.9"}}, "found 0.1.9"),
    ("tma", "all", {"two_d_kernels": ("fwd", "bwd_fwd")}, "lack: bwd_bwd"),
    ("tma", "fwd", {"two_d_kernels": ("bwd_fwd", "bwd_bwd")}, "lack: fwd"),
    ("warp_specialization", "all", {"two_d_kernels": ("fwd",)}, "lack: bwd_fwd, bwd_bwd"),
    ("tma", "fwd", {"two_d_kernels": (), "mimo_backend": "chunked"}, "backend chunked has no kernel with rank-2"),
    ("warp_specialization", "fwd", {"device": "tpu"}, "needs device cuda"),
    ("psiv_cache", "gmem_pool", {"psiv_stages": ("python_precompute",)}, "stages it has: python_precompute"),
    (
        "psiv_cache",
        "gmem_pool",
        {"psiv_stages": (), "mimo_backend": "chunked"},
        "backend chunked has no stage gmem_pool",
    ),
    ("psiv_cache", "gmem_pool", {"free_memory_bytes": 24 * (64 << 20) - 1}, "needs 1,610,612,736 bytes"),
    ("psiv_cache", "gmem_pool", {"free_memory_bytes": None}, "unknown here"),
    ("split_scan", "auto", {"split_scan_kernels": None}, "unknown here"),
    ("split_scan", "auto", {"split_scan_kernels": False, "mimo_backend": "chunked"}, "backend chunked has no split"),
    ("split_scan", "on", {"batch_heads": 132}, "below the 132 multiprocessors, it is 132"),
    ("split_scan", "on", {"multiprocessors": None}, "unknown here"),
    ("fp8_param_gather", "on", {"packages": {"transformer-engine": "2.12.0"}}, "found 2.12.0"),
    ("fp8_param_gather", "on", {"packages": {"transformer-engine": "2.8"}}, "found 2.8"),
    ("fp8_param_gather", "on", {"distributed_optimizer": False}, "distributed optimizer"),
    ("fp8_param_gather", "on", {"bf16": None}, "bf16 training: unknown here"),
    ("fp8_param_gather", "on", {"fp8_recipe": "mxfp8"}, "found mxfp8"),
    ("fp8_param_gather", "on", {"fp8_recipe": "delayed"}, "found delayed, which activation checkpointing"),
    ("fp8_param_gather", "on", {"te_linears": 0}, "can hold FP8 weights: it has none"),
    ("fp8_param_gather", "on_untried_te", {"packages": {"transformer-engine": "2.8"}}, ">=2.9, found 2.8"),
    ("fused_linear_ce", "liger", {"packages": {"liger-kernel": "0.8.1"}}, ">=0.8.3, found 0.8.1"),
    ("fused_linear_ce", "liger", {"packages": {"liger-kernel": "0.8.2"}}, ">=0.8.3, found 0.8.2"),
    ("fused_linear_ce", "liger", {"liger_selftest": None}, "not run here"),
    (
        "fused_linear_ce",
        "liger",
        {"liger_selftest": False, "liger_selftest_detail": "weight.grad is off"},
        "it failed (weight.grad is off)",
    ),
    ("fused_linear_ce", "liger", {"tensor_parallel": None}, "tp = 1, it is unknown here"),
    ("fused_linear_ce", "liger", {"tensor_parallel": 2}, "tp = 1, it is 2"),
    ("fused_linear_ce", "liger", {"device": "cpu"}, "needs device cuda"),
    ("xla_scan_layers", "on", {"homogeneous_stack": False}, "needs a homogeneous stack: it is not"),
    (
        "xla_scan_layers",
        "on",
        {"homogeneous_stack": False, "stack_difference": "layer 4, kind: '*', but 'M' in layer 0"},
        "stack: layer 4, kind: '*', but 'M' in layer 0",
    ),
    ("xla_scan_layers", "on", {"homogeneous_stack": None}, "unknown here"),
    ("xla_scan_layers", "runs", {"homogeneous_stack": False, "homogeneous_runs": 0}, "the stack has none"),
    ("xla_scan_layers", "runs", {"homogeneous_runs": None}, "unknown here"),
    ("xla_scan_layers", "on", {"activation_checkpointing": "none"}, "as a loop recomputes its layers: it is none"),
    ("xla_scan_layers", "runs", {"activation_checkpointing": None}, "unknown here"),
    ("xla_scan_layers", "on", {"device": "cuda"}, "needs device tpu or xla"),
    ("xla_scan_layers", "on", {"packages": {}}, "needs torch-xla, which is not installed"),
    ("pallas_attention", "on", {"device": "cuda"}, "needs device tpu"),
    ("pallas_attention", "on", {"device": "xla"}, "needs device tpu, this run has xla"),
    ("pallas_attention", "on", {"packages": {}}, "needs jax, which is not installed"),
    ("pallas_attention", "on", {"attention_in_tile_table": None}, "unknown here"),
    ("prefix_cache", "snapshots", {"state_slots": False}, "recurrent-state slots"),
    ("mtp_speculation", "on", {"mtp_depth": 0}, "needs MTP heads"),
    ("mtp_speculation", "on", {"draft_length": 16}, "in 1..15, it is 16"),
    ("mtp_speculation", "on", {"draft_length": 0}, "it is 0"),
    ("mtp_speculation", "on", {"kv_block_size": None}, "unknown here"),
]


@pytest.mark.parametrize(("gate", "value", "change", "said"), CASES)
def test_each_precondition_can_fail(gate: str, value: str, change: dict[str, object], said: str) -> None:
    failures = _failures(gate, value, _facts(gate, change))
    assert len(failures) == 1, failures
    assert said in failures[0]


def test_each_precondition_can_hold() -> None:
    for gate, spec in CATALOG.items():
        for word in spec.values[1:]:
            assert _failures(gate, word, _facts(gate, {})) == []


def test_each_precondition_is_tried_above() -> None:
    tried = {
        p.name
        for gate, value, change, _ in CASES
        for p in CATALOG[gate].preconditions
        if p.check(CATALOG[gate].encode(value), _facts(gate, change)) is not None
    }
    assert {p.name for spec in CATALOG.values() for p in spec.preconditions} == tried


def test_all_missing_preconditions_of_fp8_are_listed() -> None:
    with pytest.raises(GateRefused) as caught:
        resolve({"FATHOM_FP8_PARAM_GATHER": "on"}, Facts(packages={}))
    (refusal,) = caught.value.refusals
    assert len(refusal.failures) == 7
    for part in (
        "cuda",
        "sm_90",
        "transformer-engine",
        "distributed optimizer",
        "bf16",
        "fp8 recipe",
        "linears that can hold FP8 weights: unknown here",
    ):
        assert any(part in failure for failure in refusal.failures), part
    assert len(refusal.remedies) == 7


def test_an_untried_transformer_engine_has_to_be_asked_for_by_name() -> None:
    later = {"packages": {"transformer-engine": "2.20.2"}}
    assert _failures("fp8_param_gather", "on_untried_te", _facts("fp8_param_gather", later)) == []
    (said,) = _failures("fp8_param_gather", "on", _facts("fp8_param_gather", later))
    assert ">=2.9,<2.12, found 2.20.2" in said


def test_the_range_of_transformer_engine_is_megatron_cores() -> None:
    (declared,) = (r for r in metadata.requires("megatron-core") or () if r.startswith("transformer-engine"))
    assert "<2.12.0,>=2.9.0a0" in declared


def test_liger_can_be_had_where_everything_it_needs_is_there() -> None:
    assert resolve({"FATHOM_FUSED_LINEAR_CE": "liger"}, RICH).value("fused_linear_ce") == "liger"
    with pytest.raises(GateRefused, match="device cuda"):
        resolve({"FATHOM_FUSED_LINEAR_CE": "liger"}, RICH.model_copy(update={"device": "cpu"}))


def test_warp_specialization_needs_tma_on_the_same_kernels() -> None:
    for tma, shown in (("off", "it is off"), ("fwd", "it is fwd")):
        with pytest.raises(GateRefused) as caught:
            resolve({"FATHOM_WARP_SPECIALIZATION": "all", "FATHOM_TMA": tma}, RICH)
        (refusal,) = [r for r in caught.value.refusals if r.gate == "warp_specialization"]
        assert f"needs gate tma to be all, {shown}" in refusal.failures
        assert "set FATHOM_TMA to all" in refusal.remedies
