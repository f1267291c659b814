"""What a person needs after a non-finite loss or gradient: the batch, its place, the bad tensors.

Not for the decision to stop or to skip (loop.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from apps.train.data.loader import Batch, Cursor
from apps.train.save import disk_full_is_usage
from apps.train.step import StepResult

ANOMALIES = "anomalies"


class NonFiniteStop(RuntimeError):
    """The run stopped because a number was not finite (exit status 70)."""


def write_bundle(
    run_dir: Path,
    *,
    step: int,
    attempt: int,
    result: StepResult,
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    batches: Sequence[Batch],
    cursor_before: Cursor,
    rng_before: Mapping[str, str],
    config: Mapping[str, Any],
    rank: int = 0,
) -> Path:
    """RUN/anomalies/step-N/: report.json (what, where, norms, config), batch.safetensors, rng.json.

    One of each rank, whose name those of rank 1 and later end with. `step` is the number the step would have had;
    gradients (by parameter name) and weights are those before the optimizer ran.
    """
    name = f"step-{step:08d}"
    name += f"-attempt-{attempt}" if attempt else ""
    folder = run_dir / ANOMALIES / (name + f"-rank-{rank}" if rank else name)
    report = {
        "step": step,
        "what": result.nonfinite,
        "loss": _spell(result.losses.loss),
        "grad_norm": _spell(result.grad_norm),
        "cursor_before": cursor_before.model_dump(),
        "window_ids": [list(batch.window_ids) for batch in batches],
        "nonfinite_parameters": _nonfinite({name: p.detach() for name, p in model.named_parameters()}),
        "nonfinite_gradients": _nonfinite(gradients),
        "grad_norms": {name: _spell(float(grad.norm())) for name, grad in gradients.items()},
        "config": config,
    }
    tensors = {
        f"{number}/{field}": getattr(batch, field).contiguous()
        for number, batch in enumerate(batches)
        for field in ("tokens", "labels", "cu_seqlens")
    }
    with disk_full_is_usage(f"writing {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (folder / "rng.json").write_text(json.dumps(rng_before) + "\n", encoding="utf-8")
        save_file(tensors, folder / "batch.safetensors")
    return folder


def _nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]


def _spell(value: float) -> float | str:
    """JSON has no NaN: such numbers are spelt out."""
    return value if math.isfinite(value) else str(value)
