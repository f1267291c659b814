"""The only place that reads or sets the process environment: gate and config variables, torchrun's, an allow-list.

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
    "CPU_NUM_DEVICES",
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
# Words that end so, ACCESSKEY too: a tokenizer or a number of tokens is no secret. What is hidden in vain costs little.
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|AUTH)(?![A-Za-z])", re.IGNORECASE)
REDACTED = "[redacted]"
# With one of these git looks at another checkout, index or store of objects than that of the folder it is run in.
_GIT_PLACES = frozenset(
    {
        "GIT_ALTERNATE_OBJECT_DIRECTORIES",
        "GIT_COMMON_DIR",
        "GIT_DIR",
        "GIT_INDEX_FILE",
        "GIT_NAMESPACE",
        "GIT_OBJECT_DIRECTORY",
        "GIT_PREFIX",
        "GIT_WORK_TREE",
    }
)


def choose_xla_platform(platform: str, devices: int) -> None:
    """Tell torch_xla, before it is first imported, which runtime to open: "TPU", or "CPU" as `devices` virtual ones.

    Variables that are set already stay: they are the machine's own.
    """
    os.environ.setdefault("PJRT_DEVICE", platform)
    if platform == "CPU":
        os.environ.setdefault("CPU_NUM_DEVICES", str(devices))


def compile_without_a_tpu() -> None:
    """Let libtpu compile on a host without a TPU: no metadata server is asked, and jax itself stays on the CPU."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


class Launch(NamedTuple):
    """This process among its peers. attempt: how often torchrun has restarted the group (0 at first). job: the name
    torchrun gives all attempts of a job, "" without one. max_restarts: how often torchrun may restart the group.
    several_machines: not all processes are on this one."""

    rank: int
    local_rank: int
    world_size: int
    attempt: int
    job: str = ""
    max_restarts: int = 0
    several_machines: bool = False


def names_a_secret(name: str) -> bool:
    """Whether a variable or option of this name may hold a credential; its value is then never recorded."""
    return _SECRET.search(name) is not None


def fathom_variables() -> dict[str, str]:
    """Every variable whose name begins with FATHOM_ in any case: gates, config overrides, misspellings."""
    return {name: value for name, value in sorted(os.environ.items()) if name.upper().startswith(PREFIX)}


def child_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process: this one's, with exactly these FATHOM_ variables."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
    return kept | dict(variables)


def git_environment() -> dict[str, str]:
    """The environment for git where the folder alone shall say which checkout is meant (hooks set these variables)."""
    return {name: value for name, value in os.environ.items() if name not in _GIT_PLACES}


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
    max_restarts = _whole(environ, "TORCHELASTIC_MAX_RESTARTS", default=0)
    several_machines = _whole(environ, "LOCAL_WORLD_SIZE", default=world_size) < world_size
    return Launch(rank, local_rank, world_size, attempt, job, max_restarts, several_machines)


def _whole(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        assert default is not None
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{name}={text!r} is not a whole number of 0 or more")
    return int(text)
