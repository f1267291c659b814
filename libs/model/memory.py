"""How many bytes a training step needs at its peak, by component, by formula: for `--dry-run`, before anything is
allocated.

An estimate of tensors, held to 10 % of a process's measured peak on a CPU in fp32. Not in it: what an allocator keeps
beside them (unused parts of its blocks), buffers of BLAS, of collectives and of a device's own runtime.
"""
# T tokens of a micro-batch  D hidden  H heads  P headdim  G groups  R rank  N state  A angles  W width  V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from libs.flags.errors import UserError
from libs.kernels.loss.chunked import default_chunk_tokens
from libs.kernels.mimo import Dims
from libs.kernels.mimo.chunked_memory import backward_elements, saved_states, saved_weights
from libs.model.config import AttentionConfig, MixerConfig, ModelConfig
from libs.model.flops import block_parameters, parameter_count
from libs.model.pattern import LayerKind

# Bytes of optimizer state per parameter: AdamW keeps two fp32 moments, SGD without momentum nothing.
OPTIMIZER_BYTES = {"adamw": 8, "sgd": 0}
FP32 = 4
FP8_BOTH_WAYS = 2  # Hopper multiplies FP8 along rows only, so a weight is held transposed too


class MemoryEstimate(NamedTuple):
    """Bytes at the moment of a step at which most are held, which `at` names: the backward of a block or head, or the
    update.

    `by_component`: parameters, optimizer, gradients (that are there at that moment), activations (saved for backward),
    scan_states (states that scans save, fp32), logits_chunk (what the backward of a head holds), workspace
    (what the backward of a block holds, mostly gradients of its activations).
    """

    by_component: dict[str, int]
    total: int
    at: str


class _Stage(NamedTuple):
    """A part of the model in the order of the forward pass, in bytes.

    saved: from its forward to its backward; scan: what its scan adds to that. again: what its backward saves anew
    before it begins. within: the most that backward holds beside all this. logits: the same of a head. parameters:
    elements whose gradient it makes first.
    """

    name: str
    saved: int
    within: int
    parameters: int
    scan: int = 0
    again: int = 0
    logits: int = 0


class _Sizes(NamedTuple):
    """T tokens inside layers, how many of them this rank holds between layers, bytes of an activation inside a layer,
    and whether torch has a fused norm there: the composed one of a CPU also saves its result before the weight."""

    tokens: int
    shared: int
    low: int
    fused_norm: bool

    def stream(self, hidden: int) -> int:
        """Of one residual stream, fp32."""
        return FP32 * self.shared * hidden

    def norm(self, hidden: int) -> int:
        """What a norm between layers saves: its input."""
        return self.stream(hidden) * (1 if self.fused_norm else 2)


def _mamba(hidden: int, mixer: MixerConfig, of: _Sizes) -> tuple[int, int, int]:
    """Saved, saved by the scan, within backward.

    Saved: the packed projection, of which the scan keeps views, B and C after their norms with one number a row each
    (composed norms: also before the weight, and under autocast widened), the output, and the weights of the scan. Under
    autocast two projections round their input, each for itself. Backward holds most inside the scan's own, with the
    gradients of its output (for which the output itself has gone) and of the block.
    """
    rows = mixer.ngroups * mixer.mimo_rank
    dims = Dims(1, of.tokens, mixer.nheads, mixer.ngroups, mixer.mimo_rank, mixer.d_state, mixer.headdim, mixer.angles)
    rounded = of.low != FP32
    in_low = sum(mixer.packed_widths) + 2 * rows * mixer.d_state + mixer.inner + (hidden if rounded else 0)
    in_fp32 = 2 * rows
    if not of.fused_norm:
        in_fp32 += (4 if rounded else 2) * rows * mixer.d_state
    saved = of.tokens * (in_low * of.low + in_fp32 * FP32)
    saved += FP32 * saved_weights(dims, mixer.chunk_size, packed=True)
    scan = FP32 * saved_states(dims, mixer.chunk_size)
    return saved, scan, FP32 * backward_elements(dims, mixer.chunk_size)


def _attention(attention: AttentionConfig, of: _Sizes) -> tuple[int, int]:
    """Saved: the packed projection (values are a view of it), rotated queries and keys, the output of each document
    and of all, log-sum-exp. Within backward: gradients of the output, of q, k and v, and of the packed projection."""
    heads, kv = attention.nheads, attention.kv_heads
    saved = ((heads + 2 * kv) + (heads + kv) + 2 * heads) * attention.head_dim * of.low + heads * FP32
    within = (heads + 2 * (heads + 2 * kv)) * attention.head_dim * of.low
    return of.tokens * saved, of.tokens * within


def _block(config: ModelConfig, kind: LayerKind, of: _Sizes) -> _Stage:
    """A block saves its norm's input (fp32, this rank's tokens), the normed input of its layer, and its own. Its
    backward also holds the gradient of its output."""
    hidden, scan = config.hidden_size, 0
    if kind is LayerKind.MAMBA:
        assert config.mixer is not None
        saved, scan, within = _mamba(hidden, config.mixer, of)
    elif kind is LayerKind.ATTENTION:
        assert config.attention is not None
        saved, within = _attention(config.attention, of)
    else:
        assert config.mlp is not None
        # Saved: gate and up, silu of the gate, the product. When the product's gradient becomes those of its two
        # factors there are three of them, and the product has gone.
        width = of.tokens * config.mlp.width * of.low
        saved, within = 4 * width, 2 * width
    parameters = block_parameters(config, kind)
    saved += of.norm(hidden) + of.tokens * hidden * of.low
    if of.low != FP32:
        saved += parameters * of.low  # autocast's copies of the weights
    return _Stage(f"a block {kind.value}", saved, of.stream(hidden) + within, parameters, scan)


