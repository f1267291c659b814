"""A whole training step of a model on tokens at random: forward, backward, clipping, AdamW; as `apps.train` does it.

For the benchmarks of steps. Not for data or for schedules: a step's time does not depend on what the tokens are.
"""
# B rows  S tokens of a row

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from apps.eval.bench.correctness import Outcome
from libs.kernels.loss.gates import requested_backend
from libs.model import HybridLM, ModelConfig, no_decay
from libs.model.hybrid import Checkpointing
from libs.parallel.data import TorchEngine
from libs.parallel.mesh import single

Precision = Literal["fp32", "bf16"]
RATE, CLIP_NORM = 1e-4, 1.0
CHECK_TOKENS = 96
# Against fp64 and the reference of every operator; relative. bf16 is held to what its 8 bits of a mantissa can keep.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 3e-2}


class How(NamedTuple):
    """How a step is taken. scan: backend of the scan; seed: of the weights and the tokens."""

    device: str
    precision: Precision
    checkpointing: Checkpointing
    scan: str
    seed: int


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW over all parameters; those of `no_decay` do not decay."""
    decayed = [p for name, p in model.named_parameters() if not no_decay(name, p)]
    kept = [p for name, p in model.named_parameters() if no_decay(name, p)]
    parts: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(parts, lr=RATE, fused=True)


class Stepper:
    """A model that takes steps on one row. `length` says how long the row is and draws it. Gates must be installed."""

    def __init__(self, config: ModelConfig, how: How) -> None:
        self._how, self._device = how, torch.device(how.device)
        scan = how.scan if config.mixer is not None else "auto"  # a twin has none
        self.model = HybridLM(config, activation_checkpointing=how.checkpointing)
        self.model.reset_parameters(how.seed)
        self.model.to(self._device)
        self.model.request_backends(mimo=scan, loss=requested_backend("auto"))
        self._optimizer = adamw(self.model)
        self._engine = TorchEngine(self.model, self._optimizer, single())
        self._row_BS = torch.zeros(1, 2, dtype=torch.int64, device=self._device)

    def length(self, seq_len: int) -> None:
        """The steps that follow are on a row of so many tokens."""
        draw = torch.Generator().manual_seed(self._how.seed)
        row_BS = torch.randint(self.model.config.vocab_size, (1, seq_len + 1), generator=draw)
        self._row_BS = row_BS.to(self._device)

    def loss(self) -> torch.Tensor:
        low = self._how.precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=low):
            return self.model.loss(self._row_BS[:, :-1], self._row_BS[:, 1:]).loss

    def forward(self) -> None:
        """The loss alone, under no_grad, as in validation."""
        with torch.no_grad():
            self.loss()
        self._wait()

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and the norm of its gradient, which is left in the model."""
        self._engine.zero_grad()
        loss = self.loss()
        torch.autograd.backward(loss)
        norm = self._engine.reduce()
        self._wait()
        return loss.detach(), norm

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything; the loss and the norm of the gradient before clipping."""
        loss, norm = self.gradients()
        self._engine.update(rate=RATE, clip_norm=CLIP_NORM, norm=norm)
        self._wait()
        return loss, norm

    @property
    def held_bytes(self) -> int:
        """What is kept between steps: weights, gradients, optimizer state."""
        tensors: list[torch.Tensor] = list(self.model.parameters())
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        tensors += [u for state in self._optimizer.state.values() for u in state.values() if u.device == self._device]
        return sum(tensor.nbytes for tensor in tensors)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def check_step(name: str, config: ModelConfig, how: How, tokens: int = CHECK_TOKENS) -> list[Outcome]:
    """Loss, norm of the gradient and of the update, against fp64 with the reference of every operator.

    The update's norm and not the update: Adam's first one is a sign, which rounding turns where a gradient is nearly 0.
    """
    ours, exact = Stepper(config, how), _exact(config, how)
    found = []
    for stepper in (ours, exact):
        stepper.length(tokens)
        before = [p.detach().double().clone() for p in stepper.model.parameters()]
        loss, norm = stepper.step()
        moved = [p.detach().double() - b for p, b in zip(stepper.model.parameters(), before, strict=True)]
        found.append((float(loss), float(norm), float(torch.nn.utils.get_total_norm(moved))))
    labels = ("loss", "gradient norm", "norm of the update")
    return [
        Outcome(f"{name} {label} vs fp64 reference", abs(got - want) / abs(want), TOLERANCE[how.precision])
        for label, got, want in zip(labels, *found, strict=True)
    ]


def _exact(config: ModelConfig, how: How) -> Stepper:
    """On the CPU, in float64, by the references."""
    stepper = Stepper(config, How("cpu", "fp32", "none", "reference", how.seed))
    stepper.model.double()
    scan = "reference" if config.mixer is not None else "auto"
    stepper.model.request_backends(mimo=scan, attention="reference", loss="reference")
    return stepper
