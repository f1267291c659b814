"""Where benchmarks run: the facts that gates are resolved with, and the record of code and hardware.

Not for the GPU's own record (cuda/device.py).
"""
# S tokens  H heads  P head width  R rank

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from apps.eval.bench.cuda.device import Machine, require_cuda
from apps.eval.bench.model_step import How
from apps.eval.bench.receipt import Code, Hardware
from libs.flags.canonical import hash_json, utc_now
from libs.flags.environment import fathom_variables
from libs.flags.errors import UserError
from libs.flags.facts import Facts
from libs.flags.provenance import redact_command, snapshot
from libs.flags.resolve import resolve
from libs.kernels.mimo import choose_backend
from libs.kernels.mimo.capabilities import NOTHING, Geometry, capabilities
from libs.model import ModelConfig
from libs.model.pattern import LayerKind

_REPORTED_PACKAGES = ("fathom", "torch", "numpy", "tilelang", "triton", "liger-kernel", "mamba-ssm")


class Where:
    """Taken before the measurement: it names what ran, and how alone the machine was."""

    def __init__(self, facts: Facts, gpu: Machine | None, *, threads: int, machine: str | None) -> None:
        """Raises GateRefused when the environment asks for a gate that cannot be honoured."""
        self.facts, self.variables = facts, fathom_variables()
        self.gates = resolve(self.variables, facts)
        self._gpu = None if gpu is None else gpu.gpu
        self._load, self._source = os.getloadavg()[0], snapshot({})
        self._threads, self._machine = threads, machine

    def fields(self, config: Mapping[str, Any], command: Sequence[str]) -> dict[str, Any]:
        """Every field of a `Receipt` that says where and of which code."""
        source, gpu = self._source, self._gpu
        return {
            "created": utc_now(),
            "command": redact_command(command),
            "code": Code.of(source),
            "config": dict(config),
            "config_hash": hash_json(dict(config)),
            "gates_hash": self.gates.hash,
            "gates": dict(self.gates.values()),
            "hardware": Hardware(
                machine=self._machine or (gpu.name if gpu else f"{source['cpu']} {self._threads} threads"),
                device="cpu" if gpu is None else "cuda",
                threads=self._threads,
                load_before=self._load,
                gpu=gpu,
                **{key: source[key] for key in ("cpu", "cpu_count", "cpu_affinity", "memory_bytes")},
            ),
            "versions": {
                "python": source["python"],
                **{name: source["packages"][name] for name in _REPORTED_PACKAGES if name in source["packages"]},
            },
        }


def free_bytes(device: str) -> int:
    """What a program may have now."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def gpu_of(device: str) -> Machine | None:
    """The GPU for "cuda", None for "cpu". Raises UserError when there is none that the kernels are built for."""
    return require_cuda() if device == "cuda" else None


def step_facts(how: How, config: ModelConfig, tokens: int, gpu: Machine | None) -> Facts:
    """What the gates may ask about steps of a hybrid on a row of `tokens`.

    Raises:
        UserError: a scan backend that cannot run here.
    """
    try:
        backend = choose_backend(how.scan, how.device).value
    except ValueError as error:
        raise UserError(f"--scan {how.scan}: {error}") from error
    mixer = config.mixer
    assert mixer is not None, "a hybrid has a scan"
    geometry = Geometry(
        mixer.nheads, mixer.ngroups, mixer.mimo_rank, mixer.d_state, mixer.headdim, mixer.chunk_size,
        mixer.rotary_dim_divisor, mixer.outproj_norm,
    )  # fmt: skip
    # Traced only where the kernels can run.
    offers = NOTHING if gpu is None else capabilities(backend, geometry)
    return Facts(
        device="cpu" if gpu is None else "cuda",
        device_name=None if gpu is None else gpu.gpu.name,
        compute_capability=None if gpu is None else torch.cuda.get_device_capability(gpu.device),
        device_count=None if gpu is None else torch.cuda.device_count(),
        multiprocessors=None if gpu is None else gpu.gpu.multiprocessors,
        free_memory_bytes=free_bytes(how.device),
        mimo_backend=backend,
        psiv_stages=offers.psiv_stages,
        two_d_kernels=offers.two_d_kernels,
        split_scan_kernels=offers.split_kernels,
        psiv_bytes_per_layer=tokens * mixer.inner * mixer.mimo_rank * 2,
        n_mamba_layers=sum(kind is LayerKind.MAMBA for kind in config.layers.trunk),
        batch_heads=mixer.nheads,
        bf16=how.precision == "bf16",
        mtp_depth=config.mtp_depth,
    )
