"""One evaluation: checkpoint, data and gates in; a result file and an event in the run's log out.

Not for scoring (suites/) nor for arguments (__main__.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apps.eval.config import EvalConfig
from apps.eval.loading import TOKENIZER_FILE, choose_device, eval_facts
from apps.eval.place import Place, locate, shown_path
from apps.eval.progress import phases
from apps.eval.record import Settings, recorded
from apps.eval.results import (
    BackendChoice,
    CheckpointIdentity,
    DataIdentity,
    EvalReport,
    GateValues,
    ItemsFile,
    item_lines,
    items_path,
    write_result,
)
from apps.eval.suites import SUITES
from apps.eval.suites.suite import Engines, Suite, SuiteInput, SuiteOptions, SuiteOutput
from libs.flags.canonical import sha256_hex, utc_now
from libs.flags.environment import fathom_variables
from libs.flags.errors import GateRefused, UserError
from libs.flags.events import EvalResult
from libs.flags.gateset import GateSet
from libs.flags.installed import install
from libs.flags.provenance import redact_command, snapshot
from libs.flags.resolve import resolve
from libs.flags.runlog import RunLog
from libs.model import HybridLM, parameter_count
from libs.model.checkpoint import MANIFEST, checkpoint_step
from libs.model.inference import Engine, EngineConfig
from libs.model.text.shards import DataDir, seeded_permutation
from libs.model.text.tokenizer import Tokenizer
from libs.model.weights import load_model


class Evaluated(NamedTuple):
    """A written result and where it lies."""

    report: EvalReport
    path: Path


def run_eval(config: EvalConfig, *, command: Sequence[str]) -> list[Evaluated]:
    """Evaluate suite by suite, write each result as soon as it is there, and record it in the run that the checkpoint
    belongs to (unless detached).

    Raises:
        UserError: no usable checkpoint or data, another tokenizer, nothing to score, no place for the result.
        GateRefused: the environment asks for a gate that cannot be honoured.
    """
    place = locate(config)
    device = choose_device(config.device)
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


class _Subject(NamedTuple):
    """What all suites of one evaluation score, and how."""

    config: EvalConfig
    place: Place
    gates: GateSet
    environment: dict[str, Any]
    data: DataDir
    inputs: SuiteInput
    options: SuiteOptions


def _evaluate(
    config: EvalConfig,
    place: Place,
    device: torch.device,
    gates: GateSet,
    environment: dict[str, Any],
    log: RunLog | None,
) -> list[Evaluated]:
    subject = _open(config, place, device, gates, environment)
    found: list[Evaluated] = []
    for name in config.suites:
        started = time.perf_counter()
        with phases() as on_progress:
            output = SUITES[name].run(subject.inputs, subject.options, on_progress)
        items, out = item_lines(output.items), place.out[name]
        report = _report(subject, SUITES[name], output, items, time.perf_counter() - started)
        write_result(report, items, out)
        found.append(Evaluated(report, out))
        if log is not None:
            event = EvalResult(
                suite=name,
                metrics=report.metrics,
                path=shown_path(out, place.run_dir),
                n=report.n,
                excluded=len(report.excluded),
            )
            log.emit(event, step=report.checkpoint.step)
    return found


def _open(
    config: EvalConfig, place: Place, device: torch.device, gates: GateSet, environment: dict[str, Any]
) -> _Subject:
    """Model, data and engines. Raises UserError for data of another tokenizer."""
    model = load_model(place.checkpoint, device=device)
    model.eval()
    data = DataDir.open(place.data)
    _refuse_other_tokenizer(place.checkpoint, model, data)
    documents = data.documents(config.split)
    drawn = seeded_permutation(len(documents), config.seed)[: config.max_documents].tolist()
    weights = sha256_hex((place.checkpoint / MANIFEST).read_bytes())

    def open_engine(max_tokens: int) -> Engine:
        return Engine(model, EngineConfig(max_batch=config.max_batch, max_tokens=max_tokens), weights=weights)

    engines = Engines(open_engine, str(gates.value("prefix_cache")))
    inputs = SuiteInput(
        model, engines, data.tokenizer, documents, data.metadata(config.split), drawn, place.trained_window
    )
    options = SuiteOptions(
        contexts=config.contexts,
        span_tokens=config.span_tokens,
        ablation_documents=config.ablation_documents,
        max_tokens=config.max_tokens,
        batch_documents=config.batch_documents,
        items=config.items,
        seed=config.seed,
        strict_contexts=len(config.suites) == 1,
    )
    return _Subject(config, place, gates, environment, data, inputs, options)


def _report(subject: _Subject, suite: Suite, output: SuiteOutput, items: str, seconds: float) -> EvalReport:
    config, place, data, model = subject.config, subject.place, subject.data, subject.inputs.model
    return EvalReport(
        suite=suite.name,
        suite_version=suite.version,
        created=utc_now(),
        seconds=seconds,
        checkpoint=_identity(place, model),
        data=DataIdentity(
            directory=str(place.data),
            split=config.split,
            fingerprint=data.fingerprint,
            prompt_sha256=output.prompt_sha256,
            tokenizer_fingerprint=data.tokenizer.fingerprint,
        ),
        seed=config.seed,
        available=output.available,
        n=output.scored,
        excluded=list(output.excluded),
        excluded_by_reason=_count_reasons(output),
        gates=GateValues(hash=subject.gates.hash, values=subject.gates.values()),
        backends={name: BackendChoice(**choice._asdict()) for name, choice in model.choices.items()},
        config=config.model_dump(mode="json"),
        environment=subject.environment,
        metrics=output.metrics,
        items=ItemsFile(
            name=items_path(place.out[suite.name]).name, sha256=sha256_hex(items.encode()), lines=len(output.items)
        ),
        details=output.details,
    )


def _gates(device: torch.device) -> GateSet | GateRefused:
    """Resolve before any model code runs; a refusal is kept until there is a run log to write it to."""
    try:
        return resolve(fathom_variables(), eval_facts(device))
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
