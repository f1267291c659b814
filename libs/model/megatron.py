"""The mixer as a layer of Megatron-core's `MambaModel`: for Megatron-LM users who want Mamba-3 MIMO and nothing else.

Not used by `HybridLM`. Megatron itself is behind `libs.parallel.megatron_mixer`, imported when a spec is asked for.
"""
# S tokens (s of one rank under sequence parallelism)  B sequences  D hidden

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from libs.flags.errors import UserError
from libs.kernels.mimo import choose_backend
from libs.model.config import ModelConfig
from libs.model.init import init_parameters
from libs.model.layers import ForwardContext
from libs.model.mixer import FP32_PARAMETERS, MambaMixer
from libs.model.pattern import LayerKind
from libs.model.sharding import check_tensor_parallel, mixer_rules
from libs.parallel.tensor import enter, leave


def megatron_mixer_spec(model: ModelConfig, *, seed: int, backend: str = "auto") -> Any:
    """The `ModuleSpec` for `MambaLayerSubmodules(mixer=...)`.

    Args:
        model: gives the mixer and its initial values. Layer n of MambaModel starts like block n - 1 of
            `HybridLM(model)` with the same seed, so its pattern must have an `M` there.
        backend: of the scan.
    """
    from libs.parallel.megatron_mixer import module_spec

    if LayerKind.MAMBA not in model.layers.trunk:
        raise UserError(f"model {model.name!r}: pattern {model.pattern!r} has no 'M' to take a mixer from")
    return module_spec(MegatronMixer, {"model": model, "seed": seed, "backend": backend})


class MegatronMixer(MambaMixer):
    """`MambaMixer` under Megatron's calling convention: (S or s, B, D) in and out, and a bias that is None."""

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        *,
        d_model: int,
        layer_number: int,
        pg_collection: Any,
        pp_layer_offset: int = 0,
        model: ModelConfig,
        seed: int,
        backend: str,
    ) -> None:
        """Called by Megatron. layer_number: global, from 1.

        Raises:
            UserError: d_model, tp or the layer's place does not fit `model`, or a context-parallel group.
        """
        from libs.parallel.megatron_mixer import ShardedParameter, mark_parameters, parallel_of

        trunk, mixer = model.layers.trunk, model.mixer
        if d_model != model.hidden_size:
            raise UserError(f"MambaModel has hidden_size={d_model}, model {model.name!r} has {model.hidden_size}")
        if layer_number > len(trunk) or trunk[layer_number - 1] is not LayerKind.MAMBA:
            raise UserError(f"layer {layer_number} is a mixer, but pattern {model.pattern!r} has no 'M' there")
        assert mixer is not None
        parallel = parallel_of(config, pg_collection)
        check_tensor_parallel(model, parallel.tp.size)
        super().__init__(d_model, mixer, parallel)
        self.parallel, self.backend, self._tp_handle = parallel, backend, pg_collection.tp
        self.sharded = {
            name: ShardedParameter(
                rule.dim, tuple((part.key, part.width // parallel.tp.size) for part in rule.segments)
            )
            for name, rule in mixer_rules(mixer).items()
            if rule.dim is not None
        }
        init_parameters(self, model, seed, tp=parallel.tp, prefix=f"blocks.{layer_number - 1}.layer.")
        mark_parameters(self, self.sharded)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Megatron casts whole modules (`Float16Module`); what must stay fp32 follows the device but not the dtype."""
        kept = {name: getattr(self, name).detach() for name in FP32_PARAMETERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != before.dtype and parameter.dtype.itemsize < before.dtype.itemsize:
                parameter.data = before.to(parameter.device)
        return self

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
        packed_seq_params: Any = None,
    ) -> tuple[Tensor, None]:
        """Hidden states (S or s, B, D) after the layer's norm -> the mixer's output in the same layout, and no bias.

        Raises:
            UserError: an inference context: Megatron's decoding is not supported.
        """
        from libs.parallel.megatron_mixer import packed_boundaries

        if inference_context is not None or inference_params is not None:
            raise UserError("Mamba-3 inside MambaModel trains only; decode with HybridLM")
        tp = self.parallel.tp
        seq_len = hidden_states.shape[0] * (tp.size if self.parallel.shards_tokens else 1)
        u_BSD = enter(hidden_states.transpose(0, 1), self.parallel, seq_len)
        chosen = choose_backend(self.backend, u_BSD.device).value
        context = ForwardContext(packed_boundaries(packed_seq_params), None, None, chosen, None, seq_len)
        out_BSD = leave(super().forward(u_BSD, context), self.parallel)
        return out_BSD.transpose(0, 1).contiguous(), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's checkpoint entries: in_proj has one key per segment, so that it loads under any tp."""
        from libs.parallel.megatron_mixer import sharded_entries

        return sharded_entries(self, self.sharded, prefix, sharded_offsets, metadata, self._tp_handle)

    def mamba_state_shapes_per_request(self) -> tuple[torch.Size, torch.Size]:
        """Megatron asks this for decoding. Raises UserError: not supported."""
        raise UserError("Mamba-3 inside MambaModel trains only; decode with HybridLM")