def _head(config: ModelConfig, of: _Sizes, device_type: str, parameters: int, joined: int) -> _Stage:
    """Saved: the final norm's input and output, and what an MTP depth `joined` (inputs of two norms, and their outputs
    side by side). Backward: one chunk of logits and the gradient of the hidden states; under autocast also the rounded
    chunk, and the weight's gradient summed in fp32, a chunk's share of it, and as it is returned."""
    hidden, vocab = config.hidden_size, config.vocab_size
    chunk = min(of.tokens, default_chunk_tokens(vocab, device_type))
    logits = FP32 * vocab * chunk
    if of.low != FP32:
        logits += of.low * vocab * chunk + (FP32 + of.low) * vocab * hidden
    normed = of.tokens * hidden * of.low
    return _Stage("the head", of.norm(hidden) + normed + joined, 0, parameters, logits=logits + normed)


def _stages(config: ModelConfig, of: _Sizes, device_type: str) -> Iterator[_Stage]:
    """In the order of the forward pass. The head's weight has its gradient from the last head's backward on; a tied one
    gets a second at the embedding, where both are added. Rotary tables are of all attention layers."""
    hidden, pattern = config.hidden_size, config.layers
    table = config.vocab_size * hidden
    tied = config.tie_embeddings
    tables = 0
    if config.attention is not None and LayerKind.ATTENTION in pattern.kinds:
        tables = FP32 * of.tokens * config.attention.head_dim
    yield _Stage("the embedding", tables, FP32 * table if tied else 0, 0 if tied else table)
    for kind in pattern.trunk:
        yield _block(config, kind, of)
    depths = len(pattern.mtp)
    yield _head(config, of, device_type, hidden + (0 if depths else table), 0)
    for number, kinds in enumerate(pattern.mtp, start=1):
        for kind in kinds:
            yield _block(config, kind, of)
        own = 3 * hidden + 2 * hidden * hidden + (table if number == depths else 0)
        joined = 2 * of.norm(hidden) + 2 * of.shared * hidden * of.low
        yield _head(config, of, device_type, own, joined)._replace(name=f"the head of MTP depth {number}")


def _recomputed(stage: _Stage, stream: int) -> _Stage:
    """Under activation checkpointing: a block's input is saved, and backward begins by saving the rest anew."""
    if not stage.name.startswith("a block"):
        return stage
    return stage._replace(saved=stream, scan=0, again=stage.saved + stage.scan - stream)


def _moments(stages: Sequence[_Stage], gradients_kept: bool) -> Iterator[tuple[str, dict[str, int]]]:
    """What is held in each stage's backward, and in the update after them."""
    whole = FP32 * sum(stage.parameters for stage in stages)
    nothing = {"activations": 0, "scan_states": 0, "logits_chunk": 0, "workspace": 0}
    for number, stage in enumerate(stages):
        before, made = stages[: number + 1], FP32 * sum(later.parameters for later in stages[number:])
        yield (
            f"the backward of {stage.name}",
            {
                "gradients": whole if gradients_kept else made,
                "activations": sum(earlier.saved for earlier in before) + stage.again,
                "scan_states": sum(earlier.scan for earlier in before),
                "logits_chunk": stage.logits,
                "workspace": stage.within,
            },
        )
    yield "the update", {"gradients": whole, **nothing}


def memory_estimate(
    config: ModelConfig,
    *,
    tokens: int,
    dtype_bytes: int,
    optimizer: str = "adamw",
    activation_checkpointing: Literal["none", "block"] = "none",
    device_type: str = "cuda",
    token_shards: int = 1,
    optimizer_shards: int = 1,
    gradients_kept: bool = True,
    fp8_parameters: int = 0,
) -> MemoryEstimate:
    """Peak bytes of one training step on one device: of the whole model, or of a rank's `sharding.local_config`.

    Gradients and moments are fp32, and parameters but for `fp8_parameters`; the scan is the chunked one.

    Args:
        tokens: of one micro-batch on the device. dtype_bytes: of activations (2 under bf16 autocast, else 4).
        optimizer: "adamw" or "sgd".
        token_shards: ranks that share the tokens between layers (sequence parallelism). optimizer_shards: ranks that
            share the optimizer's state.
        gradients_kept: all gradients are there from the start of a backward, as with several micro-batches or an engine
            with buffers of its own; otherwise each comes with its layer's backward.
        fp8_parameters: how many of the parameters are FP8, in rows and in columns; their fp32 values are then a part of
            the optimizer's state. What FP8 saves of activations and autocast's copies is not counted.

    Raises:
        UserError: an optimizer whose state is not known.
    """
    if optimizer not in OPTIMIZER_BYTES:
        raise UserError.unknown("optimizer", optimizer, OPTIMIZER_BYTES)
    sizes = _Sizes(tokens, -(-tokens // token_shards), dtype_bytes, fused_norm=device_type == "cuda")
    stages = list(_stages(config, sizes, device_type))
    parameters = parameter_count(config).total
    assert parameters == sum(stage.parameters for stage in stages), "every parameter belongs to one stage"
    if activation_checkpointing == "block":
        stages = [_recomputed(stage, sizes.stream(config.hidden_size)) for stage in stages]
    state = parameters * OPTIMIZER_BYTES[optimizer] + fp8_parameters * FP32
    always = {
        "parameters": (parameters - fp8_parameters) * FP32 + fp8_parameters * FP8_BOTH_WAYS,
        "optimizer": state // optimizer_shards,
    }
    at, held = max(_moments(stages, gradients_kept), key=lambda moment: sum(moment[1].values()))
    by_component = always | held
    return MemoryEstimate(by_component, sum(by_component.values()), at)
