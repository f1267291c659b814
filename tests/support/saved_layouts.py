"""What every rank of the tests of checkpoints across layouts does: one job of four ranks for all of them.

Each check returns plain values; the tests decide what is good.
"""

from __future__ import annotations

import errno
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

from apps.train import save, snapshot
from apps.train.config import OptimSection
from apps.train.data.loader import Cursor
from apps.train.optim import build_optimizer, optimizer_tensors
from apps.train.writer import CheckpointWriter
from libs.flags.errors import UserError
from libs.model import HybridLM, no_decay
from libs.model.text.tokenizer import Tokenizer
from libs.parallel.mesh import Groups, Layout, Parallel, open_groups
from libs.parallel.together import everyones, first_does, run_together
from tests.support.ranks import TIMEOUT
from tests.support.sharding import shard_state_dict
from tests.support.tensor_parallel import config, gradients, rough_model

CONFIG = config("M-*-/*-", tie_embeddings=False)
SETTINGS = OptimSection(lr=1e-2, eps=1e-4)
# (name, layout, optimizer sharded over dp_cp)
SOURCES = [
    ("dp2 tp2", Layout(dp=2, tp=2), False),
    ("tp4", Layout(tp=4), False),
    ("dp4", Layout(dp=4), False),
    ("dp2 cp2", Layout(dp=2, cp=2), False),
    ("cp2 tp2", Layout(cp=2, tp=2), False),
    ("dp4 zero", Layout(dp=4), True),
    ("dp2 tp2 zero", Layout(dp=2, tp=2), True),
]
Named = dict[str, Tensor]


def state_of(step: int) -> save.TrainerState:
    return save.TrainerState(
        run_id="run",
        attempt=0,
        step=step,
        tokens_total=0,
        evaluated_at=-1,
        skipped=0,
        cursor=Cursor(epoch=0, index=0, token_offset=0),
        rng=save.rng_state(),
        threads=1,
        precision="fp32",
        device="cpu",
        torch_version=torch.__version__,
        config_hash="c",
        gates_hash="g",
        gates={"psiv_cache": "off"},
        data_fingerprint="d",
        audit_anchor=f"{'0' * 64}:1",
    )


def whole_run(steps: int) -> tuple[HybridLM, torch.optim.Optimizer]:
    """One process's model after some steps: the same on every rank."""
    model = rough_model(CONFIG)
    optimizer = build_optimizer(model, SETTINGS)
    for _ in range(steps):
        gradients(model)
        optimizer.step()
    return model, optimizer


def built(groups: Groups, sharded: bool) -> tuple[HybridLM, torch.optim.Optimizer]:
    """A fresh model and optimizer of one layout, with other values than any checkpoint."""
    model = HybridLM(CONFIG, parallel=Parallel(groups))
    optimizer: torch.optim.Optimizer = build_optimizer(model, SETTINGS)
    if sharded:
        inner = {"lr": SETTINGS.lr, "betas": (SETTINGS.beta1, SETTINGS.beta2), "eps": SETTINGS.eps}
        named = list(model.named_parameters())
        decay = [
            {"params": [p for n, p in named if no_decay(n, p) == skips], "weight_decay": 0.0 if skips else 0.1}
            for skips in (False, True)
        ]
        optimizer = ZeroRedundancyOptimizer(
            decay, torch.optim.AdamW, process_group=groups.dp_cp.process_group, fused=True, **inner
        )
    return model, optimizer


def whole_tensors(model: HybridLM, optimizer: torch.optim.Optimizer) -> tuple[Named, Named]:
    return {n: p.detach() for n, p in model.named_parameters()}, optimizer_tensors(model, optimizer)


def cut(tensors: Named, tp_rank: int, tp: int) -> Named:
    """This rank's part of whole parameters, or of "<part>/<parameter>"."""
    found: Named = {}
    for key, tensor in tensors.items():
        part, _, name = key.rpartition("/")
        found[key] = tensor if part == "step" else shard_state_dict({name: tensor}, CONFIG, tp_rank, tp)[name]
    return found


