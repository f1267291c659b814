"""What two ranks see when they agree, when they do not, and when one does not come."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from libs.flags.errors import RunRefused
from libs.parallel.launch import agree
from libs.parallel.mesh import Groups

SOON = timedelta(seconds=1)


def refusal(groups: Groups, items: dict[str, str], timeout: timedelta = timedelta(seconds=30)) -> str:
    try:
        agree(groups, items, timeout=timeout)
    except RunRefused as error:
        return str(error)
    return ""


def check(groups: Groups) -> dict[str, Any]:
    rank = groups.world.rank
    found: dict[str, Any] = {"initialised": dist.is_initialized()}
    found["equal"] = refusal(groups, {"gates": "abc", "code": "1"})
    found["gate"] = refusal(groups, {"gates": f"hash{rank}", "code": "1", "config": "same"})
    found["missing"] = refusal(groups, {"code": "1"} if rank == 0 else {})
    found["again"] = refusal(groups, {"gates": "abc"})
    started = time.monotonic()
    if rank == 0:  # the other one hangs
        found["late"] = refusal(groups, {"gates": "abc"}, SOON)
        found["seconds"] = time.monotonic() - started
    else:
        time.sleep(2.5)
    return found
