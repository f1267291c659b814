"""One evaluation: checkpoint, data and gates in; a result file and an event in the run's log out.

Not for scoring (suites/) nor for arguments (__main__.py).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from apps.eval.config import EvalConfig
from apps.eval.place import Place, locate, shown_path
from apps.eval.progress import phases
from apps.eval.record import Settings, recorded
from apps.eval.results import (
    BackendChoice,
    CheckpointIdentity,
    DataIdentity,
    EvalReport,
    GateValues,
    write_result,
)
from apps.eval.suites import SUITES
from apps.eval.suites.suite import SuiteInput, SuiteOptions, SuiteOutput
from libs.flags.canonical import sha256_hex, utc_now
from libs.flags.environment import fathom_variables
from libs.flags.errors import GateRefused, UserError
from libs.flags.events import EvalResult
from libs.flags.facts import Facts
from libs.flags.gateset import GateSet
from libs.flags.installed import install
from libs.flags.provenance import redact_command, snapshot
from libs.flags.resolve import resolve
from libs.flags.runlog import RunLog
from libs.kernels.mimo import choose_backend
from libs.model import HybridLM, parameter_count
from libs.model.checkpoint import MANIFEST, checkpoint_step
from libs.model.text.shards import DataDir, seeded_permutation
from libs.model.text.tokenizer import Tokenizer
from libs.model.weights import load_model

TOKENIZER_FILE = "tokenizer.json"


class Evaluated(NamedTuple):
    """A written result and where it lies."""

    report: EvalReport
    path: Path


def run_eval(config: EvalConfig, *, command: Sequence[str]) -> Evaluated:
    """Evaluate, write the result, and record it in the run the checkpoint belongs to (unless detached).

    Raises:
        UserError: no usable checkpoint or data, another tokenizer, nothing to score, no place for the result.
        GateRefused: the environment asks for a gate that cannot be honoured.
    """
    place = locate(config)
    device = _choose_device(config.device)
    gates = _gates(device)
    environment = snapshot({"device": str(device), "threads": torch.get_num_threads()})
    environment["command"] = redact_command(command)
    if place.run_dir is None or config.detached:
        if isinstance(gates, GateRefused):
            raise gates
        install(gates)
        return _evaluate(config, place, device, gates, environment, None)
    with recorded(place.run_dir, _settings(config, command), gates, environment) as log:
        assert isinstance(gates, GateSet), "recorded() raises a refusal"
        return _evaluate(config, place, device, gates, environment, log)


def _evaluate(
    config: EvalConfig,
    place: Place,
    device: torch.device,
    gates: GateSet,
    environment: dict[str, Any],
    log: RunLog | None,
) -> Evaluated:
    started = time.perf_counter()
    suite = SUITES[config.suite]
    model = load_model(place.checkpoint, device=device)
    model.eval()
    data = DataDir.open(place.data)
    _refuse_other_tokenizer(place.checkpoint, model, data)
    documents = data.documents(config.split)
    drawn = seeded_permutation(len(documents), config.seed)[: config.max_documents].tolist()
    inputs = SuiteInput(model, data.tokenizer, documents, drawn, place.trained_window)
    options = SuiteOptions(
        contexts=config.contexts,
        span_tokens=config.span_tokens,
        ablation_documents=config.ablation_documents,
        max_tokens=config.max_tokens,
        batch_documents=config.batch_documents,
        seed=config.seed,
    )
    with phases() as on_progress:
        output = suite.run(inputs, options, on_progress)
    report = EvalReport(
        suite=suite.name,
        suite_version=suite.version,
        created=utc_now(),
        seconds=time.perf_counter() - started,
        checkpoint=_identity(place, model),
        data=DataIdentity(
            directory=str(place.data),
            split=config.split,
            fingerprint=data.fingerprint,
            prompt_sha256=prompt_hash(documents.__getitem__, output.scored),
            tokenizer_fingerprint=data.tokenizer.fingerprint,
        ),
        seed=config.seed,
        available=len(documents),
        n=len(output.scored),
        excluded=list(output.excluded),
        excluded_by_reason=_count_reasons(output),
        gates=GateValues(hash=gates.hash, values=gates.values()),
        backends={name: BackendChoice(**choice._asdict()) for name, choice in model.choices.items()},
        config=config.model_dump(mode="json"),
        environment=environment,
        metrics=output.metrics,
        details=output.details,
    )
    write_result(report, place.out)
    if log is not None:
        event = EvalResult(
            suite=suite.name,
            metrics=report.metrics,
            path=shown_path(place.out, place.run_dir),
            n=report.n,
            excluded=len(report.excluded),
        )
        log.emit(event, step=report.checkpoint.step)
    return Evaluated(report, place.out)


def _choose_device(requested: str) -> torch.device:
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device on this machine; allowed here: auto, cpu")
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(requested)


def _gates(device: torch.device) -> GateSet | GateRefused:
    """Resolve before any model code runs; a refusal is kept until there is a run log to write it to."""
    on_gpu = device.type == "cuda"
    facts = Facts(
        device="cuda" if on_gpu else "cpu",
        device_name=torch.cuda.get_device_name() if on_gpu else None,
        compute_capability=torch.cuda.get_device_capability() if on_gpu else None,
        device_count=torch.cuda.device_count() if on_gpu else None,
        mimo_backend=choose_backend("auto", device).value,
    )
    try:
        return resolve(fathom_variables(), facts)
    except GateRefused as refusal:
        return refusal


def _settings(config: EvalConfig, command: Sequence[str]) -> Settings:
    values = config.model_dump(mode="json")
    origins = {key: "command line" if key in config.model_fields_set else "default" for key in values}
    return Settings(command, values, origins)


def _refuse_other_tokenizer(checkpoint: Path, model: HybridLM, data: DataDir) -> None:
    """Ids mean nothing to a model that was trained with another tokenizer."""
    trained = Tokenizer.load(checkpoint / TOKENIZER_FILE)
    if trained.fingerprint != data.tokenizer.fingerprint:
        raise UserError(
            f"{data.path} was built with tokenizer {data.tokenizer.fingerprint[:16]}, the checkpoint "
            f"with {trained.fingerprint[:16]}; build the data with --tokenizer {checkpoint / TOKENIZER_FILE}"
        )
    if data.tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {data.tokenizer.vocab_size} ids, the model {model.config.vocab_size}: it "
            "cannot have been trained with it"
        )


def prompt_hash(read: Callable[[int], np.ndarray[Any, np.dtype[np.int32]]], documents: Sequence[int]) -> str:
    """sha256 over index, length and ids (little-endian int32) of the documents, in ascending order."""
    digest = hashlib.sha256()
    for document in sorted(documents):
        ids = read(document)
        digest.update(f"{document} {len(ids)}\n".encode() + ids.astype("<i4").tobytes())
    return digest.hexdigest()


def _identity(place: Place, model: HybridLM) -> CheckpointIdentity:
    return CheckpointIdentity(
        path=shown_path(place.checkpoint, place.run_dir),
        sha256=sha256_hex((place.checkpoint / MANIFEST).read_bytes()),
        step=checkpoint_step(place.checkpoint),
        model=model.config.name,
        parameters=parameter_count(model.config).total,
    )


def _count_reasons(output: SuiteOutput) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in output.excluded:
        counts[item.reason] = counts.get(item.reason, 0) + 1
    return dict(sorted(counts.items()))
