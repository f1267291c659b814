"""Stands for `apps.train` under infra.launch.node: does what the plan says for this attempt. Imports no torch."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

RUN_DIR = Path(sys.argv[2])
RANK = int(os.environ["RANK"])


def stopped(number: int, frame: FrameType | None) -> None:
    with (RUN_DIR / f"signals-{RANK}").open("a") as file:
        file.write(f"{number}\n")


def main() -> int:
    plan = json.loads(os.environ["STUB_PLAN"])
    RUN_DIR.mkdir(exist_ok=True)
    seen = RUN_DIR / f"attempts-{RANK}"
    attempt = len(seen.read_text().splitlines()) if seen.exists() else 0
    with seen.open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    (RUN_DIR / "config.json").touch()
    step = plan[attempt]
    if step == "wait":
        signal.signal(signal.SIGTERM, stopped)
        (RUN_DIR / f"ready-{RANK}").touch()
        while not (RUN_DIR / f"signals-{RANK}").exists():
            time.sleep(0.05)
        time.sleep(0.5)  # saving; the others do too, and all leave together
        return 75
    if step == "crash":
        if RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    return int(step)


raise SystemExit(main())
