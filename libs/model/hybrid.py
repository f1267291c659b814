"""The hybrid language model: embedding, pattern of residual blocks, tied or own head, MTP depths, loss, and
decode.

Not for optimisation, parallelism or sampling. Decode here is plain and unpaged: exact, for tests and small
uses.
"""
# B sequences  S tokens  D hidden  V vocabulary

from __future__ import annotations

from collections.abc import Iterable
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
    document_bounds,
    document_positions,
    rope_tables,
)
from libs.model.mtp import IGNORE, MtpDepth, shift, within_document
from libs.model.pattern import LayerKind

Checkpointing = Literal["none", "block"]


class LossOutput(NamedTuple):
    """`loss`: mean main nll + mtp_weight * mean over depths of their mean nll, in nats, differentiable.

    Sums are over valid targets, detached; tuples hold one entry per MTP depth. Counts are 0-d int64 tensors,
    so that reading them is the caller's choice of when to wait for the device.
    """

    loss: Tensor
    main_nll_sum: Tensor
    n_tokens: Tensor
    mtp_nll_sums: tuple[Tensor, ...]
    mtp_n_tokens: tuple[Tensor, ...]


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
    ) -> None:
        """Parameters start from seed 0 (`reset_parameters` for another), unless on the meta device.

        Raises:
            UserError: unknown `activation_checkpointing`. ValueError: a named backend that cannot run here.
        """
        super().__init__()
        if activation_checkpointing not in get_args(Checkpointing):
            raise UserError.unknown("activation checkpointing", activation_checkpointing, get_args(Checkpointing))
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        pattern = config.layers
        self.embedding = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(ResidualBlock(config, kind) for kind in pattern.trunk)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else Projection(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(MtpDepth(config, kinds) for kinds in pattern.mtp)
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
        """Fill every parameter from `seed` (see `init`)."""
        init_parameters(self, self.config, seed)

    @property
    def head_weight(self) -> Tensor:
        """(V, D) of the output head: the embedding's when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def _context(self, tokens_BS: Tensor, cu_seqlens: Tensor | None, offset: int = 0) -> ForwardContext:
        bounds = document_bounds(tokens_BS, cu_seqlens)
        if tokens_BS.device.type != self._resolved_for:
            self._resolve_backends(tokens_BS.device)
        rope = None
        attention_config = self.config.attention
        if attention_config is not None and LayerKind.ATTENTION in self.config.layers.kinds:
            positions_S = document_positions(tokens_BS.shape[1], bounds, tokens_BS.device) + offset
            dtype = torch.float64 if self.final_norm.weight.dtype == torch.float64 else torch.float32
            rope = rope_tables(positions_S, attention_config.head_dim, attention_config.rope_theta, dtype)
        backends = {name: choice.value for name, choice in self.choices.items()}
        return ForwardContext(cu_seqlens, bounds, rope, backends.get("mimo"), backends.get("attention"))

    def _run(self, blocks: Iterable[nn.Module], x_BSD: Tensor, context: ForwardContext) -> Tensor:
        recompute = self.activation_checkpointing == "block" and torch.is_grad_enabled()
        for block in blocks:
            if recompute:
                x_BSD = checkpoint(block, x_BSD, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BSD = block(x_BSD, context)
        return x_BSD

    def _nll(self, hidden_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        nll_T = loss.linear_cross_entropy(
            hidden_BSD.flatten(0, 1),
            self.head_weight,
            labels_BS.flatten(),
            ignore_index=IGNORE,
            backend=self.choices["loss"].value,
        )
        return nll_T.view_as(labels_BS)

    def forward(self, tokens_BS: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Hidden states (B, S, D) after the final norm.

        Args:
            tokens_BS: ids. cu_seqlens: (n + 1,) document boundaries, needs B = 1; without it every row is one
                document.
        """
        context = self._context(tokens_BS, cu_seqlens)
        hidden_BSD: Tensor = self.final_norm(self._run(self.blocks, self.embedding(tokens_BS), context))
        return hidden_BSD

    def logits(self, tokens_BS: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """(B, S, V), whole: for small uses only."""
        return F.linear(self(tokens_BS, cu_seqlens=cu_seqlens), self.head_weight)

    def per_token_nll(self, tokens_BS: Tensor, labels_BS: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """(B, S) fp32 negative log-likelihood of each label in nats, 0 where the label is -100."""
        return self._nll(self(tokens_BS, cu_seqlens=cu_seqlens), labels_BS)

    def loss(self, tokens_BS: Tensor, labels_BS: Tensor, *, cu_seqlens: Tensor | None = None) -> LossOutput:
        """Training loss of one batch; `labels_BS[i]` is the token after `tokens_BS[i]`, or -100."""
        context = self._context(tokens_BS, cu_seqlens)
        hidden_BSD = self._run(self.blocks, self.embedding(tokens_BS), context)
        nll_sum = self._nll(self.final_norm(hidden_BSD), labels_BS).sum()
        n_tokens = (labels_BS != IGNORE).sum()
        total = nll_sum / n_tokens.clamp(min=1)
        sums, counts = [], []
        for ahead, depth in enumerate(self.mtp, start=1):
            assert isinstance(depth, MtpDepth)
            inside_S = within_document(tokens_BS.shape[1], ahead, context.bounds, tokens_BS.device)
            # Past the document's end the input is token 0: a constant, and those positions have no target.
            ahead_BSD = self.embedding(shift(tokens_BS, ahead, inside_S, 0))
            hidden_BSD = self._run(depth.blocks, depth.join(hidden_BSD, ahead_BSD), context)
            targets_BS = shift(labels_BS, ahead, inside_S, IGNORE)
            depth_sum = self._nll(depth.final_norm(hidden_BSD), targets_BS).sum()
            count = (targets_BS != IGNORE).sum()
            total = total + self.config.mtp_weight / len(self.mtp) * depth_sum / count.clamp(min=1)
            sums.append(depth_sum.detach())
            counts.append(count)
        return LossOutput(total, nll_sum.detach(), n_tokens, tuple(sums), tuple(counts))

    @torch.no_grad()
    def prefill(self, tokens_BS: Tensor) -> tuple[Tensor, LMState]:
        """Logits (B, V) after the last token, and the state to `step` from. All rows have the same length."""
        context = self._context(tokens_BS, None)
        x_BSD = self.embedding(tokens_BS)
        states = []
        for block in self._trunk():
            x_BSD, state = block.prefill(x_BSD, context)
            states.append(state)
        return self._last_logits(x_BSD), LMState(tuple(states), tokens_BS.shape[1])

    @torch.no_grad()
    def step(self, token_B: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        """Logits (B, V) after one more token per row. The given state stays valid: nothing is in place."""
        tokens_B1 = token_B[:, None]
        context = self._context(tokens_B1, None, offset=state.position)
        x_B1D = self.embedding(tokens_B1)
        states = []
        for block, layer_state in zip(self._trunk(), state.layers, strict=True):
            x_B1D, new_state = block.step(x_B1D, context, layer_state)
            states.append(new_state)
        return self._last_logits(x_B1D), LMState(tuple(states), state.position + 1)

    def _trunk(self) -> list[ResidualBlock]:
        return [block for block in self.blocks if isinstance(block, ResidualBlock)]

    def _last_logits(self, x_BSD: Tensor) -> Tensor:
        return F.linear(self.final_norm(x_BSD[:, -1]), self.head_weight)
