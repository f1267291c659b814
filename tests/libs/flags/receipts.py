"""Receipts as JSON for the tests of evidence: what a decision rests on, with samples of a wanted ratio."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

PAIRS = 19


def samples(ratio: float, pairs: int = PAIRS, spread: float = 0.002) -> tuple[list[float], list[float]]:
    """Seconds of A and of B, whose ratio is about `ratio`, with a slow drift that both share."""
    a = [1.0 + 0.1 * math.sin(i) for i in range(pairs)]
    return a, [ratio * x * (1 + spread * math.cos(2.3 * i)) for i, x in enumerate(a)]


def receipt(ratio: float = 0.97, **changed: Any) -> dict[str, Any]:
    """The receipt of psiv_cache=gmem_pool over off, whole step; `changed` on top, comparison merged."""
    a, b = samples(ratio)
    comparison = {"a": "a", "b": "b", "scope": "step", "gate": "psiv_cache", "baseline": "off", "value": "gmem_pool"}
    whole: dict[str, Any] = {
        "schema_version": 1,
        "created": "2026-01-02T03:04:05.000000Z",
        "code": {"git_commit": "0" * 40, "git_dirty": False},
        "hardware": {"machine": "Box", "device": "cpu"},
        "correctness": [{"name": "loss", "error": 0.0, "tolerance": 1e-3}],
        "contenders": [{"name": "a", "samples_s": a}, {"name": "b", "samples_s": b}],
        "comparison": comparison | changed.pop("comparison", {}),
        "decision": {"value": "kept"},
    }
    return whole | changed


def write(content: dict[str, Any], root: Path, name: str = "2026-01-02_step_psiv_cache_box") -> Path:
    """As infra/receipts/NAME/receipt.json below `root`."""
    path = root / "infra" / "receipts" / name / "receipt.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    return path
