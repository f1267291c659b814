"""What a model is: frozen, self-validating configs. A config that exists can be built.

The geometry lock of the mixer lives where the second number lives, in `ModelConfig`.
Not for training options (batch, schedule, precision) nor for named sizes (see `presets`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from libs.flags.errors import UserError
from libs.model.pattern import LayerKind, Pattern, not_built, parse_pattern

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AActivation = Literal["softplus", "heavy_tail"]

# A chunk is one tile of C*R rows. The Hopper kernel refuses more than 64; beyond 256 the C*R x C*R scores of
# one chunk cost more than the state they replace on any device, so such a config is a mistake.
MAX_CHUNK_ROWS = 256

# Fields that do not change what the weights mean, so two configs may differ in them and share a checkpoint.
NOT_IDENTITY = frozenset(
    {
        "name",
        "init_std",
        "mtp_weight",
        "mixer.chunk_size",
        "mixer.dt_min",
        "mixer.dt_max",
        "mixer.dt_init_floor",
    }
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class MixerConfig(_Frozen):
    """The Mamba-3 MIMO mixer: nheads H, headdim P, d_state N, ngroups G, mimo_rank R, chunk_size C."""

    nheads: Positive
    headdim: Positive = 64
    d_state: Positive = 64
    ngroups: Positive = 1
    mimo_rank: Literal[1, 2, 4, 8] = 4
    expand: Positive = 2
    chunk_size: Positive = 16
    rotary_dim_divisor: Literal[2, 4] = 4
    a_activation: AActivation = "softplus"
    a_floor: PositiveFloat = 1e-4
    outproj_norm: bool = False
    dt_min: PositiveFloat = 1e-3
    dt_max: PositiveFloat = 0.1
    dt_init_floor: PositiveFloat = 1e-4

    @property
    def inner(self) -> int:
        """H * P, the width inside the mixer."""
        return self.nheads * self.headdim

    @property
    def angles(self) -> int:
        """A, rotary angles per token."""
        return self.d_state // self.rotary_dim_divisor

    @property
    def packed_widths(self) -> tuple[int, ...]:
        """Widths of `in_proj`'s output in packing order: z, x, B, C, dd_dt, dd_A, trap."""
        state = self.ngroups * self.mimo_rank * self.d_state
        return (self.inner, self.inner, state, state, self.nheads, self.nheads, self.nheads)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.nheads % self.ngroups:
            raise UserError(f"mixer: nheads={self.nheads} is not a multiple of ngroups={self.ngroups}")
        if self.d_state % 4:
            raise UserError(f"mixer: d_state={self.d_state} is not a multiple of 4 (quarters are rotated)")
        rows = self.chunk_size * self.mimo_rank
        if rows > MAX_CHUNK_ROWS:
            raise UserError(
                f"mixer: chunk_size*mimo_rank = {self.chunk_size}*{self.mimo_rank} = {rows} rows per chunk; "
                f"at most {MAX_CHUNK_ROWS} (chunk_size <= {MAX_CHUNK_ROWS // self.mimo_rank}), "
                "and the Hopper kernel takes at most 64"
            )
        if not self.dt_init_floor <= self.dt_max or not self.dt_min <= self.dt_max:
            raise UserError(
                f"mixer: need dt_min, dt_init_floor <= dt_max, got dt_min={self.dt_min}, "
                f"dt_init_floor={self.dt_init_floor}, dt_max={self.dt_max}"
            )
        return self


class AttentionConfig(_Frozen):
    """Causal grouped-query attention with rotary positions that restart at every document."""

    nheads: Positive
    kv_heads: Positive
    head_dim: Positive = 64
    rope_theta: PositiveFloat = 10_000.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.nheads % self.kv_heads:
            raise UserError(f"attention: nheads={self.nheads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"attention: head_dim={self.head_dim} must be even (rotary pairs)")
        return self


class MlpConfig(_Frozen):
    """Gated MLP (SwiGLU): down(silu(gate(x)) * up(x))."""

    width: Positive


class ModelConfig(_Frozen):
    """A whole model. `mixer`, `attention` and `mlp` are needed exactly when the pattern uses them."""

    name: str
    vocab_size: Positive
    hidden_size: Positive
    pattern: str
    mixer: MixerConfig | None = None
    attention: AttentionConfig | None = None
    mlp: MlpConfig | None = None
    tie_embeddings: bool = True
    norm_eps: PositiveFloat = 1e-5
    init_std: PositiveFloat = 0.02
    mtp_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.3

    @property
    def layers(self) -> Pattern:
        """The parsed pattern."""
        return parse_pattern(self.pattern)

    @property
    def mtp_depth(self) -> int:
        """Multi-token-prediction depths, 0 to 2."""
        return len(self.layers.mtp)

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = self.layers.kinds
        if LayerKind.MOE in kinds:
            raise not_built(self.pattern, LayerKind.MOE)
        parts = {LayerKind.MAMBA: "mixer", LayerKind.ATTENTION: "attention", LayerKind.MLP: "mlp"}
        for kind, part in parts.items():
            if kind in kinds and getattr(self, part) is None:
                raise UserError(f"model: pattern {self.pattern!r} uses {kind.value!r} but `{part}` is not given")
        if self.mixer is not None and LayerKind.MAMBA in kinds:
            check_geometry(self.hidden_size, self.mixer)
        return self

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Build from plain data (TOML, JSON). Raises UserError that lists every problem."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise UserError(_explain(error)) from error

    def identity(self) -> dict[str, Any]:
        """{dotted field: value} of what a checkpoint must agree on (tiling and training fields left out)."""
        flat: dict[str, Any] = {}
        for key, value in self.model_dump(mode="json").items():
            if isinstance(value, dict):
                flat |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
            else:
                flat[key] = value
        return {key: value for key, value in flat.items() if key not in NOT_IDENTITY}


def check_geometry(hidden_size: int, mixer: MixerConfig) -> None:
    """The geometry lock: nheads == hidden_size * expand / headdim exactly (a silent mismatch corrupts
    gradients).

    Raises:
        UserError: shows the four numbers and, for each of them, the value that would make the other three
            legal.
    """
    width = hidden_size * mixer.expand
    if width == mixer.inner:
        return
    options = {
        "nheads": (width, mixer.headdim),
        "headdim": (width, mixer.nheads),
        "expand": (mixer.inner, hidden_size),
        "hidden_size": (mixer.inner, mixer.expand),
    }
    legal = [
        f"{name}={top // bottom}" for name, (top, bottom) in options.items() if top % bottom == 0 and top >= bottom
    ]
    raise UserError(
        "geometry: nheads must equal hidden_size*expand/headdim exactly, but "
        f"nheads={mixer.nheads} and {hidden_size}*{mixer.expand}/{mixer.headdim} = {width / mixer.headdim:g} "
        f"(hidden_size={hidden_size}, expand={mixer.expand}, headdim={mixer.headdim}, nheads={mixer.nheads}: "
        f"nheads*headdim = {mixer.inner}, hidden_size*expand = {width}); change one number to be legal: "
        f"{', '.join(legal) or 'no single change is enough'}"
    )


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "model"
        message = item["msg"].removeprefix("Value error, ")
        given = "" if isinstance(item["input"], Mapping | BaseModel) else f" (got {item['input']!r})"
        lines.append(f"{where}: {message}{given}")
    return "model config:\n  " + "\n  ".join(lines)
