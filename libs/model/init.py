"""Initial values by role, one random stream per parameter, and which parameters are special afterwards.

Each parameter's stream is seeded by (seed, its name) and drawn on the CPU, whole: the same values on every device,
whatever else is in the model and however it is sharded. Also the two rules other parts ask for: which parameters stay
fp32, which take no weight decay.
"""
# H heads  R rank  N state  P headdim

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from libs.model.config import MixerConfig, ModelConfig
from libs.model.layers import Projection, RMSNorm, TokenEmbedding
from libs.model.mixer import FP32_PARAMETERS, MambaMixer
from libs.model.sharding import ShardRule, shard_rules
from libs.parallel.mesh import Group

ALONE = Group()


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class _Cutter(NamedTuple):
    """Puts this rank's shard of a full value into a parameter."""

    rules: dict[str, ShardRule]
    tp: Group

    def put(self, name: str, parameter: Tensor, full: Tensor) -> None:
        parameter.copy_(self.rules[name].cut(full, self.tp.rank, self.tp.size))

    def normal(self, name: str, parameter: Tensor, std: float, generator: torch.Generator) -> None:
        shape = self.rules[name].full_shape(parameter.shape, self.tp.size)
        self.put(name, parameter, torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator))


def initial_dt_bias(config: MixerConfig, generator: torch.Generator) -> Tensor:
    """(H,) inverse softplus of exp(U(log dt_min, log dt_max)) floored at dt_init_floor, computed in fp64."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    draw = torch.rand(config.nheads, generator=generator, dtype=torch.float64)
    dt = (low + draw * (high - low)).exp().clamp(min=config.dt_init_floor)
    return dt + (-torch.expm1(-dt)).log()


def _init_mixer(
    mixer: MambaMixer, config: MixerConfig, generator: torch.Generator, prefix: str, cutter: _Cutter
) -> list[str]:
    cutter.put(f"{prefix}dt_bias", mixer.dt_bias, initial_dt_bias(config, generator))
    constants: dict[str, float] = {"D": 1, "B_bias": 1, "C_bias": 1, "mimo_z": 1}
    constants |= dict.fromkeys(("mimo_x", "mimo_o"), 1 / config.mimo_rank)
    if mixer.out_norm is not None:
        constants["out_norm"] = 1
    for name, value in constants.items():
        getattr(mixer, name).fill_(value)
    return ["dt_bias", *constants]


@torch.no_grad()
def init_parameters(model: nn.Module, config: ModelConfig, seed: int, *, tp: Group = ALONE, prefix: str = "") -> None:
    """Fill every parameter of `model` in place: the shard of rank `tp.rank`, of the same full values for every tp.

    prefix: where `model` sits in a `HybridLM(config)` ("blocks.0.layer."), when it is a part of one.

    Embeddings and projections: normal(0, init_std). The last projection of a residual block: init_std divided
    by the square root of the trunk's residual blocks (two per transformer layer: the 1/sqrt(2 * layers) of
    GPT-2). Norms: 1.
    Mixer: MAMBA3.md, "Initial values".
    """
    done: set[str] = set()
    cutter = _Cutter(shard_rules(config), tp)
    output_std = config.init_std / math.sqrt(len(config.layers.trunk))
    for path, module in model.named_modules():
        here = prefix + (f"{path}." if path else "")
        generator = _generator(seed, here.removesuffix("."))
        if isinstance(module, Projection | TokenEmbedding):
            last = isinstance(module, Projection) and module.role == "output"
            cutter.normal(f"{here}weight", module.weight, output_std if last else config.init_std, generator)
            done.add(f"{here}weight")
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
            done.add(f"{here}weight")
        elif isinstance(module, MambaMixer):
            assert config.mixer is not None
            done.update(here + name for name in _init_mixer(module, config.mixer, generator, here, cutter))
    missing = {prefix + name for name, _ in model.named_parameters()} - done
    assert not missing, f"parameters without an initial value: {sorted(missing)}"


def fp32_parameter_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that stay fp32 whatever the model's dtype (MAMBA3.md, "Initial values")."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, MambaMixer)
        for name in FP32_PARAMETERS
    )


def cast_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters in place, leaving `fp32_parameter_names` in fp32 (in fp64 for an fp64 model)."""
    keep = fp32_parameter_names(model)
    for name, parameter in model.named_parameters():
        if name not in keep or dtype == torch.float64:
            parameter.data = parameter.data.to(dtype)
        else:
            parameter.data = parameter.data.float()


def no_decay(name: str, parameter: Tensor) -> bool:
    """True for what takes no weight decay: vectors (norms, dt_bias, D), and every bias and norm weight."""
    leaf = name.rsplit(".", 1)[-1]
    return parameter.dim() < 2 or leaf.endswith(("bias", "norm"))
