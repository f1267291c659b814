"""The only reader of the process environment in fathom: gate and config variables, torchrun's, an allow-list.

Not for meaning: `resolve` turns the gate variables into gates, apps.train validates its own overrides.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from libs.flags.errors import UserError

PREFIX = "FATHOM_"
# Overrides of the training config, nested by "__": FATHOM_TRAIN__OPTIM__LR=1e-3. Validated by apps.train.
CONFIG_PREFIX = "FATHOM_TRAIN__"

# What a snapshot may show beside the FATHOM_ variables. A name not listed here is never read into a record.
ALLOWED = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "GROUP_RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MKL_NUM_THREADS",
    "NCCL_ALGO",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_PROTO",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "PJRT_DEVICE",
    "PYTHONHASHSEED",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "RANK",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TPU_ACCELERATOR_TYPE",
    "TRITON_INTERPRET",
    "WORLD_SIZE",
    "XLA_FLAGS",
)
# Whole words only: a tokenizer or a number of tokens is no secret.
_SECRET = re.compile(
    r"(?<![A-Za-z])(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|AUTH)(?![A-Za-z])", re.IGNORECASE
)
REDACTED = "[redacted]"


class Launch(NamedTuple):
    """This process among its peers. attempt: how often torchrun has restarted the group (0 at first). job: the name
    torchrun gives all attempts of a job, "" without one."""

    rank: int
    local_rank: int
    world_size: int
    attempt: int
    job: str = ""


def names_a_secret(name: str) -> bool:
    """Whether a variable or option of this name may hold a credential; its value is then never recorded."""
    return _SECRET.search(name) is not None


def fathom_variables() -> dict[str, str]:
    """Every variable whose name begins with FATHOM_ in any case: gates, config overrides, misspellings."""
    return {name: value for name, value in sorted(os.environ.items()) if name.upper().startswith(PREFIX)}


def allowed_variables() -> dict[str, str]:
    """The variables a record may show; a FATHOM_ variable that names a secret shows as redacted."""
    shown = {name: os.environ[name] for name in ALLOWED if name in os.environ}
    for name, value in fathom_variables().items():
        shown[name] = REDACTED if names_a_secret(name) else value
    return dict(sorted(shown.items()))


def launch() -> Launch:
    """The launch of this process: torchrun's variables, or a single process when there are none.

    Raises:
        UserError: one that is not a whole number, only some of them set, or a rank outside the world.
    """
    return parse_launch(os.environ)


def parse_launch(environ: Mapping[str, str]) -> Launch:
    """As `launch`, of a given environment."""
    needed = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    present = [name for name in needed if name in environ]
    attempt = _whole(environ, "TORCHELASTIC_RESTART_COUNT", default=0)
    job = environ.get("TORCHELASTIC_RUN_ID", "")
    if not present:
        return Launch(rank=0, local_rank=0, world_size=1, attempt=attempt, job=job)
    missing = [name for name in needed if name not in environ]
    if missing:
        raise UserError(
            f"{', '.join(present)} set but {', '.join(missing)} not: "
            "start with torchrun, or unset all of RANK, LOCAL_RANK, WORLD_SIZE for a single process"
        )
    rank, local_rank, world_size = (_whole(environ, name) for name in needed)
    if not (rank < world_size and local_rank < world_size):
        raise UserError(f"RANK={rank}, LOCAL_RANK={local_rank} do not fit WORLD_SIZE={world_size} (ranks count from 0)")
    return Launch(rank, local_rank, world_size, attempt, job)


def _whole(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        assert default is not None
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{name}={text!r} is not a whole number of 0 or more")
    return int(text)
