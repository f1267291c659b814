"""What a run can be told: frozen sections, each validated where its fields live.

Not for where a value came from (origins.py) nor for the architecture's own fields (libs.model.config).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

from libs.flags.errors import UserError
from libs.model.config import ModelConfig
from libs.parallel.mesh import Layout, check_layout


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(ModelConfig):
    """A preset by name, with any of its fields replaced."""

    preset: str = "cpu_demo"

    def architecture(self) -> ModelConfig:
        """The model's own config: what is built and what a checkpoint carries."""
        return ModelConfig.model_validate(self.model_dump(exclude={"preset"}))


class DataSection(Section):
    """Which packed corpus is read, and how much of it a micro-batch holds."""

    dir: str = "data/installed_cpp"
    window: int = Field(default=1024, ge=2, description="tokens of one packed window")
    windows_per_batch: int = Field(default=4, ge=1, description="windows of one micro-batch")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the order of windows")
    valid_tokens: int = Field(default=65_536, ge=1, description="held-out tokens that are scored")
    valid_document_tokens: int = Field(default=4096, ge=2, description="longer ones are left out, counted")

    def refuse_uneven(self, replicas: int, named: str) -> None:
        """Raises UserError: micro-batches that the replicas, which the user knows as `named`, cannot share."""
        if self.windows_per_batch % replicas:
            raise UserError(
                f"data.windows_per_batch = {self.windows_per_batch} cannot be shared by {named} = {replicas} "
                "replicas; use a multiple"
            )


class OptimSection(Section):
    """AdamW; weight decay applies to matrices only (libs.model.no_decay)."""

    lr: float = Field(default=1e-3, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0, description="global gradient norm; none: no clipping")


class ScheduleSection(Section):
    """Learning rate as a function of the step (schedule.py)."""

    kind: Literal["wsd", "cosine"] = "wsd"
    warmup_steps: int = Field(default=20, ge=0)
    decay_steps: int = Field(default=100, ge=0, description="wsd: steps of the final decay; cosine: not used")
    final_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="last rate / peak rate")


class TrainSection(Section):
    """The run itself: length, device, precision, and what to do about faults."""

    steps: int = Field(default=500, ge=1)
    grad_accumulation: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the initial weights")
    device: Literal["auto", "cpu", "cuda", "tpu", "xla"] = Field(
        default="auto", description="tpu: torch_xla on a TPU; xla: torch_xla on this machine's CPU"
    )
    device_name: str | None = Field(default=None, description="device that --dry-run plans for")
    device_memory: ByteSize | None = Field(default=None, description="its memory, such as 141GB")
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    threads: int | None = Field(default=None, ge=1, description="CPU threads; none: torch's own number")
    deterministic: bool = True
    activation_checkpointing: Literal["none", "block"] = "none"
    mimo_backend: str = "auto"
    attention_backend: str = "auto"
    loss_backend: str = "auto"
    eval_every: int = Field(default=100, ge=1, description="steps between validations; also at 0, at the end")
    nonfinite: Literal["stop", "skip"] = "stop"
    nonfinite_budget: int = Field(default=0, ge=0, description="steps that nonfinite=skip may leave out")
    stop_after: int | None = Field(default=None, ge=1, description="save and requeue after this step")

    @model_validator(mode="after")
    def _budget_has_meaning(self) -> Self:
        if self.nonfinite == "skip" and self.nonfinite_budget == 0:
            raise ValueError("nonfinite = 'skip' needs nonfinite_budget >= 1, it is 0")
        if self.nonfinite == "stop" and self.nonfinite_budget != 0:
            raise ValueError(f"nonfinite_budget = {self.nonfinite_budget} has no effect with nonfinite = 'stop'")
        return self


class CheckpointSection(Section):
    """When to save, and which saves stay."""

    every: int = Field(default=200, ge=1, description="steps between checkpoints; also at the end")
    keep_last: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, ge=1, description="steps divisible by this stay for ever")
    asynchronous: bool = Field(default=False, description="written by a thread while training goes on")


class ParallelSection(Section):
    """How the processes of a job share the work; `torchrun` says how many there are."""

    dp: int | None = Field(default=None, ge=1, description="replicas that read other data; none: what is left over")
    cp: int = Field(default=1, ge=1, description="slices of one sequence")
    tp: int = Field(default=1, ge=1, description="shards of one layer")
    sequence_parallel: bool = Field(default=False, description="between layers each tp rank holds its own tokens")
    shard_optimizer: bool = Field(default=False, description="replicas share the optimizer's state (ZeRO stage 1)")
    engine: Literal["auto", "torch", "megatron"] = Field(
        default="auto",
        description="who reduces gradients and updates; auto: torch. megatron: on CUDA, overlapped, state sharded",
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] | None = Field(
        default=None, description="how large linears compute in FP8, with gate fp8_param_gather; none: not in FP8"
    )
    timeout_s: float = Field(default=60.0, gt=0, description="a rank that is silent for longer stops the job")

    @model_validator(mode="after")
    def _one_way_to_shard(self) -> Self:
        if self.shard_optimizer and self.engine == "megatron":
            raise ValueError("shard_optimizer = true is of the torch engine: megatron's optimizer is always sharded")
        return self

    def layout(self, world_size: int) -> Layout:
        """The layout of a job of `world_size` processes.

        Raises:
            UserError: the product is not the number of processes, with the legal layouts.
        """
        model = self.cp * self.tp
        if self.dp is None and world_size % model:
            raise UserError(
                f"parallel.cp = {self.cp} and parallel.tp = {self.tp} need a multiple of {model} processes, "
                f"there are {world_size}: start with torchrun --nproc-per-node {model}"
            )
        layout = Layout(world_size // model if self.dp is None else self.dp, self.cp, self.tp)
        check_layout(layout, world_size)
        return layout


class XlaSection(Section):
    """On tpu and xla: how the chips share the work, and what a late compilation leads to."""

    data: int = Field(default=1, ge=1, description="replicas: each chip holds all of the model")
    fsdp: int = Field(default=1, ge=1, description="rows and parameters are both cut this many ways")
    tensor: int = Field(default=1, ge=1, description="shards of one layer")
    strict_compile: bool = Field(default=False, description="a program compiled after warm-up stops the run")


class LogSection(Section):
    """Where a run goes and who else hears of it."""

    runs_dir: str = "runs"
    every: int = Field(default=10, ge=1, description="steps between lines when stdout is not a terminal")
    tensorboard: bool = True
    wandb_project: str | None = Field(default=None, description="none: Weights & Biases is off")


class TrainConfig(Section):
    """Everything `fathom train` can be told."""

    model: ModelSection
    data: DataSection = DataSection()
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    parallel: ParallelSection = ParallelSection()
    xla: XlaSection = XlaSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _schedule_fits_the_run(self) -> Self:
        warmup, decay, steps = self.schedule.warmup_steps, self.schedule.decay_steps, self.train.steps
        used = warmup + (decay if self.schedule.kind == "wsd" else 0)
        if used > steps:
            raise ValueError(
                f"schedule.warmup_steps = {warmup} and schedule.decay_steps = {decay} ({self.schedule.kind}) "
                f"do not fit in train.steps = {steps}: lower them, or give train.steps {used} or more"
            )
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `TrainConfig.model_validate` takes them back."""
        values: dict[str, Any] = self.model_dump(mode="json")
        return values

    def hash(self) -> str:
        """sha256 of the canonical JSON of every value."""
        return hash_values(self.to_json())


def hash_values(values: Mapping[str, Any]) -> str:
    """The hash of a config of any version by its JSON values, as they were written."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
