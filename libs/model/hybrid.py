"""The hybrid language model: embedding, pattern of residual blocks, tied or own head, MTP depths, loss, and
decode.

Not for optimisation or sampling; how weights are cut over ranks is `sharding`'s. Decode here is plain and unpaged:
exact, for tests and small uses.
"""
# B sequences  S tokens  D hidden  V vocabulary

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from libs.flags.errors import UserError
from libs.kernels import attention, loss, mimo
from libs.kernels.backend import Choice
from libs.model.block import LayerState, ResidualBlock
from libs.model.config import ModelConfig
from libs.model.init import init_parameters
from libs.model.layers import (
    ForwardContext,
    Projection,
    RMSNorm,
    TokenEmbedding,
    between_layers,
    document_bounds,
    document_positions,
    rope_tables,
)
from libs.model.mtp import IGNORE, MtpDepth, shift, within_document
from libs.model.packing import STATIC_DEVICES, packed_rows
from libs.model.pattern import LayerKind
from libs.model.scan_layers import layer_runs, refuse_one_by_one, run_as_loop
from libs.model.sharding import check_tensor_parallel
from libs.parallel.context import ContextShard, slice_offsets
from libs.parallel.mesh import Parallel, single
from libs.parallel.recompute import recompute_on_xla
from libs.parallel.tensor import enter, gather_columns, vocab_parallel_embedding, whole_tokens

Checkpointing = Literal["none", "block"]


class LossOutput(NamedTuple):
    """`loss`: mean main nll + mtp_weight * mean over depths of their mean nll, in nats, differentiable.

    Sums are over valid targets, detached; tuples hold one entry per MTP depth. Counts are 0-d int64 tensors,
    so that reading them is the caller's choice of when to wait for the device. Under context parallelism every field
    is this rank's share: its sum over the group is the whole row's, and so are the gradients' sums.
    """

    loss: Tensor
    main_nll_sum: Tensor
    n_tokens: Tensor
    mtp_nll_sums: tuple[Tensor, ...]
    mtp_n_tokens: tuple[Tensor, ...]


class TargetCounts(NamedTuple):
    """Targets of the main head and of each MTP depth."""

    main: int
    mtp: tuple[int, ...]


class LMState(NamedTuple):
    """Decode state: one entry per trunk block, and how many tokens every row has seen."""

    layers: tuple[LayerState, ...]
    position: int