def fill(model: HybridLM, optimizer: torch.optim.Optimizer, weights: Named, moments: Named, groups: Groups) -> None:
    """Give a model and an optimizer of any layout the whole run's values, without any file."""
    tp = groups.tp
    model.load_state_dict(cut(weights, tp.rank, tp.size))
    save.load_optimizer_tensors(model, optimizer, cut(moments, tp.rank, tp.size))


def differing(model: HybridLM, optimizer: torch.optim.Optimizer, weights: Named, moments: Named, groups: Groups) -> int:
    """How many of this rank's tensors are not, bit for bit, its part of the whole run's."""
    tp = groups.tp
    found = {n: p.detach() for n, p in model.named_parameters()}
    want = cut(weights, tp.rank, tp.size)
    assert found.keys() == want.keys()
    held, moment = optimizer_tensors(model, optimizer), cut(moments, tp.rank, tp.size)
    assert held, "every rank holds some state"
    assert isinstance(optimizer, ZeroRedundancyOptimizer) or held.keys() == moment.keys()
    pairs = [(found[name], want[name]) for name in want] + [(held[key], moment[key]) for key in held]
    return sum(not (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


def message(work: Callable[[], object]) -> str:
    """How it failed: the kind and the text."""
    try:
        work()
    except (UserError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Job:
    """One rank's view of the job: a folder of all ranks, a tokenizer, and the whole run's values."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.folder = Path(everyones(groups.world, tempfile.mkdtemp() if groups.world.rank == 0 else "")[0])
        self.tokenizer = Tokenizer.bytes_tokenizer()
        self.model, self.optimizer = whole_run(2)
        self.weights, self.moments = whole_tensors(self.model, self.optimizer)

    def filled(self, groups: Groups, sharded: bool = False) -> dict[str, Any]:
        model, optimizer = built(groups, sharded)
        fill(model, optimizer, self.weights, self.moments, groups)
        return {"model": model, "optimizer": optimizer, "tokenizer": self.tokenizer}

    def run(self, name: str) -> Path:
        return self.folder / name.replace(" ", "_")


def across(job: Job, opened: dict[str, Groups]) -> dict[str, Any]:
    """Every source layout into every other: tensors that differ, summed over both directions of the files."""
    found: dict[str, Any] = {}
    for source, _, sharded in SOURCES:
        groups, run = opened[source], job.run(source)
        save.save_checkpoint(run, state=state_of(2), groups=groups, **job.filled(groups, sharded))
        for target, _, target_sharded in SOURCES:
            into = opened[target]
            path = save.choose_checkpoint(run, None, into)
            model, optimizer = built(into, target_sharded)
            save.restore_model(path, model, into)
            save.restore_optimizer(path, model, optimizer, into)
            found[f"{source} -> {target}"] = differing(model, optimizer, job.weights, job.moments, into)
    return found


def continued(job: Job, opened: dict[str, Groups]) -> dict[str, float]:
    """One more step after loading tp 2's checkpoint in each layout, against one process that never stopped."""
    model, optimizer = whole_run(3)
    weights, _ = whole_tensors(model, optimizer)
    found = {}
    for target in ("dp2 tp2", "tp4", "dp4", "dp4 zero"):
        into = opened[target]
        model, optimizer = built(into, "zero" in target)
        path = save.choose_checkpoint(job.run("dp2 tp2"), None, into)
        save.restore_model(path, model, into)
        save.restore_optimizer(path, model, optimizer, into)
        gradients(model)
        optimizer.step()
        want = cut(weights, into.tp.rank, into.tp.size)
        errors = [float((p.detach() - want[n]).abs().max() / want[n].abs().max()) for n, p in model.named_parameters()]
        found[target] = max(errors)
    same, other = job.filled(opened["dp2 tp2"]), built(opened["dp2 tp2"], False)
    path = save.choose_checkpoint(job.run("dp2 tp2"), None, opened["dp2 tp2"])
    save.restore_model(path, other[0], opened["dp2 tp2"])
    save.restore_optimizer(path, other[0], other[1], opened["dp2 tp2"])
    for model, optimizer in ((same["model"], same["optimizer"]), other):
        gradients(model)
        optimizer.step()
    pairs = zip(same["model"].parameters(), other[0].parameters(), strict=True)
    found["unbroken, same layout"] = float(sum(not torch.equal(a, b) for a, b in pairs))
    return found


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))


def integrity(job: Job, groups: Groups) -> dict[str, str]:
    """Damaged files of equal size, which two ranks hash: what each rank is told."""
    found = {}
    for how in ("flipped", "missing"):
        run = job.run(f"damaged {how}")
        save.save_checkpoint(run, state=state_of(2), groups=groups, **job.filled(groups))
        if groups.world.rank == 0:
            for name in ("optimizer-tp000of002.safetensors", "optimizer-tp001of002.safetensors"):
                damage(save.checkpoint_dir(run, 2) / name, how)
        groups.world.barrier()
        found[how] = message(lambda run=run: save.choose_checkpoint(run, None, groups))  # type: ignore[misc]
    found["no checkpoint"] = message(lambda: save.choose_checkpoint(job.folder / "nowhere", None, groups))
    return found


@contextmanager
def failing_on(groups: Groups, rank: int, error: BaseException) -> Iterator[None]:
    """Shards cannot be written on one rank."""
    write = snapshot.write_shard

    def fail(*arguments: Any) -> None:
        if groups.world.rank == rank:
            raise error
        write(*arguments)

    with mock.patch.object(snapshot, "write_shard", fail):
        yield


def full_disk(job: Job, groups: Groups) -> dict[str, Any]:
    """A full disk on rank 1 while saving, now or in the background; an error of ours; what is left afterwards."""
    found: dict[str, Any] = {}
    run = job.run("full disk")
    parts = job.filled(groups)
    save.save_checkpoint(run, state=state_of(1), groups=groups, **parts)
    with failing_on(groups, 1, OSError(errno.ENOSPC, "No space left on device")):
        found["now"] = message(lambda: save.save_checkpoint(run, state=state_of(2), groups=groups, **parts))
        listener = Listener()
        with CheckpointWriter(run, groups=groups, listener=listener, asynchronous=True) as writer:
            writer.begin(state=state_of(2), **parts)
            found["background"] = message(lambda: wait_until_idle(writer))
        found["heard"] = listener.heard
    with failing_on(groups, 0, RuntimeError("ours")):
        found["ours"] = message(lambda: save.save_checkpoint(run, state=state_of(2), groups=groups, **parts))
    groups.world.barrier()
    found["left"] = sorted(path.name for path in (run / "checkpoints").iterdir())
    return found


class Listener:
    """Notes what a writer tells."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_commit(self, saved: save.Saved) -> None:
        assert (saved.path / "COMMITTED").exists()
        self.heard.append(f"commit {saved.path.name}")

    def on_abort(self, path: Path, reason: str) -> None:
        self.heard.append(f"abort {path.name}: {reason}")


def wait_until_idle(writer: CheckpointWriter) -> None:
    """As a loop would: a safe point after each short step."""
    while writer.under_way:
        threading.Event().wait(0.01)
        writer.poll()


@contextmanager
def slow_on(groups: Groups, rank: int) -> Iterator[threading.Event]:
    """Shards are not written on one rank before the event is set."""
    write, go_on = snapshot.write_shard, threading.Event()

    def wait(*arguments: Any) -> None:
        if groups.world.rank == rank:
            assert go_on.wait(60)
        write(*arguments)

    with mock.patch.object(snapshot, "write_shard", wait):
        try:
            yield go_on
        finally:
            go_on.set()


def background(job: Job, groups: Groups) -> dict[str, Any]:
    """Saves in the background: values of the moment of the copy, slow ranks, a second save, and every way out."""
    found: dict[str, Any] = {}
    run, listener = job.run("background"), Listener()
    parts = job.filled(groups)
    with CheckpointWriter(run, groups=groups, listener=listener, asynchronous=True) as writer:
        with slow_on(groups, 1) as go_on:
            writer.begin(state=state_of(1), **parts)
            with torch.no_grad():
                for parameter in parts["model"].parameters():
                    parameter.fill_(7.0)  # the next steps; the files must not see them
            writer.poll()
            found["while one is slow"] = (writer.under_way, save.committed_steps(run))
            go_on.set()
            wait_until_idle(writer)
        writer.poll()
        writer.begin(state=state_of(2), **parts)
        writer.begin(state=state_of(3), **parts)
        found["second save"] = (writer.under_way, save.committed_steps(run))
    found["left normally"] = (writer.under_way, save.committed_steps(run))
    model, optimizer = built(groups, False)
    save.restore_model(save.checkpoint_dir(run, 1), model, groups)
    save.restore_optimizer(save.checkpoint_dir(run, 1), model, optimizer, groups)
    found["differ"] = differing(model, optimizer, job.weights, job.moments, groups)
    with slow_on(groups, 1) as go_on:

        def stopped() -> None:
            with CheckpointWriter(run, groups=groups, listener=listener, asynchronous=True) as writer:
                writer.begin(state=state_of(4), **parts)
                go_on.set()
                raise RuntimeError("the step failed")

        found["exception"] = message(stopped)
    groups.world.barrier()
    found["after the exception"] = (save.committed_steps(run), sorted(p.name for p in (run / "checkpoints").iterdir()))
    found["heard"] = listener.heard
    return found


def housekeeping(job: Job, groups: Groups) -> dict[str, Any]:
    """Pruning, debris and later checkpoints: rank 0 acts, everyone learns of it."""
    run, parts = job.run("housekeeping"), job.filled(groups)
    for step in (1, 2, 3):
        save.save_checkpoint(run, state=state_of(step), groups=groups, **parts)
    if groups.world.rank == 0:
        (run / "checkpoints" / ".step-00000009.partial").mkdir()
    groups.world.barrier()
    return {
        "removed": [path.name for path in save.remove_unfinished(run, groups)],
        "aside": save.set_aside_later(run, step=2, attempt=1, groups=groups),
        "pruned": save.prune(run, keep_last=1, keep_every=None, groups=groups),
        "steps": save.committed_steps(run),
        "from step": message(lambda: save.choose_checkpoint(run, 1, groups)),
    }


def patience(groups: Groups) -> dict[str, Any]:
    """Work that takes one rank longer than any collective may: done together it is no trouble, and failing is."""
    short = open_groups(groups.layout, "gloo", timedelta(seconds=1), store=groups.store).tp

    def late(fails: bool) -> int:
        if short.rank == 1:
            time.sleep(2.5)
            if fails:
                raise UserError("too late")
        return short.rank

    return {
        "good": run_together(short, "waiting", lambda: late(False)),
        "bad": message(lambda: run_together(short, "waiting", lambda: late(True))),
        "first": first_does(short, "choosing", lambda: short.members[0]),
        "values": everyones(short, short.rank),
    }


def all_checks(groups: Groups) -> dict[str, Any]:
    """Everything, in a job that was opened as dp 2 x tp 2."""
    opened = {"dp2 tp2": groups}
    for name, layout, _ in SOURCES:
        if layout not in [other.layout for other in opened.values()]:
            opened[name] = open_groups(layout, "gloo", TIMEOUT, store=groups.store)
    opened |= {"dp4 zero": opened["dp4"], "dp2 tp2 zero": groups}
    job = Job(groups)
    return {
        "folder": str(job.folder),
        "patience": patience(groups),
        "across": across(job, opened),
        "continued": continued(job, opened),
        "integrity": integrity(job, groups),
        "full disk": full_disk(job, groups),
        "background": background(job, groups),
        "housekeeping": housekeeping(job, groups),
    }
