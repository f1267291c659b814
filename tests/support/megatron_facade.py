"""megatron-core's training path on a machine without CUDA: the names it asks for by hand, answered by the CPU.

For tests of logic and numbers (sharding, sums, clipping) on gloo. Not of NCCL, streams or overlap, which are not here.
Refuses to load where CUDA is present: there the real thing must be tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

if torch.cuda.is_available():
    raise RuntimeError("CUDA is here: test megatron-core itself, not a facade")

CPU = torch.device("cpu")
_TYPE = torch.Tensor.type


class _CudaMeansCpu(TorchFunctionMode):
    """device="cuda" in a call is the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return func(*args, **kwargs)


def _type(tensor: torch.Tensor, dtype: Any = None, **options: Any) -> Any:
    if dtype is None and not options:
        return "torch.cuda." + _TYPE(tensor).removeprefix("torch.").removeprefix("cuda.")
    return _TYPE(tensor, dtype, **options)


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Inside, megatron-core's DistributedDataParallel and DistributedOptimizer run on CPU tensors."""
    with ExitStack() as stack:
        for name, stand_in in (
            ("current_device", lambda: CPU),
            ("synchronize", lambda *_: None),
            ("empty_cache", lambda: None),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        for kind in (torch.Tensor, torch.nn.Module):
            stack.enter_context(mock.patch.object(kind, "cuda", lambda self, *_, **__: self))
        stack.enter_context(mock.patch.object(torch.Tensor, "type", _type))
        stack.enter_context(_CudaMeansCpu())
        yield


class _Apart:
    """Collectives of one coalesced call, each on its own."""

    def __init__(self) -> None:
        self._works: list[Any] = []

    def wait(self) -> None:
        for work in self._works:
            work.wait()

    def started(self, collective: Any) -> Any:
        def start(*args: Any, **options: Any) -> None:
            work = collective(*args, **options)
            self._works += [] if work is None else [work]

        return start


@contextmanager
def buckets_of_two_dtypes() -> Iterator[None]:
    """Inside, megatron-core exchanges the buckets of a group one by one.

    It puts those of FP8 and of fp32 parameters into one coalesced call, which NCCL sends as they are. gloo lays them
    end to end as one tensor, and so turns bytes into floats.
    """
    from megatron.core.distributed import param_and_grad_buffer as of_megatron

    names = ("dist_all_gather_func", "dist_reduce_scatter_func")
    collectives = {name: getattr(of_megatron, name) for name in names}

    @contextmanager
    def apart(group: Any, async_ops: bool = False) -> Iterator[_Apart]:
        works = _Apart()
        with ExitStack() as stack:
            for name, collective in collectives.items():
                stack.enter_context(mock.patch.object(of_megatron, name, works.started(collective)))
            yield works

    with mock.patch.object(of_megatron, "_coalescing_manager", apart):
        yield
