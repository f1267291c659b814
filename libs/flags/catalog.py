"""The gates of fathom. `fathom docs` makes the table in libs/flags/README.md of them.

Not a place for mechanism: a gate is data, plus the rules that are only its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from libs.flags.facts import Facts
from libs.flags.preconditions import capability, fact_true, needs, on_device, package
from libs.flags.promotions import raised, read_promotions
from libs.flags.registry import Dependency, GateSpec, GateValue, Kind, Stage, build_catalog

_SINCE = "0.1.0"
_EXPIRY = "0.4.0"
_SCAN_KERNELS = ("fwd", "bwd_fwd", "bwd_bwd")
_FP8_RECIPES = ("tensorwise", "blockwise")


@needs(
    "kernels.two_d",
    "a scan backend with rank-2 shared tiles in the kernels it reaches",
    "use mimo_backend=tilelang; ask for fwd only where the backward kernels are not in the 2-D layout; or off",
)
def _two_d_layout(value: GateValue, facts: Facts) -> str | None:
    backend = facts.mimo_backend or "(none chosen)"
    if not facts.two_d_kernels:
        return f"scan backend {backend} has no kernel with rank-2 shared tiles"
    reached = _SCAN_KERNELS if value == "all" else _SCAN_KERNELS[:1]
    missing = [kernel for kernel in reached if kernel not in facts.two_d_kernels]
    return (
        f"needs rank-2 shared tiles, which these kernels of {backend} lack: {', '.join(missing)}" if missing else None
    )


@needs(
    "backend.psiv_stage",
    "the stage on the chosen scan backend",
    "ask for a stage that the backend has, or off",
)
def _psiv_stage(value: GateValue, facts: Facts) -> str | None:
    if value in facts.psiv_stages:
        return None
    backend = facts.mimo_backend or "(none chosen)"
    have = ", ".join(facts.psiv_stages) or "none"
    return f"scan backend {backend} has no stage {value}; the stages it has: {have}"


@needs(
    "memory.psiv",
    "B*S*H*R*P*2 bytes of free memory per Mamba layer",
    "use a smaller micro-batch or sequence, or leave the cache off",
)
def _psiv_headroom(_value: GateValue, facts: Facts) -> str | None:
    per_layer, layers, free = facts.psiv_bytes_per_layer, facts.n_mamba_layers, facts.free_memory_bytes
    if per_layer is None or layers is None or free is None:
        return "needs B*S*H*R*P*2 bytes per Mamba layer: the shape or the free memory is unknown here"
    needed = per_layer * layers
    if needed <= free:
        return None
    return f"needs {needed:,} bytes ({per_layer:,} for each of {layers} layers), free: {free:,}"


@needs("kernels.split_scan", "a scan backend with split-scan kernels", "use mimo_backend=tilelang, or off")
def _split_kernels(_value: GateValue, facts: Facts) -> str | None:
    if facts.split_scan_kernels:
        return None
    backend = facts.mimo_backend or "(none chosen)"
    known = facts.split_scan_kernels is not None
    return f"scan backend {backend} has no split-scan kernels" if known else "needs split-scan kernels: unknown here"


@needs(
    "shape.split_scan",
    "B*H below the number of multiprocessors",
    "use auto, which splits only where it fills the device, or off",
    values=("on",),
)
def _too_few_blocks(_value: GateValue, facts: Facts) -> str | None:
    blocks, processors = facts.batch_heads, facts.multiprocessors
    if blocks is None or processors is None:
        return "needs B*H below the number of multiprocessors: unknown here"
    return None if blocks < processors else f"needs B*H below the {processors} multiprocessors, it is {blocks}"


@needs("config.fp8_recipe", f"fp8 recipe {' or '.join(_FP8_RECIPES)}", "set parallel.fp8_recipe to one of these")
def _fp8_recipe(_value: GateValue, facts: Facts) -> str | None:
    if facts.fp8_recipe in _FP8_RECIPES:
        return None
    # Delayed scaling keeps maxima from step to step, and a recomputed block would record each of them twice.
    why = ", which activation checkpointing would update twice a step" if facts.fp8_recipe == "delayed" else ""
    return f"needs an fp8 recipe of {', '.join(_FP8_RECIPES)}, found {facts.fp8_recipe or 'none'}{why}"


@needs(
    "model.te_linears",
    "a model with linears that can hold FP8 weights",
    "use a model with mixers, attention or MLPs, or leave the gate off",
)
def _te_linears(_value: GateValue, facts: Facts) -> str | None:
    if facts.te_linears:
        return None
    found = "unknown here" if facts.te_linears is None else "it has none"
    return f"needs a model with linears that can hold FP8 weights: {found}"


@needs(
    "selftest.liger",
    "a passed self-test of the per-token gradients with non-uniform weights",
    "install a version that passes it, or leave the gate off",
)
def _liger_is_right(_value: GateValue, facts: Facts) -> str | None:
    if facts.liger_selftest is True:
        return None
    detail = facts.liger_selftest_detail
    known = "not run here" if facts.liger_selftest is None else "it failed"
    return f"needs a passed self-test of the per-token gradients: {known}{f' ({detail})' if detail else ''}"


@needs(
    "layout.tensor_parallel",
    "one tensor-parallel rank",
    "use tp = 1, or leave the gate off: the chunked loss splits the vocabulary over ranks",
)
def _whole_vocabulary(_value: GateValue, facts: Facts) -> str | None:
    tp = facts.tensor_parallel
    return None if tp == 1 else f"needs tp = 1, it is {'unknown here' if tp is None else tp}"


@needs("model.mtp_depth", "a model with MTP heads", "use a pattern with MTP depths, such as M-M-*-/*-")
def _has_mtp_heads(_value: GateValue, facts: Facts) -> str | None:
    depth = facts.mtp_depth
    return None if depth is not None and depth > 0 else f"needs MTP heads, the model has {depth or 'none'}"


@needs(
    "inference.draft_length",
    "draft length below the KV block size",
    "draft fewer tokens or use larger blocks",
)
def _draft_fits_block(_value: GateValue, facts: Facts) -> str | None:
    draft, block = facts.draft_length, facts.kv_block_size
    if draft is None or block is None:
        return "needs a draft length below the KV block size: unknown here"
    return None if 0 < draft < block else f"needs a draft length in 1..{block - 1}, it is {draft}"


@needs(
    "model.homogeneous_stack",
    "a stack that is one unit of layers repeated",
    "use a pattern of equal units; runs, which leaves the others to the plain loop; or off",
    values=("on",),
)
def _one_run(_value: GateValue, facts: Facts) -> str | None:
    if facts.homogeneous_stack:
        return None
    found = "unknown here" if facts.homogeneous_stack is None else facts.stack_difference or "it is not"
    return f"needs a homogeneous stack: {found}"


@needs(
    "model.homogeneous_runs",
    "equal units of layers side by side",
    "use a pattern in which a unit repeats, or off",
    values=("runs",),
)
def _some_run(_value: GateValue, facts: Facts) -> str | None:
    if facts.homogeneous_runs:
        return None
    found = "unknown here" if facts.homogeneous_runs is None else "the stack has none"
    return f"needs equal units of layers side by side: {found}"


@needs(
    "config.block_checkpointing",
    "activation_checkpointing = block",
    "set train.activation_checkpointing = block, or leave the gate off",
)
def _layers_recomputed(_value: GateValue, facts: Facts) -> str | None:
    found = facts.activation_checkpointing
    if found == "block":
        return None
    return f"needs activation_checkpointing = block, as a loop recomputes its layers: it is {found or 'unknown here'}"


@needs(
    "fact.attention_in_tile_table",
    "attention shapes in the tile table",
    "use a shape of the table, or compile one ahead of time and add it",
)
def _attention_in_table(_value: GateValue, facts: Facts) -> str | None:
    if facts.attention_in_tile_table:
        return None
    found = "unknown here" if facts.attention_in_tile_table is None else facts.attention_tile_refusal or "they are not"
    return f"needs attention shapes in the tile table: {found}"


_STATE_SLOTS = fact_true(
    "state_slots", "recurrent-state slots to snapshot", "use memory_only, which never skips prefill"
)._replace(values=("snapshots",))

# The range that megatron-core 0.16.1 declares ends at 2.12; a later one is asked for by a value of its own, so that the
# request is in the audit chain, in every checkpoint and equal on all ranks (decision 0009).
_ANY_LATER_TE = package("transformer-engine", "2.9")._replace(
    name="package.transformer-engine.untried", values=("on_untried_te",)
)

_DECLARED = build_catalog(
    [
        GateSpec(
            name="tma",
            kind=Kind.ENUM,
            values=("off", "fwd", "all"),
            stage=Stage.EXPERIMENTAL,
            since=_SINCE,
            expiry=_EXPIRY,
            owner="kernels",
            summary="Bulk copies by the tensor memory accelerator in the scan kernels.",
            preconditions=(on_device("cuda"), capability(9, 0), package("tilelang", "0.1.15"), _two_d_layout),
        ),
        GateSpec(
            name="warp_specialization",
            kind=Kind.ENUM,
            values=("off", "fwd", "all"),
            stage=Stage.EXPERIMENTAL,
            since=_SINCE,
            expiry=_EXPIRY,
            owner="kernels",
            summary="Producer and consumer warps in the scan kernels.",
            preconditions=(on_device("cuda"), capability(9, 0), package("tilelang", "0.1.15"), _two_d_layout),
            depends_on=(Dependency("fwd", "tma", ("fwd", "all")), Dependency("all", "tma", ("all",))),
        ),
        GateSpec(
            name="psiv_cache",
            kind=Kind.STAGES,
            values=("off", "python_precompute", "gmem_pool", "bwd_fwd_reuse", "bwd_bwd_reuse"),
            stage=Stage.EXPERIMENTAL,
            since=_SINCE,
            expiry=_EXPIRY,
            owner="kernels",
            summary="Keep x * mimo_x from forward to backward; each stage includes those before it.",
            preconditions=(_psiv_stage, _psiv_headroom),
        ),
        GateSpec(
            name="split_scan",
            kind=Kind.ENUM,
            values=("off", "auto", "on"),
            stage=Stage.EXPERIMENTAL,
            since=_SINCE,
            expiry=_EXPIRY,
            owner="kernels",
            summary="Split the sequence over multiprocessors when batch * heads does not fill the device.",
            preconditions=(
                on_device("cuda"),
                _split_kernels,
                _too_few_blocks,
            ),
        ),
        GateSpec(
            name="register_split",
            kind=Kind.ENUM,
            values=("off",),
            stage=Stage.RETIRED,
            since=_SINCE,
            owner="kernels",
            summary="Split bwd_bwd to lower its register count: rejected on the reverse scan's live set.",
            decision="infra/decisions/0002-register-split-rejected.md",
        ),
        GateSpec(
            name="cute_dsl",
            kind=Kind.ENUM,
            values=("off",),
            stage=Stage.RETIRED,
            since=_SINCE,
            owner="kernels",
            summary="A second kernel lane in CuTe DSL: useful as a reference, not carried.",
            decision="infra/decisions/0003-cute-dsl-not-carried.md",
        ),
        GateSpec(
            name="fp8_param_gather",
            kind=Kind.ENUM,
            values=("off", "on", "on_untried_te"),
            stage=Stage.EXPERIMENTAL,
            since=_SINCE,
            expiry=_EXPIRY,
            owner="parallel",
            summary="Large linears compute in FP8, and replicas gather their weights in FP8.",
            preconditions=(
                on_device("cuda"),
                capability(9, 0),
                package("transformer-engine", "2.9", "2.12")._replace(values=("on",)),
                _ANY_LATER_TE,
                fact_true("distributed_optimizer", "the megatron distributed optimizer", "use that optimizer"),
                fact_true("bf16", "bf16 training", "train in bf16"),
                _fp8_recipe,
                _te_linears,
            ),
        ),
        GateSpec(
            name="fused_linear_ce",
            kind=Kind.ENUM,
            values=("off", "liger"),
            stage=Stage.EXPERIMENTAL,
            since=_SINCE,
            expiry=_EXPIRY,
            owner="kernels",
            summary="Liger's fused linear cross-entropy in place of the chunked one.",
            preconditions=(
                on_device("cuda"),
                package("liger-kernel", "0.8.3"),
                _liger_is_right,
                _whole_vocabulary,
            ),
        ),
        GateSpec(
            name="xla_scan_layers",
            kind=Kind.ENUM,
            values=("off", "on", "runs"),
            stage=Stage.EXPERIMENTAL,
            since=_SINCE,
            expiry=_EXPIRY,
            owner="tpu",
            summary="Equal layers traced once and looped over, for a shorter XLA compile: the stack, or its runs.",
            preconditions=(on_device("tpu", "xla"), package("torch-xla"), _one_run, _some_run, _layers_recomputed),
        ),
        GateSpec(
            name="pallas_attention",
            kind=Kind.BOOL,
            values=("off", "on"),
            stage=Stage.EXPERIMENTAL,
            since=_SINCE,
            expiry=_EXPIRY,
            owner="tpu",
            summary="Attention by Pallas kernels on TPU, which skip blocks that no query sees.",
            preconditions=(on_device("tpu"), package("jax"), _attention_in_table),
        ),
        GateSpec(
            name="prefix_cache",
            kind=Kind.ENUM,
            values=("off", "memory_only", "snapshots"),
            stage=Stage.EXPERIMENTAL,
            since=_SINCE,
            expiry=_EXPIRY,
            owner="inference",
            summary="Share KV blocks of equal prefixes; snapshots also skips prefill, never without a state.",
            preconditions=(_STATE_SLOTS,),
        ),
        GateSpec(
            name="mtp_speculation",
            kind=Kind.BOOL,
            values=("off", "on"),
            stage=Stage.EXPERIMENTAL,
            since=_SINCE,
            expiry=_EXPIRY,
            owner="inference",
            summary="Draft tokens with the MTP heads and verify them in one pass.",
            preconditions=(_has_mtp_heads, _draft_fits_block),
        ),
    ]
)


class _Catalog(Mapping[str, GateSpec]):
    """What is declared above, raised by the promotions. They are read at the first look and not when this module is
    imported, so that a damaged file is an error of the command, which says so."""

    @cached_property
    def _specs(self) -> Mapping[str, GateSpec]:
        return build_catalog(raised(_DECLARED.values(), read_promotions()))

    def __getitem__(self, name: str) -> GateSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


CATALOG: Mapping[str, GateSpec] = _Catalog()
