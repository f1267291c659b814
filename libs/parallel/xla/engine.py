"""Training on XLA devices: an `Engine` of two programs per step, with no number of the host inside either.

The first program is forward, backward and the gradient norm; the host looks at loss and norm; the second clips and
updates. So a step that is not finite leaves the weights alone, as on every lane. Imports torch_xla by way of `device`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from libs.parallel.data import TorchEngine
from libs.parallel.mesh import Groups
from libs.parallel.xla.device import XlaDevice
from libs.parallel.xla.topology import Partition


class XlaEngine(TorchEngine):
    """AdamW whose state and learning rate are tensors on the device (`capturable`).

    A rate that is a Python number would be a constant of the program when it is exactly 0 or 1, and compile it again.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, groups: Groups, device: XlaDevice,
        partitions: dict[str, Partition],
    ) -> None:  # fmt: skip
        """partitions: how each parameter is cut; its moments are cut alike."""
        super().__init__(model, optimizer, groups)
        self._device, self._partitions = device, partitions
        self._ready = False

    def _prepare(self) -> None:
        """Before the first step: give every parameter the state of AdamW's start, unless a checkpoint has, so that the
        first step's program is that of all others; and cut what a checkpoint has brought."""
        self._ready = True
        held = {id(p): name for name, p in self._named}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                if self._device.mesh is not None:
                    for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]):
                        self._device.mesh.cut(tensor, self._partitions[held[id(parameter)]])
        self._device.sync()

    def zero_grad(self) -> None:
        if not self._ready:
            self._prepare()
        super().zero_grad()

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """One program for each; the gradients stay on the device."""
        yield
        self._device.sync()

    def reduce(self) -> Tensor:
        norm = super().reduce()
        self._device.sync()
        return norm

    def update(self, *, rate: float, clip_norm: float | None, norm: Tensor) -> None:
        if clip_norm is not None:
            with_gradient = [p for _, p in self._named if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(with_gradient, clip_norm, norm)
        # One number in a row: a scalar that is exactly 0 or 1 would become a constant of the program.
        on_device = torch.tensor([rate], dtype=torch.float32).to(self._device.device).view(())
        for group in self._optimizer.param_groups:
            group["lr"].copy_(on_device)
        self._optimizer.step()
        self._device.sync()
