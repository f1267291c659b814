"""Peak memory of one training step: on a CPU by the resident set of a fresh process, on a GPU by torch's allocator.

Everything that a step needs is in it: weights, optimizer state, gradients, activations. Not the libraries themselves.
Not for one operator's extra memory (memory.py).
"""
# S tokens

from __future__ import annotations

from collections.abc import Mapping

import torch

from apps.eval.bench.inference_receipt import own_process
from apps.eval.bench.memory import status_bytes
from apps.eval.bench.model_step import How, Stepper
from libs.flags.facts import Facts
from libs.model import ModelConfig

_FIRST_TOKENS = 64  # a first step loads libraries, starts thread pools, and makes the optimizer's state
METHOD: Mapping[str, str] = {
    "cpu": "high-water mark of the resident set of a fresh process in one step, above what it held after a step of "
    f"{_FIRST_TOKENS} tokens, with weights, gradients and optimizer state; what an allocator keeps beside is in it",
    "cuda": "torch's allocator at its highest in one step, weights and optimizer state of this model included, those "
    "of the other left out",
}


def resident_peak(
    config: ModelConfig, how: How, seq_len: int, *, gates: Mapping[str, str], facts: Facts, threads: int
) -> int | None:
    """Bytes on a CPU. None where the system does not tell a process its high-water mark."""
    with own_process(gates, facts, threads) as pool:
        return pool.submit(_resident_peak, config, how, seq_len).result()


def _resident_peak(config: ModelConfig, how: How, seq_len: int) -> int | None:
    stepper = Stepper(config, how)
    stepper.length(_FIRST_TOKENS)
    stepper.step()
    before = status_bytes("VmRSS")
    held = stepper.held_bytes
    stepper.length(seq_len)
    stepper.step()
    after = status_bytes("VmHWM")
    return None if before is None or after is None else after - before + held


def allocator_peak(stepper: Stepper, others_bytes: int) -> int:
    """Bytes on a GPU. others_bytes: what lies there and is not of this model."""
    torch.cuda.reset_peak_memory_stats()
    stepper.step()
    return int(torch.cuda.max_memory_allocated()) - others_bytes
