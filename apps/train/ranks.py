"""The ranks of one job: joining, agreeing on the set-up before anything is written, leaving together.

One process is a job of one rank: it exchanges nothing, and opens a process group only where its engine asks for one.
Not for training (loop.py).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch

from apps.train.arguments import Arguments, after_restart, resolve_arguments, resolve_settings
from apps.train.backends import refuse_backends
from apps.train.engine import refuse_engine, wants_process_group
from apps.train.facts import gather_facts
from apps.train.fp8 import settle_fp8
from apps.train.hooks import refuse_missing_sinks
from apps.train.lane import Lane, choose_lane
from apps.train.origins import Resolved, flat_values
from apps.train.session import Identity, Place, gates_or_refusal, new_identity
from apps.train.start import Corpus, open_corpus
from libs.flags.environment import Launch
from libs.flags.errors import GateRefused, RunRefused, UserError
from libs.flags.gateset import GateSet
from libs.flags.provenance import code_version
from libs.flags.runlog import next_attempt
from libs.model.sharding import check_tensor_parallel
from libs.parallel.exchange import from_rank_zero
from libs.parallel.launch import agree, connect
from libs.parallel.mesh import Groups, Layout, open_groups

# gloo for what is on the CPU (decisions, numbers of a step), NCCL for tensors on a GPU.
CPU_BACKEND, GPU_BACKEND = "gloo", "cpu:gloo,cuda:nccl"


class Setup(NamedTuple):
    """What a rank finds out on its own before anything is written. identity: None for a new run of several ranks.
    corpus: None when the gates were refused."""

    identity: Identity | None
    resolved: Resolved
    layout: Layout
    lane: Lane
    gates: GateSet | GateRefused
    corpus: Corpus | None


class Agreed(NamedTuple):
    """What was asked for (after a restart by torchrun: to resume), a set-up that all ranks share, whose run it is, and
    the groups."""

    arguments: Arguments
    setup: Setup
    identity: Identity
    place: Place
    groups: Groups


def prepare(arguments: Arguments, this: Launch) -> Setup:
    """Everything that can be refused without writing: settings, layout, device, gates, backends, data.

    Raises:
        UserError: as the parts do.
    """
    identity: Identity | None
    if this.world_size == 1 or arguments.resume is not None:
        identity, resolved = resolve_arguments(arguments, this)
    else:
        identity, resolved = None, resolve_settings(arguments)
    config = resolved.config
    layout = config.parallel.layout(this.world_size)
    check_tensor_parallel(config.model.architecture(), layout.tp)
    config.data.refuse_uneven(layout.dp, "parallel.dp")
    refuse_missing_sinks(config.log)
    lane = choose_lane(config.train, this.local_rank, config.xla)
    refuse_engine(config.parallel, lane)
    gates = settle_fp8(gates_or_refusal(gather_facts(config, lane, layout)), config, layout)
    corpus = None
    if isinstance(gates, GateSet):
        refuse_backends(config.train, lane.device, gates)
        corpus = open_corpus(config)
    return Setup(identity, resolved, layout, lane, gates, corpus)


@contextmanager
def join(arguments: Arguments, this: Launch) -> Iterator[Agreed]:
    """The job of this process, with one set-up that every rank has; all ranks leave together at a normal end.

    Raises:
        UserError: unusable settings, here or (with several ranks) alike on every rank. RunRefused: ranks differ, with
            rank and item.
    """
    arguments = after_restart(arguments, this)
    backend = GPU_BACKEND if torch.cuda.is_available() else CPU_BACKEND
    if this.world_size == 1:
        setup = prepare(arguments, this)
        assert setup.identity is not None, "one process decides"
        even_alone = wants_process_group(setup.resolved.config.parallel)
        with connect(Layout(), backend=backend, this=this, even_alone=even_alone) as alone:
            yield Agreed(arguments, setup, setup.identity, Place(0, 1, next_attempt(setup.identity.run_dir)), alone)
        return
    # Groups of the real layout come after the agreement: ranks that disagree on it would wait for each other.
    with connect(Layout(dp=this.world_size), backend=backend, this=this) as world:
        setup = _agree(arguments, this, world)
        timeout = timedelta(seconds=setup.resolved.config.parallel.timeout_s)
        told = from_rank_zero(world, "the run", lambda: _decide(arguments, this, setup), timeout=timeout)
        identity = Identity(Path(told["run_dir"]), told["run_id"], told["recipe"])
        groups = open_groups(setup.layout, backend, timeout, store=world.store)
        yield Agreed(arguments, setup, identity, Place(this.rank, this.world_size, told["attempt"]), groups)
        world.world.barrier()


def _agree(arguments: Arguments, this: Launch, world: Groups) -> Setup:
    """Prepare, and compare with the others before any of them goes on, also where one of them cannot."""
    setup: Setup | None = None
    failure: UserError | RunRefused | None = None
    try:
        setup = prepare(arguments, this)
        items = _items(setup)
    except (UserError, RunRefused) as error:
        failure, items = error, {"set-up": f"{type(error).__name__}: {error}"}
    asked = {"resume": arguments.resume, "from_step": arguments.from_step, "run_dir": arguments.run_dir}
    accepted = sorted(arguments.accept_gate_change)
    command = {f"--{name}": str(value) for name, value in (asked | {"accept_gate_change": accepted}).items()}
    versions = {"code": code_version(), "torch": torch.__version__, "python": platform.python_version()}
    agree(world, items | command | versions)
    if failure is not None:
        raise failure
    assert setup is not None, "a set-up or why there is none"
    return setup


def _items(setup: Setup) -> dict[str, str]:
    if isinstance(setup.gates, GateRefused):
        return {"set-up": f"GateRefused: {setup.gates}"}
    assert setup.corpus is not None, "gates are in order, so the data was opened"
    config, gates = setup.resolved.config, setup.gates
    hashes = {"config": config.hash(), "gates": gates.hash, "data fingerprint": setup.corpus.train.fingerprint}
    settings = {f"config {name}": repr(value) for name, value in flat_values(config).items()}
    return {"set-up": "in order"} | hashes | settings | {f"gate {n}": repr(v) for n, v in gates.values().items()}


def _decide(arguments: Arguments, this: Launch, setup: Setup) -> dict[str, object]:
    """Which run this is: rank 0's to say, since only one may look for a free directory."""
    config = setup.resolved.config
    identity = setup.identity or new_identity(config, arguments.named_recipe, arguments.run_dir, this)
    told = {"run_dir": str(identity.run_dir.resolve()), "attempt": next_attempt(identity.run_dir)}
    return {**identity._asdict(), **told}