class HybridLM(nn.Module):
    """A model built from a `ModelConfig`. Also constructible under `torch.device("meta")`.

    Attributes:
        choices: the backend of each operator and why, resolved for the device of the parameters (again when
            tokens arrive on another kind of device).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mimo_backend: str = "auto",
        attention_backend: str = "auto",
        loss_backend: str = "auto",
        activation_checkpointing: Checkpointing = "none",
        parallel: Parallel | None = None,
    ) -> None:
        """Parameters start from seed 0 (`reset_parameters` for another), unless on the meta device.

        Args:
            parallel: hold this rank's shards only. Tokens, labels and losses are the same on every rank of its
                tensor-parallel group, parameter names too; what a name holds is `sharding.shard_rules`. Tokens and
                labels are whole rows on every rank of a context-parallel group too, which works on its slice of them.

        Raises:
            UserError: unknown `activation_checkpointing`, or a tp that cannot shard this model. ValueError: a named
                backend that cannot run here.
        """
        super().__init__()
        if activation_checkpointing not in get_args(Checkpointing):
            raise UserError.unknown("activation checkpointing", activation_checkpointing, get_args(Checkpointing))
        self.config, self.parallel = config, parallel
        self._tp = (single() if parallel is None else parallel.groups).tp
        check_tensor_parallel(config, self._tp.size)
        self.activation_checkpointing = activation_checkpointing
        pattern, vocab = config.layers, config.vocab_size // self._tp.size
        self.embedding = TokenEmbedding(vocab, config.hidden_size)
        self.blocks = nn.ModuleList(ResidualBlock(config, kind, parallel) for kind in pattern.trunk)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, between_layers(parallel))
        self.head = None if config.tie_embeddings else Projection(config.hidden_size, vocab)
        self.mtp = nn.ModuleList(MtpDepth(config, kinds, parallel) for kinds in pattern.mtp)
        self.choices: dict[str, Choice] = {}
        self.request_backends(mimo=mimo_backend, attention=attention_backend, loss=loss_backend)
        if not self.embedding.weight.is_meta:
            self.reset_parameters()

    def request_backends(self, *, mimo: str = "auto", attention: str = "auto", loss: str = "auto") -> None:
        """Ask for backends, resolved for the parameters' device. Raises ValueError when one cannot run."""
        self._requested = {"mimo": mimo, "attention": attention, "loss": loss}
        self._resolve_backends(self.embedding.weight.device)

    def _resolve_backends(self, device: torch.device) -> None:
        """Only operators this pattern uses: a choice nobody runs would be a false statement in a run log."""
        kinds = self.config.layers.kinds
        used = {"loss": loss.choose_backend}
        if LayerKind.MAMBA in kinds:
            used["mimo"] = mimo.choose_backend
        if LayerKind.ATTENTION in kinds:
            used["attention"] = attention.choose_backend
        self._resolved_for = device.type
        self.choices = {name: choose(self._requested[name], device) for name, choose in used.items()}

    def reset_parameters(self, seed: int = 0) -> None:
        """Fill every parameter from `seed` (see `init`); the full values do not depend on the layout."""
        init_parameters(self, self.config, seed, tp=self._tp)

    @property
    def head_weight(self) -> Tensor:
        """(V, D) of the output head (V / tp rows under tensor parallelism): the embedding's when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def pass_context(self, tokens_BS: Tensor, cu_seqlens: Tensor | None, offset: int = 0) -> ForwardContext:
        """What the blocks share in a pass over these tokens; `offset` tokens of the same document come before them."""
        if tokens_BS.device.type != self._resolved_for:
            self._resolve_backends(tokens_BS.device)
        if tokens_BS.device.type in STATIC_DEVICES:
            return self._static_context(tokens_BS, cu_seqlens, offset)
        bounds = document_bounds(tokens_BS, cu_seqlens)
        rope, shard = None, self._slice(tokens_BS.shape[1], bounds)
        if LayerKind.ATTENTION in self.config.layers.kinds:
            positions_S = document_positions(tokens_BS.shape[1], bounds, tokens_BS.device) + offset
            rope = self._rope(positions_S if shard is None else shard.cut(positions_S, 0))
        mimo_backend, attention_backend = self._chosen("mimo"), self._chosen("attention")
        seq_len = tokens_BS.shape[1] if shard is None else shard.stop - shard.start
        return ForwardContext(cu_seqlens, bounds, rope, mimo_backend, attention_backend, seq_len, shard)

    def _static_context(self, tokens_BS: Tensor, cu_seqlens: Tensor | None, offset: int) -> ForwardContext:
        """The same for a device that compiles for shapes; rows may be several, each with its own documents."""
        rows, seq_len = tokens_BS.shape
        packed = packed_rows(rows, seq_len, cu_seqlens).to(tokens_BS.device)
        rope = self._rope(packed.positions + offset) if LayerKind.ATTENTION in self.config.layers.kinds else None
        mimo_backend, attention_backend = self._chosen("mimo"), self._chosen("attention")
        return ForwardContext(None, None, rope, mimo_backend, attention_backend, seq_len, packed=packed)

    def _chosen(self, operator: str) -> str | None:
        choice = self.choices.get(operator)
        return None if choice is None else choice.value

    def _rope(self, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        attention_config = self.config.attention
        assert attention_config is not None, "a pattern with '*' has attention"
        dtype = torch.float64 if self.final_norm.weight.dtype == torch.float64 else torch.float32
        return rope_tables(positions_S, attention_config.head_dim, attention_config.rope_theta, dtype)

    def _slice(self, seq_len: int, bounds: list[int] | None) -> ContextShard | None:
        """This rank's slice of a row; None without context parallelism. Cuts fall on the scan's chunk grid."""
        if self.parallel is None or self.parallel.cp.size == 1:
            return None
        group, mixer = self.parallel.cp, self.config.mixer
        offsets = slice_offsets(seq_len, group.size, multiple=1 if mixer is None else mixer.chunk_size)
        return ContextShard(group, offsets, None if bounds is None else tuple(bounds))

    def _refuse_slices(self, what: str) -> None:
        if self.parallel is not None and self.parallel.cp.size > 1:
            raise UserError(
                f"{what} works on whole rows: context parallel size {self.parallel.cp.size} is for training and "
                "scoring; load the model with cp=1"
            )

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """(B, S, D), or this rank's tokens of it under sequence parallelism, as everywhere between layers."""
        if self.parallel is None:
            embedded: Tensor = self.embedding(tokens_BS)
            return embedded
        return vocab_parallel_embedding(tokens_BS, self.embedding.weight, self.parallel)

    def _run(self, blocks: Iterable[nn.Module], x_BSD: Tensor, context: ForwardContext) -> Tensor:
        recompute = self.activation_checkpointing == "block" and torch.is_grad_enabled()
        for block in blocks:
            if recompute and x_BSD.device.type in STATIC_DEVICES:
                x_BSD = recompute_on_xla(block, x_BSD, context)
            elif recompute:
                x_BSD = checkpoint(block, x_BSD, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BSD = block(x_BSD, context)
        return x_BSD

    def _run_trunk(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        """All blocks but those of MTP depths; equal ones as one loop where gate xla_scan_layers says so."""
        blocks, at = self.trunk, 0
        if x_BSD.device.type in STATIC_DEVICES:
            for run in layer_runs(blocks, self.activation_checkpointing):
                x_BSD = run_as_loop(blocks, run, self._run(blocks[at : run.start], x_BSD, context), context, "scan")
                at = run.stop
        return self._run(blocks[at:], x_BSD, context)

    def _nll(self, hidden_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        """(B, S) from final hidden states as between layers; the same on every tensor-parallel rank."""
        hidden_BSD = enter(hidden_BSD, self.parallel, labels_BS.shape[1])
        nll_T = loss.linear_cross_entropy(
            hidden_BSD.flatten(0, 1),
            self.head_weight,
            labels_BS.flatten(),
            ignore_index=IGNORE,
            backend=self.choices["loss"].value,
            group=None if self._tp.size == 1 else self._tp,
        )
        return nll_T.view_as(labels_BS)

    def forward(self, tokens_BS: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Hidden states (B, S, D) after the final norm; under sequence or context parallelism this rank's tokens of
        them.

        Args:
            tokens_BS: ids. cu_seqlens: (n + 1,) document boundaries, needs B = 1 (not on XLA, where they count over all
                rows and are best left on the CPU); without it every row is one document.
        """
        context = self.pass_context(tokens_BS, cu_seqlens)
        hidden_BSD: Tensor = self.final_norm(self._run_trunk(self.embed(context.mine(tokens_BS)), context))
        return hidden_BSD

    def logits(self, tokens_BS: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """(B, S, V), whole: for small uses only."""
        self._refuse_slices("logits")
        hidden_BSD = enter(self(tokens_BS, cu_seqlens=cu_seqlens), self.parallel, tokens_BS.shape[1])
        return gather_columns(F.linear(hidden_BSD, self.head_weight), self._tp)

    def per_token_nll(self, tokens_BS: Tensor, labels_BS: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """(B, S) fp32 negative log-likelihood of each label in nats, 0 where the label is -100.

        Under context parallelism of this rank's slice.
        """
        shard = self._slice(labels_BS.shape[1], None)
        return self._nll(self(tokens_BS, cu_seqlens=cu_seqlens), labels_BS if shard is None else shard.cut(labels_BS))

    def target_counts(self, tokens_BS: Tensor, labels_BS: Tensor, *, cu_seqlens: Tensor | None = None) -> TargetCounts:
        """What `loss` divides by, of whole rows; ranks that share a batch add theirs up and pass the sums to it."""
        bounds, depths = document_bounds(tokens_BS, cu_seqlens), []
        for ahead in range(1, len(self.mtp) + 1):
            inside_S = within_document(tokens_BS.shape[1], ahead, bounds, labels_BS.device)
            depths.append(int((shift(labels_BS, ahead, inside_S, IGNORE) != IGNORE).sum()))
        return TargetCounts(int((labels_BS != IGNORE).sum()), tuple(depths))

    def loss(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        counts: TargetCounts | None = None,
    ) -> LossOutput:
        """Training loss of one batch; `labels_BS[i]` is the token after `tokens_BS[i]`, or -100.

        counts: of the whole batch of which these rows are one rank's part (`target_counts`, summed); losses of the
        parts then add up to the loss of the whole.
        """
        context = self.pass_context(tokens_BS, cu_seqlens)
        hidden_BSD = self._run_trunk(self.embed(context.mine(tokens_BS)), context)
        nll_sum = self._nll(self.final_norm(hidden_BSD), context.mine(labels_BS)).sum()
        divisor = (labels_BS != IGNORE).sum() if counts is None else nll_sum.new_tensor(counts.main)
        total = nll_sum / divisor.clamp(min=1)
        n_tokens = (context.mine(labels_BS) != IGNORE).sum()
        sums, found = [], []
        for ahead, depth in enumerate(self.mtp, start=1):
            assert isinstance(depth, MtpDepth)
            if context.packed is None:
                inside_S = within_document(tokens_BS.shape[1], ahead, context.bounds, tokens_BS.device)
            else:
                inside_S = context.packed.within(ahead)
            # Past the document's end the input is token 0: a constant, and those positions have no target.
            # Shifted as whole rows: the tokens ahead of a slice's last ones are the next rank's.
            ahead_BSD = self.embed(context.mine(shift(tokens_BS, ahead, inside_S, 0)))
            hidden_BSD = self._run(depth.blocks, depth.join(hidden_BSD, ahead_BSD), context)
            targets_BS = shift(labels_BS, ahead, inside_S, IGNORE)
            depth_sum = self._nll(depth.final_norm(hidden_BSD), context.mine(targets_BS)).sum()
            count = (targets_BS != IGNORE).sum() if counts is None else nll_sum.new_tensor(counts.mtp[ahead - 1])
            total = total + self.config.mtp_weight / len(self.mtp) * depth_sum / count.clamp(min=1)
            sums.append(depth_sum.detach())
            found.append((context.mine(targets_BS) != IGNORE).sum())
        return LossOutput(total, nll_sum.detach(), n_tokens, tuple(sums), tuple(found))

    @torch.no_grad()
    def prefill(self, tokens_BS: Tensor, state: LMState | None = None) -> tuple[Tensor, LMState]:
        """Logits (B, V) after the last token, and the state to `step` or to prefill from. All rows have one length.

        state: after earlier tokens of the same rows; it stays valid. The result is that of one call up to rounding, and
        the states of mixers that of one call by bits where the cut is on the chunk grid.
        """
        self._refuse_slices("prefill")
        refuse_one_by_one(tokens_BS.device)
        before = 0 if state is None else state.position
        context = self.pass_context(tokens_BS, None, offset=before)
        x_BSD = self.embed(tokens_BS)
        earlier: Sequence[LayerState] = [None] * len(self.blocks) if state is None else state.layers
        states = []
        for block, layer_state in zip(self.trunk, earlier, strict=True):
            x_BSD, new_state = block.prefill(x_BSD, context, layer_state)
            states.append(new_state)
        return self._last_logits(x_BSD, context), LMState(tuple(states), before + tokens_BS.shape[1])

    @torch.no_grad()
    def step(self, token_B: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        """Logits (B, V) after one more token per row. The given state stays valid: nothing is in place."""
        self._refuse_slices("step")
        refuse_one_by_one(token_B.device)
        tokens_B1 = token_B[:, None]
        context = self.pass_context(tokens_B1, None, offset=state.position)
        x_B1D = self.embed(tokens_B1)
        states = []
        for block, layer_state in zip(self.trunk, state.layers, strict=True):
            x_B1D, new_state = block.step(x_B1D, context, layer_state)
            states.append(new_state)
        return self._last_logits(x_B1D, context), LMState(tuple(states), state.position + 1)

    @property
    def trunk(self) -> list[ResidualBlock]:
        """The blocks before the final norm, in order."""
        return [block for block in self.blocks if isinstance(block, ResidualBlock)]

    def _last_logits(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        last_BD = whole_tokens(x_BSD, self.parallel, context.seq_len)[:, -1]
        return gather_columns(F.linear(self.final_norm(last_BD), self.head_weight), self._tp)


def between_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that take the residual stream, (B, S, D): every block and every norm after the last one."""
    taken = (module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "final_norm")
    return [*(module for module in model.modules() if isinstance(module, ResidualBlock)), *taken]
